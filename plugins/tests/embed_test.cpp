// Sessions of libfwl on a small model of its own that fails when it is told to: whatever fails,
// and wherever memory runs out, rows are as before the call or as after it.
//
// With an argument, that many rounds of opening, feeding, resetting and closing.

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <thread>

#include "sum_model.h"

namespace {

std::atomic<long> allocations_left{-1}; // negative: no end
std::atomic<size_t> counted_from{0};    // bytes of the smallest that counts

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

void test_splits() {
  const Problem problem;
  Session whole(problem.model, kRows), single(problem.model, kRows);
  std::mt19937 generator(1);
  for (int round = 0; round < 200; ++round) {
    const Read read = random_read(generator);
    const std::vector<float> all = feed(whole, read, FWL_LOGITS_ALL);
    std::vector<float> last(kRows * kVocabulary, 0.0f);
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
        expect(std::equal(found, found + kVocabulary, logits.data() + r * kVocabulary),
               "a split read has other logits");
      }
    }
  }
  expect(rows_of(whole, problem.model->bundle) == rows_of(single, problem.model->bundle),
         "a split read has another state");
}

// Counts what was refused; every refusal must leave rows and room for results alone.
template <class Inject> size_t test_faults(const char* name, const Inject& inject) {
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
    problem.backend->fault = Fault::kNone;
    if (failed) {
      ++refused;
      expect(rows_of(session, problem.model->bundle) == before,
             std::string(name) + ": rows have changed");
      expect(logits == untouched, std::string(name) + ": results were written");
      feed(session, read, which);
    }
    feed(undisturbed, read, which);
    expect(rows_of(session, problem.model->bundle) == rows_of(undisturbed, problem.model->bundle),
           std::string(name) + ": the session does not go on as one without faults");
  }
  return refused;
}

// Of what is large: nlohmann's JSON takes memory when it is freed, and ends the process where a few
// bytes are not to be had.
void test_files_without_memory() {
  counted_from = 1000;
  const Problem problem;
  Session session(problem.model, kRows);
  std::mt19937 generator(3);
  feed(session, random_read(generator), FWL_LOGITS_NONE);
  const std::string path = "embed_test.state";
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
    expect(rows_of(session, problem.model->bundle) == (loaded ? kept : before),
           "a load left a mixture");
    refused += !loaded;
    allocations_left = count;
    try {
      session.save(path, nullptr, 0);
    } catch (const std::exception&) {
    }
    allocations_left = -1;
    session.load(path, nullptr, 0); // the old file or the new one
    const std::vector<RowState> found = rows_of(session, problem.model->bundle);
    expect(found == kept || found == (loaded ? kept : before), "a save left a mixture");
    for (size_t r = 0; r < kRows; ++r) {
      session.write_row(r, kept[r].data(), kept[r].size());
    }
    session.save(path, nullptr, 0);
  }
  expect(refused > 3 && refused < 40, "memory does not run out in loads, or always does");
  counted_from = 0;
  std::remove(path.c_str());
}

void test_limit() {
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
  try {
    read({0, 0, 2});
    expect(false, "a row reads beyond the limit");
  } catch (const Failure& failure) {
    const std::string expected = "row 2 has read 9 tokens and is to read 2 more, but this model "
                                 "takes 10 at most; reset the row, or read a shorter text";
    expect(failure.status() == FWL_ERROR_TOKEN && failure.what() == expected, failure.what());
  }
  expect(rows_of(session, problem.model->bundle) == before, "a refused call moved a row");
  read({0, 0, 1});
  expect(session.positions() == std::vector<int64_t>{10, 10, 10}, "rows do not reach the limit");
}

void test_threads() {
  const Problem problem;
  Session shared(problem.model, kRows);
  std::vector<std::thread> threads;
  for (unsigned seed = 0; seed < 6; ++seed) {
    threads.emplace_back([&, seed] {
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
    });
  }
  for (std::thread& thread : threads) {
    thread.join();
  }
}

void test_rounds(long rounds) {
  const Problem problem;
  std::mt19937 generator(4);
  for (long i = 0; i < rounds; ++i) {
    Session session(problem.model, kRows);
    feed(session, random_read(generator), FWL_LOGITS_LAST);
    session.reset(nullptr, 0);
  }
}

} // namespace

int main(int count, char** arguments) {
  if (count > 1) {
    test_rounds(std::atol(arguments[1]));
    return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
  }
  test_splits();
  const size_t thrown = test_faults("backend", [](const Problem& problem, int calls) {
    problem.backend->fault = Fault::kThrow;
    problem.backend->calls_left = calls;
  });
  const size_t poisoned = test_faults("NaN", [](const Problem& problem, int calls) {
    problem.backend->fault = Fault::kNan;
    problem.backend->calls_left = calls;
  });
  const size_t starved =
      test_faults("memory", [](const Problem&, int number) { allocations_left = 6 * number; });
  expect(thrown > 500 && poisoned > 300 && starved > 500, "faults are not met");
  std::printf("refused of 3000 calls each: backend %zu, NaN %zu, memory %zu\n", thrown, poisoned,
              starved);
  test_files_without_memory();
  test_limit();
  test_threads();
  test_rounds(20000);
  return failures == 0 ? EXIT_SUCCESS : EXIT_FAILURE;
}
