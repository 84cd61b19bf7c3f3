// A small model for tests of libfwl's sessions, which can be told to fail.
#pragma once

#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <stdexcept>

#include "../libfwl/src/error.h"
#include "../libfwl/src/host_buffers.h"
#include "../libfwl/src/session.h"

namespace fwl::test {

using namespace fwl::internal;

constexpr size_t kVocabulary = 5, kRows = 3;
constexpr int64_t kLargest = 4, kAnchor = 7, kSize[] = {20, 25};

enum class Fault { kNone, kThrow, kNan };

// The state is the position, and a matrix whose first element is a sum over the tokens that depends
// on their order; all other elements are 0.
class SumRunner final : public Runner {
public:
  SumRunner(size_t rows, const std::vector<TensorSpec>& specs, Fault& fault, int& calls_left)
      : rows_(rows), specs_(specs), fault_(fault), calls_left_(calls_left) {}

  std::unique_ptr<Buffers> buffers() override {
    return std::make_unique<HostBuffers>(specs_, rows_);
  }

  void run(const Call& call, const Buffers& given_past, Buffers& given_present,
           std::vector<float>& logits) override {
    const auto& past = static_cast<const HostBuffers&>(given_past);
    auto& present = static_cast<HostBuffers&>(given_present);
    logits.assign(rows_ * call.positions * kVocabulary, 0.0f);
    for (size_t r = 0; r < rows_; ++r) {
      int64_t position;
      float sum;
      std::memcpy(&position, past.row(0, r), sizeof(position));
      std::memcpy(&sum, past.row(1, r), sizeof(sum));
      const int64_t length = call.lengths[r];
      if (length > kLargest || position % kAnchor + length > kAnchor) {
        throw std::logic_error("a call is too long"); // not a Failure, which tests would catch
      }
      std::vector<float> sums;
      for (int64_t i = 0; i < length; ++i) {
        const size_t at = r * call.tokens + static_cast<size_t>(i);
        sum = 0.5f * sum + call.learning_rate_scale[r] * call.label_weights[at] *
                               static_cast<float>(call.input_ids[at]);
        sums.push_back(sum);
      }
      for (size_t p = 0; p < call.positions; ++p) {
        const auto at = static_cast<size_t>(call.logit_positions[r * call.positions + p]);
        for (size_t v = 0; v < kVocabulary; ++v) {
          logits[(r * call.positions + p) * kVocabulary + v] =
              at < sums.size() ? sums[at] + static_cast<float>(v) : 77.0f;
        }
      }
      position += length;
      std::memcpy(present.row(0, r), &position, sizeof(position));
      std::memcpy(present.row(1, r), &sum, sizeof(sum));
    }
    if (fault_ != Fault::kNone && calls_left_-- == 0) {
      if (fault_ == Fault::kThrow) {
        throw Failure(FWL_ERROR_RUNTIME, "the device is gone");
      }
      logits[0] = std::numeric_limits<float>::quiet_NaN();
    }
  }
  void release(const Buffers&) override {}

private:
  size_t rows_;
  const std::vector<TensorSpec>& specs_;
  Fault& fault_;
  int& calls_left_;
};

struct SumRuntime final : Runtime {
  explicit SumRuntime(const std::vector<TensorSpec>& state) : specs(state) {}
  std::unique_ptr<Runner> runner(size_t rows) const override {
    return std::make_unique<SumRunner>(rows, specs, fault, calls_left);
  }
  const std::vector<TensorSpec>& specs;
  const char* name() const override { return "sum"; }
  mutable Fault fault = Fault::kNone;
  mutable int calls_left = 0;
};

struct Problem {
  Problem() : model(std::make_shared<Model>()) {
    model->bundle = {
        "",
        {},
        "id",
        "fp32",
        kVocabulary,
        kLargest,
        kAnchor,
        0,
        {{"position", {}, Type::kInt64}, {"fast.sum.kernel", {kSize[0], kSize[1]}, Type::kFloat32}},
        ""};
    runtime = std::make_shared<SumRuntime>(model->bundle.state);
    model->runtime = runtime;
  }
  std::shared_ptr<Model> model;
  std::shared_ptr<SumRuntime> runtime;
};

struct Read {
  std::vector<int64_t> ids;
  std::vector<int64_t> lengths;
  size_t count;
};

inline Read random_read(std::mt19937& generator) {
  Read read{{}, {}, 1 + generator() % 30};
  for (size_t r = 0; r < kRows; ++r) {
    read.lengths.push_back(static_cast<int64_t>(generator() % (read.count + 1)));
    for (size_t i = 0; i < read.count; ++i) {
      read.ids.push_back(static_cast<int64_t>(generator() % kVocabulary));
    }
  }
  return read;
}

// Returns the Failure that a call throws.
template <class Function> Failure failure_of(const Function& call) {
  try {
    call();
  } catch (const Failure& failure) {
    return failure;
  }
  return Failure(FWL_OK, "nothing failed");
}

inline std::vector<float> feed(Session& session, const Read& read, fwl_logits which) {
  std::vector<float> logits(kRows * read.count * kVocabulary, -1.0f);
  session.feed(read.ids.data(), read.count, nullptr, read.lengths.data(), which, logits.data(),
               logits.size());
  return logits;
}

inline std::vector<RowState> rows_of(Session& session, const Bundle& bundle) {
  std::vector<RowState> rows(kRows, RowState(bundle.state_bytes()));
  for (size_t r = 0; r < kRows; ++r) {
    session.read_row(r, rows[r].data(), rows[r].size());
  }
  return rows;
}

} // namespace fwl::test
