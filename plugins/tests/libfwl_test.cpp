// libfwl's sessions on a small model that can be told to fail: whatever fails, and wherever memory
// runs out, rows are as before the call or as after it.
//
// Rows and results are compared in two pairs of parentheses, so that Catch2 does not print all
// bytes.

#include <atomic>
#include <catch2/catch.hpp>
#include <cstdio>
#include <cstdlib>
#include <future>
#include <new>

#include "sum_model.h"

namespace {

std::atomic<long> allocations_left{-1}; // before memory runs out; negative: never
std::atomic<size_t> counted_from{0};    // smallest allocation that counts, in bytes

void* allocated(size_t size) {
  if (allocations_left >= 0 && size >= counted_from && allocations_left-- == 0) {
    throw std::bad_alloc();
  }
  if (void* const memory = std::malloc(size > 0 ? size : 1)) {
    return memory;
  }
  throw std::bad_alloc();
}

} // namespace

void* operator new(size_t size) {
  return allocated(size);
}
void* operator new[](size_t size) {
  return allocated(size);
}
void* operator new(size_t size, const std::nothrow_t&) noexcept { // used by Catch2
  return std::malloc(size > 0 ? size : 1);
}
void operator delete(void* memory) noexcept {
  std::free(memory);
}
void operator delete[](void* memory) noexcept {
  std::free(memory);
}
void operator delete(void* memory, size_t) noexcept {
  std::free(memory);
}
void operator delete[](void* memory, size_t) noexcept {
  std::free(memory);
}

namespace {

using namespace fwl::test;
using namespace std::string_literals;

TEST_CASE("a read in one call and token by token give the same logits and state") {
  const Problem problem;
  Session whole(problem.model, kRows), single(problem.model, kRows);
  std::mt19937 generator(1);
  for (int round = 0; round < 200; ++round) {
    const Read read = random_read(generator);
    const std::vector<float> all = feed(whole, read, FWL_LOGITS_ALL);
    for (size_t i = 0; i < read.count; ++i) {
      std::vector<int64_t> ids, lengths;
      for (size_t r = 0; r < kRows; ++r) {
        ids.push_back(read.ids[r * read.count + i]);
        lengths.push_back(static_cast<int64_t>(i) < read.lengths[r]);
      }
      std::vector<float> logits(kRows * kVocabulary);
      single.feed(ids.data(), 1, nullptr, lengths.data(), FWL_LOGITS_LAST, logits.data(),
                  logits.size());
      for (size_t r = 0; r < kRows; ++r) {
        const float* const found = all.data() + (r * read.count + i) * kVocabulary;
        CAPTURE(round, i, r);
        REQUIRE(std::equal(found, found + kVocabulary, logits.data() + r * kVocabulary));
      }
    }
  }
  CHECK((rows_of(whole, problem.model->bundle) == rows_of(single, problem.model->bundle)));
}

// Counts how many of 3000 calls fail. Each failure must leave rows and results unchanged.
template <class Inject> size_t refused_calls(const Inject& inject) {
  const Problem problem;
  Session session(problem.model, kRows), undisturbed(problem.model, kRows);
  std::mt19937 generator(2);
  size_t refused = 0;
  for (int round = 0; round < 3000; ++round) {
    const Read read = random_read(generator);
    const auto which = static_cast<fwl_logits>(generator() % 3);
    const std::vector<RowState> before = rows_of(session, problem.model->bundle);
    std::vector<float> logits(kRows * read.count * kVocabulary, -1.0f);
    bool failed = false;
    const std::vector<float> untouched = logits;
    inject(problem, static_cast<int>(generator() % 12));
    try {
      session.feed(read.ids.data(), read.count, nullptr, read.lengths.data(), which, logits.data(),
                   logits.size());
    } catch (const Failure&) {
      failed = true;
    } catch (const std::bad_alloc&) {
      failed = true;
    }
    allocations_left = -1;
    problem.runtime->fault = Fault::kNone;
    if (failed) {
      ++refused;
      CAPTURE(round);
      REQUIRE((rows_of(session, problem.model->bundle) == before));
      REQUIRE((logits == untouched));
      feed(session, read, which);
    }
    feed(undisturbed, read, which);
    CAPTURE(round);
    REQUIRE(
        (rows_of(session, problem.model->bundle) == rows_of(undisturbed, problem.model->bundle)));
  }
  return refused;
}

TEST_CASE("a call that fails leaves rows and results unchanged") {
  const size_t thrown = refused_calls([](const Problem& problem, int calls) {
    problem.runtime->fault = Fault::kThrow;
    problem.runtime->calls_left = calls;
  });
  const size_t poisoned = refused_calls([](const Problem& problem, int calls) {
    problem.runtime->fault = Fault::kNan;
    problem.runtime->calls_left = calls;
  });
  const size_t starved =
      refused_calls([](const Problem&, int number) { allocations_left = 6 * number; });
  std::printf("refused of 3000 calls each: runtime %zu, NaN %zu, memory %zu\n", thrown, poisoned,
              starved);
  CHECK(thrown > 500);
  CHECK(poisoned > 300);
  CHECK(starved > 500);
}

// Only large allocations fail here: nlohmann's JSON allocates memory while it is destroyed, and
// ends the process if it does not get it.
TEST_CASE("if memory runs out, a state file holds the old state or the new one") {
  counted_from = 1000;
  const Problem problem;
  Session session(problem.model, kRows);
  std::mt19937 generator(3);
  feed(session, random_read(generator), FWL_LOGITS_NONE);
  const std::string path = "libfwl_test.state";
  session.save(path, nullptr, 0);
  const std::vector<RowState> kept = rows_of(session, problem.model->bundle);
  size_t refused = 0;
  for (long count = 0; count < 40; ++count) {
    feed(session, random_read(generator), FWL_LOGITS_NONE);
    const std::vector<RowState> before = rows_of(session, problem.model->bundle);
    bool loaded = true;
    allocations_left = count;
    try {
      session.load(path, nullptr, 0);
    } catch (const std::exception&) {
      loaded = false;
    }
    allocations_left = -1;
    CAPTURE(count, loaded);
    REQUIRE((rows_of(session, problem.model->bundle) == (loaded ? kept : before)));
    refused += !loaded;
    allocations_left = count;
    try {
      session.save(path, nullptr, 0);
    } catch (const std::exception&) {
    }
    allocations_left = -1;
    session.load(path, nullptr, 0); // the old file or the new one
    const std::vector<RowState> found = rows_of(session, problem.model->bundle);
    REQUIRE((found == kept || found == (loaded ? kept : before)));
    for (size_t r = 0; r < kRows; ++r) {
      session.write_row(r, kept[r].data(), kept[r].size());
    }
    session.save(path, nullptr, 0);
  }
  counted_from = 0;
  CHECK(refused > 3);
  CHECK(refused < 40);
  std::remove(path.c_str());
}

TEST_CASE("no row reads beyond the last position") {
  const Problem problem;
  problem.model->bundle.max_positions = 10;
  Session session(problem.model, kRows);
  const auto read = [&](const std::vector<int64_t>& lengths) {
    const std::vector<int64_t> ids(kRows * 10, 1);
    session.feed(ids.data(), 10, nullptr, lengths.data(), FWL_LOGITS_NONE, nullptr, 0);
  };
  read({4, 10, 0});
  read({6, 0, 9});
  const std::vector<RowState> before = rows_of(session, problem.model->bundle);
  const Failure failure = failure_of([&] { read({0, 0, 2}); });
  CHECK(failure.status() == FWL_ERROR_TOKEN);
  CHECK(failure.what() == "row 2 has read 9 tokens and would read 2 more, but this model reads at "
                          "most 10; reset the row, or read a shorter text"s);
  CHECK((rows_of(session, problem.model->bundle) == before));
  read({0, 0, 1});
  CHECK(session.positions() == std::vector<int64_t>{10, 10, 10});
}

TEST_CASE("threads share a session and a model", "[threads]") {
  const Problem problem;
  Session shared(problem.model, kRows);
  std::vector<std::future<void>> threads;
  for (unsigned seed = 0; seed < 6; ++seed) {
    threads.push_back(std::async(std::launch::async, [&, seed] {
      std::mt19937 generator(seed);
      Session own(problem.model, kRows);
      for (int i = 0; i < 50; ++i) {
        const Read read = random_read(generator);
        feed(own, read, FWL_LOGITS_ALL);
        feed(shared, read, FWL_LOGITS_LAST);
        const size_t row = i % kRows;
        const size_t other = (row + 1) % kRows;
        shared.fork(row, &other, 1);
        shared.reset(&row, 1);
        shared.positions();
      }
    }));
  }
  for (std::future<void>& thread : threads) {
    CHECK_NOTHROW(thread.get());
  }
}

TEST_CASE("many sessions are opened, fed, reset and closed") {
  const Problem problem;
  std::mt19937 generator(4);
  for (int i = 0; i < 20000; ++i) {
    Session session(problem.model, kRows);
    feed(session, random_read(generator), FWL_LOGITS_LAST);
    session.reset(nullptr, 0);
  }
}

} // namespace
