// Continuous batching: 64 texts of different lengths in 8 rows. A row that has written its text is
// handed to the next one, while the others go on; every third text is set aside once, and goes on
// later from where it was, in whatever row is free then.
//
//   serve_rows BUNDLE        FWL_RUNTIME=path of libonnxruntime.so

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <iostream>

#include "fwl/fwl.hpp"

namespace {

constexpr size_t kTexts = 64, kRows = 8, kNew = 12;

struct Text {
  size_t number;
  std::vector<int64_t> next; // what it reads next: its prompt, then its own last token
  std::vector<int64_t> written;
  std::vector<char> state; // while it is set aside
  bool was_aside;
};

} // namespace

int main(int count, char** arguments) {
  if (count != 2) {
    std::cerr << "usage: serve_rows BUNDLE\n";
    return 2;
  }
  try {
    fwl::Options options;
    if (const char* runtime = std::getenv("FWL_RUNTIME")) {
      options.runtime_library = runtime;
    }
    const fwl::Model model(arguments[1], options);
    fwl::Session session = model.session(kRows);
    const size_t vocabulary = session.vocab_size();

    std::deque<Text> waiting;
    for (size_t n = 0; n < kTexts; ++n) {
      Text text{n, {}, {}, {}, false};
      for (size_t i = 0; i < 3 + n % 7; ++i) {
        text.next.push_back(static_cast<int64_t>((n * 31 + i * 17) % vocabulary));
      }
      waiting.push_back(std::move(text));
    }
    std::vector<std::vector<int64_t>> done(kTexts);
    std::vector<Text> running(kRows);
    std::vector<bool> busy(kRows, false);
    while (true) {
      size_t longest = 0;
      for (size_t row = 0; row < kRows; ++row) {
        if (!busy[row] && !waiting.empty()) {
          running[row] = std::move(waiting.front());
          waiting.pop_front();
          busy[row] = true;
          if (running[row].state.empty()) {
            session.reset({row});
          } else {
            session.write_row(row, running[row].state);
          }
        }
        longest = std::max(longest, busy[row] ? running[row].next.size() : 0);
      }
      if (longest == 0) {
        break;
      }
      std::vector<int64_t> ids(kRows * longest, 0), lengths(kRows, 0);
      for (size_t row = 0; row < kRows; ++row) {
        if (busy[row]) {
          std::copy(running[row].next.begin(), running[row].next.end(),
                    ids.begin() + static_cast<ptrdiff_t>(row * longest));
          lengths[row] = static_cast<int64_t>(running[row].next.size());
        }
      }
      const std::vector<float> logits = session.feed(ids, FWL_LOGITS_LAST, {}, lengths);
      for (size_t row = 0; row < kRows; ++row) {
        if (!busy[row]) {
          continue;
        }
        Text& text = running[row];
        const float* const scores = logits.data() + row * vocabulary;
        text.next = {std::max_element(scores, scores + vocabulary) - scores};
        text.written.push_back(text.next[0]);
        if (text.written.size() == kNew) {
          done[text.number] = text.written;
          busy[row] = false;
        } else if (text.number % 3 == 0 && !text.was_aside) {
          text.was_aside = true;
          text.state = session.read_row(row);
          waiting.push_back(std::move(text));
          busy[row] = false;
        }
      }
    }
    for (const std::vector<int64_t>& written : done) {
      for (size_t i = 0; i < written.size(); ++i) {
        std::cout << written[i] << (i + 1 < written.size() ? ' ' : '\n');
      }
    }
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
