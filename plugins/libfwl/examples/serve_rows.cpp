// Continuous batching: generates 64 texts of different lengths in the 8 rows of one session. As
// soon as a row has finished its text, the next text takes the row, while the others continue. To
// show that texts can move, every third text is set aside once and later continues in whichever row
// is free. Prints the tokens that each text has generated, one text per line.
//
//     serve_rows BUNDLE
//
// Set FWL_RUNTIME to the path of libonnxruntime.so if it is not where dlopen finds it.

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <iostream>

#include "fwl/fwl.hpp"

namespace {

constexpr size_t kTexts = 64, kRows = 8, kNewTokens = 12;

struct Text {
  size_t number;
  std::vector<int64_t> next; // what it reads next: its prompt, then the token it wrote last
  std::vector<int64_t> written;
  std::vector<char> state; // while it is set aside
  bool was_set_aside;
};

// The rows of a session, each free or busy with a text, and the texts that wait for a row.
class Server {
public:
  explicit Server(const fwl::Model& model) : session_(model.session(kRows)) {
    for (size_t n = 0; n < kTexts; ++n) {
      Text text{n, {}, {}, {}, false};
      for (size_t i = 0; i < 3 + n % 7; ++i) {
        text.next.push_back(static_cast<int64_t>((n * 31 + i * 17) % session_.vocab_size()));
      }
      waiting_.push_back(std::move(text));
    }
  }

  // Reads and writes until every text is finished; returns what each one wrote.
  std::vector<std::vector<int64_t>> run() {
    while (const size_t longest = fill_free_rows()) {
      const std::vector<float> logits = read(longest);
      for (size_t row = 0; row < kRows; ++row) {
        if (busy_[row]) {
          take_token(row, logits.data() + row * session_.vocab_size());
        }
      }
    }
    return finished_;
  }

private:
  // Gives free rows to waiting texts. Returns the most tokens that a row reads next, 0 at the end.
  size_t fill_free_rows() {
    size_t longest = 0;
    for (size_t row = 0; row < kRows; ++row) {
      if (!busy_[row] && !waiting_.empty()) {
        running_[row] = std::move(waiting_.front());
        waiting_.pop_front();
        busy_[row] = true;
        if (running_[row].state.empty()) {
          session_.reset({row});
        } else {
          session_.write_row(row, running_[row].state);
        }
      }
      longest = std::max(longest, busy_[row] ? running_[row].next.size() : 0);
    }
    return longest;
  }

  // Feeds every busy row its next tokens, padded to the longest; returns logits [kRows, V].
  std::vector<float> read(size_t longest) {
    std::vector<int64_t> ids(kRows * longest, 0), lengths(kRows, 0);
    for (size_t row = 0; row < kRows; ++row) {
      if (busy_[row]) {
        std::copy(running_[row].next.begin(), running_[row].next.end(),
                  ids.begin() + static_cast<ptrdiff_t>(row * longest));
        lengths[row] = static_cast<int64_t>(running_[row].next.size());
      }
    }
    return session_.feed(ids, FWL_LOGITS_LAST, {}, lengths);
  }

  // Appends the most likely token to a row's text, and frees the row where the text is finished or
  // set aside.
  void take_token(size_t row, const float* scores) {
    Text& text = running_[row];
    text.next = {std::max_element(scores, scores + session_.vocab_size()) - scores};
    text.written.push_back(text.next[0]);
    if (text.written.size() == kNewTokens) {
      finished_[text.number] = text.written;
      busy_[row] = false;
    } else if (text.number % 3 == 0 && !text.was_set_aside) {
      text.was_set_aside = true;
      text.state = session_.read_row(row);
      waiting_.push_back(std::move(text));
      busy_[row] = false;
    }
  }

  fwl::Session session_;
  std::deque<Text> waiting_;
  std::vector<Text> running_ = std::vector<Text>(kRows);
  std::vector<bool> busy_ = std::vector<bool>(kRows, false);
  std::vector<std::vector<int64_t>> finished_ = std::vector<std::vector<int64_t>>(kTexts);
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
    const std::vector<std::vector<int64_t>> texts = Server(model).run();
    for (const std::vector<int64_t>& written : texts) {
      for (size_t i = 0; i < written.size(); ++i) {
        std::cout << written[i] << (i + 1 < written.size() ? ' ' : '\n');
      }
    }
  } catch (const std::exception& error) {
    std::cerr << "error: " << error.what() << '\n';
    return 1;
  }
}
