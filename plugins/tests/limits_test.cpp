// How much libfwl's sessions may learn: bounds of weights and norms, and what happens at them.
//
// Rows are compared in two pairs of parentheses, so that Catch2 does not print all bytes.

#include <catch2/catch.hpp>
#include <cstdio>

#include "sum_model.h"

namespace {

using namespace fwl::test;
using namespace std::string_literals;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

std::shared_ptr<Model> model_with(const Limits& limits) {
  const Problem problem;
  problem.model->limits = limits;
  return problem.model;
}

// Feeds [kRows, count] ids of 1 with the given weights.
void read(Session& session, const std::vector<float>& weights,
          const std::vector<int64_t>& lengths = {}) {
  const std::vector<int64_t> ids(weights.size(), 1);
  session.feed(ids.data(), weights.size() / kRows, weights.data(),
               lengths.empty() ? nullptr : lengths.data(), FWL_LOGITS_NONE, nullptr, 0);
}

// Checks that a call fails as expected and leaves every row as it was.
template <class Function>
void refused(Session& session, const Bundle& bundle, fwl_status status, const std::string& message,
             const Function& call) {
  const std::vector<RowState> before = rows_of(session, bundle);
  const std::vector<int64_t> positions = session.positions();
  const Failure failure = failure_of(call);
  CHECK(failure.status() == status);
  CHECK_THAT(failure.what(), Catch::Matchers::StartsWith(message));
  CHECK((rows_of(session, bundle) == before));
  CHECK(session.positions() == positions);
}

TEST_CASE("a weight above the limit is refused") {
  const auto model = model_with({});
  Session session(model, kRows);
  read(session, {1, 2, 3, 4, 5, 10});
  refused(session, model->bundle, FWL_ERROR_TOKEN,
          "the label weight 10.5 of token id 1 (row 2, position 1) times the row's "
          "learning_rate_scale 1 is 10.5, but max_learning_weight is 10; use smaller weights, or "
          "open the model with a larger max_learning_weight",
          [&] { read(session, {1, 2, 3, 4, 5, 10.5f}); });
  read(session, {1, 1e9f, 1, 1, 1, NAN}, {1, 2, 1}); // padding may hold any number
}

TEST_CASE("the limit is that of the product of weight and scale") {
  const auto model = model_with({6, kInfinity});
  Session session(model, kRows);
  const float scale[] = {0.1f, 3, 0};
  session.set_learning_rate_scale(scale);
  read(session, {60, 2, 1e9f});
  for (const std::vector<float>& weights : {std::vector<float>{60.1f, 2, 0}, {1, 2.1f, 0}}) {
    refused(session, model->bundle, FWL_ERROR_TOKEN, "the label weight ",
            [&] { read(session, weights); });
  }
  const float more[] = {1, 1, 6.5f};
  refused(session, model->bundle, FWL_ERROR_ARGUMENT,
          "the learning_rate_scale of row 2 is 6.5, but max_learning_weight is 6; use a smaller "
          "scale, or open the model with a larger max_learning_weight",
          [&] { session.set_learning_rate_scale(more); });
  read(session, {60, 2, 1e9f}); // with the scale as it was
  CHECK(failure_of([&] { Session(model_with(limits_of(0.5, 0)), kRows); }).what() ==
        "the learning_rate_scale of row 0 is 1, but max_learning_weight is 0.5; use a "
        "smaller scale, or open the model with a larger max_learning_weight"s);
}

TEST_CASE("without a limit every finite weight is taken") {
  Session session(model_with(limits_of(kInfinity, 0)), kRows);
  const float scale[] = {1e3f, 1, 1};
  session.set_learning_rate_scale(scale);
  read(session, {1e9f, 1e30f, 1});
}

TEST_CASE("a session tells how much its rows have learned") {
  Session session(model_with(limits_of(kInfinity, 0)), kRows);
  CHECK(session.learned() == std::vector<double>{0, 0, 0});
  read(session, {4, 2, 1, 3, 1e30f, 0}, {2, 0, 1}); // each sum is half the last one plus the token
  CHECK(session.learned()[0] == 0.5 * 4 + 2);
  CHECK(session.learned()[1] == 0);
  CHECK(session.learned()[2] == static_cast<double>(1e30f)); // its square overflows float32
  const size_t row = 2;
  session.reset(&row, 1);
  CHECK(session.learned() == std::vector<double>{4, 0, 0});
}

TEST_CASE("a row that would learn too much is refused") {
  const auto model = model_with({10, 3});
  Session session(model, kRows);
  read(session, {1, 1, 1});
  std::vector<float> weights(kRows * 30, 1); // several calls of the model
  read(session, weights);
  const size_t last = kRows * 30 - 1;
  weights[last] = 2.25f; // in the last of them; the sum was just below 2
  refused(session, model->bundle, FWL_ERROR_TOKEN,
          "what row 2 would have learned has the norm 3.25, but max_update_norm is 3; no row has "
          "moved: read these tokens with smaller label_weights, or reset the row",
          [&] { read(session, weights); });
  weights[last] = 2;
  read(session, weights);
  CHECK(session.learned()[2] == Approx(3));
  read(session, {0, 0, 0});
}

TEST_CASE("a state that has learned too much is refused") {
  const auto strict = model_with({10, 3}), free = model_with({10, kInfinity});
  Session session(strict, kRows), other(free, kRows);
  read(other, {3, 4, 1});
  read(session, {1, 1, 1});
  const std::vector<RowState> states = rows_of(other, free->bundle);
  session.write_row(0, states[0].data(), states[0].size()); // the limit itself
  refused(session, strict->bundle, FWL_ERROR_STATE,
          "row 0: what this state has learned has the norm 4, but max_update_norm is 3; use a "
          "state that has learned less, or open the model with a larger max_update_norm",
          [&] { session.write_row(0, states[1].data(), states[1].size()); });
  const std::string path = "limits_test.state";
  other.save(path, nullptr, 0);
  refused(session, strict->bundle, FWL_ERROR_STATE,
          "'limits_test.state', row 1: what this state has learned has the norm 4",
          [&] { session.load(path, nullptr, 0); });
  std::remove(path.c_str());
}

TEST_CASE("a state that is not finite or too far is refused") {
  const auto model = model_with({});
  Session session(model, kRows);
  read(session, {1, 1, 1});
  const RowState good = rows_of(session, model->bundle)[0];
  for (const int64_t position : {int64_t{-1}, kMostTokens + 1, INT64_MAX, INT64_MIN}) {
    RowState state = good;
    std::memcpy(state.data(), &position, sizeof(position));
    refused(session, model->bundle, FWL_ERROR_STATE,
            "row 1: the position is " + std::to_string(position) +
                "; expected 0 to 9007199254740992: do not use this state",
            [&] { session.write_row(1, state.data(), state.size()); });
  }
  model->bundle.max_positions = 100;
  RowState state = good;
  const int64_t position = 101;
  std::memcpy(state.data(), &position, sizeof(position));
  refused(session, model->bundle, FWL_ERROR_STATE, "row 1: the position is 101; expected 0 to 100",
          [&] { session.write_row(1, state.data(), state.size()); });
}

TEST_CASE("what a row has learned is clipped at every 32nd of its tokens") {
  Limits limits;
  limits.clip_update_norm = 1.5;
  const auto model = model_with(limits);
  Session session(model, kRows);
  const std::vector<int64_t> ids(kRows * 40, 1);
  const std::vector<int64_t> lengths = {31, 32, 0};
  session.feed(ids.data(), 40, nullptr, lengths.data(), FWL_LOGITS_NONE, nullptr, 0);
  CHECK(session.learned()[0] > 1.5); // not yet: nothing depends on how a text is split into feeds
  CHECK(session.learned()[1] == Approx(1.5));
  CHECK(session.learned()[2] == 0);

  const auto free = model_with({});
  Session whole(model, kRows), parts(model, kRows), unclipped(free, kRows);
  whole.feed(ids.data(), 40, nullptr, nullptr, FWL_LOGITS_NONE, nullptr, 0);
  unclipped.feed(ids.data(), 40, nullptr, nullptr, FWL_LOGITS_NONE, nullptr, 0);
  const std::vector<int64_t> ones(kRows, 1);
  for (int n = 0; n < 40; ++n) {
    parts.feed(ones.data(), 1, nullptr, nullptr, FWL_LOGITS_NONE, nullptr, 0);
  }
  CHECK((rows_of(whole, model->bundle) == rows_of(parts, model->bundle)));
  CHECK(unclipped.learned()[0] > whole.learned()[0]);
}

TEST_CASE("limits are numbers above 0, and 0 stands for the default") {
  CHECK(limits_of(0, 0).max_learning_weight == 10);
  CHECK(limits_of(0, 0).max_update_norm == kInfinity);
  CHECK(limits_of(0.5, 7).max_learning_weight == 0.5);
  CHECK(limits_of(0.5, 7).max_update_norm == 7);
  CHECK(limits_of(0, 0).clip_update_norm == kInfinity);
  CHECK(limits_of(0, 0, 3).clip_update_norm == 3);
  CHECK(limits_of(kInfinity, kInfinity).max_learning_weight == kInfinity);
  CHECK(limits_of(1e300, 0).max_learning_weight == kInfinity);
  CHECK(limits_of(0.1, 0).max_learning_weight == 0.1f);
  for (const double wrong : {-1.0, static_cast<double>(NAN), -kInfinity}) {
    const Failure weight = failure_of([&] { limits_of(wrong, 0); });
    CHECK(weight.status() == FWL_ERROR_ARGUMENT);
    CHECK_THAT(weight.what(), Catch::Matchers::StartsWith("max_learning_weight is "));
    const Failure norm = failure_of([&] { limits_of(0, wrong); });
    CHECK_THAT(norm.what(), Catch::Matchers::StartsWith("max_update_norm is "));
    const Failure clip = failure_of([&] { limits_of(0, 0, wrong); });
    CHECK_THAT(clip.what(), Catch::Matchers::StartsWith("clip_update_norm is "));
    CHECK_THAT(norm.what(), Catch::Matchers::EndsWith("; expected 0 for the default, a number "
                                                      "above 0, or infinity for no limit"));
  }
}

} // namespace
