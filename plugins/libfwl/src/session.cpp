#include "session.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <set>

#include "error.h"

namespace fwl::internal {
namespace {

[[noreturn]] void refuse(fwl_status status, const std::string& message) {
  throw Failure(status, message);
}

// Lets the runner forget buffers before they go, however the feed ends.
struct ReleaseAtEnd {
  ~ReleaseAtEnd() {
    if (buffers != nullptr) {
      runner.release(*buffers);
    }
  }
  Runner& runner;
  std::unique_ptr<Buffers>& buffers;
};

// Checks the learning-rate scales against the limit for a label weight of 1.
void check_scale(const std::vector<float>& scale, const Limits& limits) {
  for (size_t r = 0; r < scale.size(); ++r) {
    if (scale[r] > limits.max_learning_weight) {
      refuse(FWL_ERROR_ARGUMENT, "the learning_rate_scale of row " + std::to_string(r) + " is " +
                                     number_text(scale[r]) + ", but max_learning_weight is " +
                                     number_text(limits.max_learning_weight) +
                                     "; use a smaller scale, or open the model with a larger "
                                     "max_learning_weight");
    }
  }
}

size_t predictions_of(fwl_logits which, size_t rows, size_t count) {
  return which == FWL_LOGITS_ALL ? rows * count : which == FWL_LOGITS_LAST ? rows : 0;
}

ptrdiff_t signed_size(size_t size) {
  return static_cast<ptrdiff_t>(size);
}

} // namespace

// The tokens that one feed reads; arrays as in fwl_session_feed.
struct Session::Text {
  const int64_t* tokens;
  size_t count;
  const float* label_weights;
  fwl_logits which;
};

// How far a feed has come, which may take several calls of the model; one number for each row.
struct Session::Progress {
  std::vector<int64_t> done; // tokens that earlier calls have read
  std::vector<int64_t> left; // tokens that no earlier call has read
  std::vector<int64_t> now;  // tokens that the current call reads

  bool is_last_call() const { return now == left; }
  void advance() {
    for (size_t r = 0; r < now.size(); ++r) {
      done[r] += now[r];
      left[r] -= now[r];
    }
  }
};

Session::Session(std::shared_ptr<const Model> model, size_t rows)
    : model_(std::move(model)), rows_(rows) {
  if (rows < 1 || rows > kMaxRows) {
    refuse(FWL_ERROR_ARGUMENT,
           "rows is " + std::to_string(rows) + "; expected 1 to " + std::to_string(kMaxRows));
  }
  runner_ = model_->runtime->runner(rows);
  current_ = runner_->buffers();
  spare_ = runner_->buffers();
  max_tokens_ = std::min(model_->bundle.max_tokens, model_->runtime->max_tokens());
  positions_.assign(rows, 0);
  call_.learning_rate_scale.assign(rows, 1.0f);
  check_scale(call_.learning_rate_scale, model_->limits);
}

void Session::feed(const int64_t* tokens, size_t count, const float* label_weights,
                   const int64_t* lengths, fwl_logits which, float* logits, size_t logits_size) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check_tokens(tokens, count, label_weights, lengths);
  check_room(count, which, logits, logits_size);
  const Text text{tokens, count, label_weights, which};
  std::vector<int64_t> total(rows_, static_cast<int64_t>(count));
  if (lengths != nullptr) {
    total.assign(lengths, lengths + rows_);
  }
  check_positions(total);

  Progress progress{std::vector<int64_t>(rows_, 0), total, std::vector<int64_t>(rows_)};
  std::vector<float> results; // copied to `logits` once every call has succeeded
  // A feed of several calls writes to `spare_` and to these buffers in turn, so that the current
  // state stays as it is until the end.
  std::unique_ptr<Buffers> intermediate;
  const ReleaseAtEnd release{*runner_, intermediate};
  const Buffers* past = current_.get();
  Buffers* present = spare_.get();
  for (bool last = false; !last;) {
    set_next_lengths(progress);
    last = progress.is_last_call();
    fill_call(text, progress);
    runner_->run(call_, *past, *present, found_);
    check_output(progress);
    clip(progress, *present);
    check_norms(*present);
    collect(text, progress, results);
    progress.advance();
    if (!last) {
      if (intermediate == nullptr) {
        intermediate = runner_->buffers();
      }
      past = present;
      present = present == spare_.get() ? intermediate.get() : spare_.get();
    }
  }
  // Nothing below can fail.
  std::swap(present == spare_.get() ? spare_ : intermediate, current_);
  for (size_t r = 0; r < rows_; ++r) {
    positions_[r] += total[r];
  }
  std::copy(results.begin(), results.end(), logits);
  if (results.capacity() > found_.capacity()) {
    results.swap(found_); // the next call reuses the larger block of memory
  }
}

// Checks that there is room for the logits that are asked for.
void Session::check_room(size_t count, fwl_logits which, const float* logits, size_t size) const {
  if (which < FWL_LOGITS_NONE || which > FWL_LOGITS_ALL) {
    refuse(FWL_ERROR_ARGUMENT,
           "argument 'which' is " + std::to_string(which) + "; expected 0, 1 or 2");
  }
  const size_t needed =
      predictions_of(which, rows_, count) * static_cast<size_t>(model_->bundle.vocab_size);
  if (needed > 0 && logits == nullptr) {
    refuse(FWL_ERROR_ARGUMENT, "logits is NULL");
  }
  if (size < needed) {
    refuse(FWL_ERROR_ARGUMENT, "logits has room for " + std::to_string(size) +
                                   " floats; expected " + std::to_string(needed));
  }
}

// Checks that no row goes beyond the model's last position; `total` is what each row is to read.
void Session::check_positions(const std::vector<int64_t>& total) const {
  const int64_t limit = model_->bundle.max_positions;
  for (size_t r = 0; r < rows_ && limit > 0; ++r) {
    if (total[r] > limit - positions_[r]) {
      refuse(FWL_ERROR_TOKEN, "row " + std::to_string(r) + " has read " +
                                  std::to_string(positions_[r]) + " tokens and would read " +
                                  std::to_string(total[r]) +
                                  " more, but this model reads at most " + std::to_string(limit) +
                                  "; reset the row, or read a shorter text");
    }
  }
}

// Decides how many tokens each row brings to the next call: no more than a call takes, and none
// beyond the row's next anchor, or the next place where what it has learned is clipped.
void Session::set_next_lengths(Progress& progress) const {
  const int64_t clip = model_->limits.clips() ? kClipInterval : 0;
  for (size_t r = 0; r < rows_; ++r) {
    progress.now[r] = std::min(progress.left[r], max_tokens_);
    for (const int64_t interval : {model_->bundle.anchor_interval, clip}) {
      if (interval > 0) {
        const int64_t position = positions_[r] + progress.done[r];
        progress.now[r] = std::min(progress.now[r], interval - position % interval);
      }
    }
  }
}

// Scales what rows have learned down to the limit, where the call ends at a place to do so.
void Session::clip(const Progress& progress, Buffers& present) const {
  if (!model_->limits.clips()) {
    return;
  }
  RowState state(model_->bundle.state_bytes());
  for (size_t r = 0; r < rows_; ++r) {
    const int64_t position = positions_[r] + progress.done[r] + progress.now[r];
    if (progress.now[r] == 0 || position % kClipInterval != 0) {
      continue;
    }
    present.read(r, state.data());
    const double norm = learned_norm(model_->bundle, state);
    if (!std::isfinite(norm)) {
      refuse(FWL_ERROR_TOKEN, "what row " + std::to_string(r) +
                                  " would have learned is not finite, so it cannot be clipped; no "
                                  "row has moved: read these tokens with smaller label_weights, or "
                                  "reset the row");
    }
    if (norm > model_->limits.clip_update_norm) {
      scale_learned(model_->bundle, state,
                    static_cast<float>(model_->limits.clip_update_norm / norm));
      present.write(r, state.data());
    }
  }
}

// Checks that the logits of real tokens are finite, and sets those of padding to 0.
void Session::check_output(const Progress& progress) {
  const auto vocabulary = static_cast<size_t>(model_->bundle.vocab_size);
  const auto finite = [](float x) { return std::isfinite(x); };
  for (size_t r = 0; r < rows_; ++r) {
    for (size_t p = 0; p < call_.positions; ++p) {
      float* const values = found_.data() + (r * call_.positions + p) * vocabulary;
      const int64_t at = call_.logit_positions[r * call_.positions + p];
      if (at >= progress.now[r]) {
        std::fill(values, values + vocabulary, 0.0f);
      } else if (!std::all_of(values, values + vocabulary, finite)) {
        refuse_output(r, at, progress);
      }
    }
  }
}

// Refuses a call whose logits are not finite after a token; `at` is its index in the call.
void Session::refuse_output(size_t row, int64_t at, const Progress& progress) const {
  const int64_t in_feed = progress.done[row] + at;
  const int64_t token = call_.input_ids[row * call_.tokens + static_cast<size_t>(at)];
  const std::string& precision = model_->bundle.precision;
  const bool is_half = precision == "fp16" || precision == "mix16";
  refuse(FWL_ERROR_TOKEN,
         "the model's output is not finite at row " + std::to_string(row) + ", position " +
             std::to_string(in_feed) + " (token id " + std::to_string(token) + ", position " +
             std::to_string(positions_[row] + in_feed) +
             " of the row's text); no row has moved: reset the row, read on without this text, or "
             "read it with smaller label_weights or with clip_update_norm" +
             (is_half ? ". The model computes in " + precision +
                            ", in which no float16 number is larger than 65504; one in fp32 has "
                            "room for it"
                      : ""));
}

// Puts a call's logits where the caller gets them: [rows, V], or [rows, count, V].
void Session::collect(const Text& text, const Progress& progress, std::vector<float>& results) {
  const auto vocabulary = static_cast<size_t>(model_->bundle.vocab_size);
  const size_t size = predictions_of(text.which, rows_, text.count) * vocabulary;
  if (size == 0) {
    return;
  }
  if (results.empty() && progress.is_last_call() && found_.size() == size) {
    results.swap(found_); // the only call of this feed: nothing to put together
    return;
  }
  results.resize(size);
  for (size_t r = 0; r < rows_; ++r) {
    const auto from = found_.begin() + signed_size(r * call_.positions * vocabulary);
    const auto done = static_cast<size_t>(progress.done[r]);
    const auto now = static_cast<size_t>(progress.now[r]);
    if (text.which == FWL_LOGITS_ALL) {
      std::copy_n(from, now * vocabulary,
                  results.begin() + signed_size((r * text.count + done) * vocabulary));
    } else if (now > 0) {
      std::copy_n(from, vocabulary, results.begin() + signed_size(r * vocabulary));
    }
  }
}

void Session::check_tokens(const int64_t* tokens, size_t count, const float* label_weights,
                           const int64_t* lengths) const {
  if (tokens == nullptr || count < 1) {
    refuse(FWL_ERROR_ARGUMENT,
           "there are no tokens; expected [rows, count] with count of 1 or more");
  }
  if (count > SIZE_MAX / sizeof(float) / rows_ / static_cast<size_t>(model_->bundle.vocab_size)) {
    refuse(FWL_ERROR_ARGUMENT, "count is " + std::to_string(count) + ", which is too large");
  }
  for (size_t r = 0; r < rows_; ++r) {
    const int64_t length = lengths == nullptr ? static_cast<int64_t>(count) : lengths[r];
    if (length < 0 || length > static_cast<int64_t>(count)) {
      refuse(FWL_ERROR_TOKEN, "the length of row " + std::to_string(r) + " is " +
                                  std::to_string(length) + "; expected 0 to " +
                                  std::to_string(count));
    }
    for (size_t i = 0; i < static_cast<size_t>(length); ++i) {
      const int64_t token = tokens[r * count + i];
      if (token < 0 || token >= model_->bundle.vocab_size) {
        refuse(FWL_ERROR_TOKEN, "token id " + std::to_string(token) + " (row " + std::to_string(r) +
                                    ", position " + std::to_string(i) +
                                    ") is out of range; expected 0 to " +
                                    std::to_string(model_->bundle.vocab_size - 1));
      }
      if (label_weights != nullptr) {
        check_weight(tokens, label_weights, count, r, i);
      }
    }
  }
}

// Checks a token's label weight, and its product with the row's learning-rate scale.
void Session::check_weight(const int64_t* tokens, const float* label_weights, size_t count,
                           size_t row, size_t column) const {
  const float weight = label_weights[row * count + column];
  if (!std::isfinite(weight) || weight < 0) {
    refuse(FWL_ERROR_TOKEN, "label_weights contains " + number_text(weight) +
                                "; expected finite numbers of 0 or more");
  }
  const float scale = call_.learning_rate_scale[row];
  if (weight * scale > model_->limits.max_learning_weight) {
    refuse(FWL_ERROR_TOKEN,
           "the label weight " + number_text(weight) + " of token id " +
               std::to_string(tokens[row * count + column]) + " (row " + std::to_string(row) +
               ", position " + std::to_string(column) + ") times the row's learning_rate_scale " +
               number_text(scale) + " is " + number_text(weight * scale) +
               ", but max_learning_weight is " + number_text(model_->limits.max_learning_weight) +
               "; use smaller weights, or open the model with a larger max_learning_weight");
  }
}

// Checks what the rows would have learned after a call of the model.
void Session::check_norms(const Buffers& present) const {
  if (!model_->limits.has_norm()) {
    return;
  }
  RowState state(model_->bundle.state_bytes());
  for (size_t r = 0; r < rows_; ++r) {
    present.read(r, state.data());
    const double norm = learned_norm(model_->bundle, state);
    if (!(norm <= model_->limits.max_update_norm)) { // also if it is NaN
      refuse(FWL_ERROR_TOKEN, "what row " + std::to_string(r) +
                                  " would have learned has the norm " + number_text(norm) +
                                  ", but max_update_norm is " +
                                  number_text(model_->limits.max_update_norm) +
                                  "; no row has moved: read these tokens with smaller "
                                  "label_weights, or reset the row");
    }
  }
}

// Checks a state that the caller gives to a row; `source` names it.
void Session::check_given(const RowState& state, const std::string& source) const {
  const double norm = model_->limits.has_norm() ? learned_norm(model_->bundle, state) : 0;
  if (!(norm <= model_->limits.max_update_norm)) {
    refuse(FWL_ERROR_STATE, source + ": what this state has learned has the norm " +
                                number_text(norm) + ", but max_update_norm is " +
                                number_text(model_->limits.max_update_norm) +
                                "; use a state that has learned less, or open the model with a "
                                "larger max_update_norm");
  }
}

// Writes the inputs of the next call: every row's next tokens, padded to the longest.
void Session::fill_call(const Text& text, const Progress& progress) {
  const std::vector<int64_t>& lengths = progress.now;
  const auto longest =
      static_cast<size_t>(std::max<int64_t>(1, *std::max_element(lengths.begin(), lengths.end())));
  call_.tokens = longest;
  call_.positions = text.which == FWL_LOGITS_ALL ? longest : 1;
  call_.input_ids.assign(rows_ * longest, 0);
  call_.label_weights.assign(rows_ * longest, 0.0f);
  call_.logit_positions.resize(rows_ * call_.positions);
  call_.lengths = lengths;
  for (size_t r = 0; r < rows_; ++r) {
    const size_t start = r * text.count + static_cast<size_t>(progress.done[r]);
    for (size_t i = 0; i < static_cast<size_t>(lengths[r]); ++i) {
      call_.input_ids[r * longest + i] = text.tokens[start + i];
      call_.label_weights[r * longest + i] =
          text.label_weights == nullptr ? 1.0f : text.label_weights[start + i];
    }
    for (size_t p = 0; p < call_.positions; ++p) {
      call_.logit_positions[r * call_.positions + p] = text.which == FWL_LOGITS_ALL
                                                           ? static_cast<int64_t>(p)
                                                           : std::max<int64_t>(lengths[r] - 1, 0);
    }
  }
}

std::vector<int64_t> Session::positions() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return positions_;
}

void Session::set_learning_rate_scale(const float* scale) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (scale == nullptr ||
      !std::all_of(scale, scale + rows_, [](float x) { return std::isfinite(x) && x >= 0; })) {
    refuse(FWL_ERROR_ARGUMENT, "learning_rate_scale must be " + std::to_string(rows_) +
                                   " finite numbers of 0 or more, one for each row");
  }
  const std::vector<float> given(scale, scale + rows_);
  check_scale(given, model_->limits);
  call_.learning_rate_scale = given;
}

std::vector<double> Session::learned() {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<double> norms;
  for (size_t r = 0; r < rows_; ++r) {
    norms.push_back(learned_norm(model_->bundle, row_state(r)));
  }
  return norms;
}

void Session::reset(const size_t* rows, size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<size_t> all = chosen(rows, count);
  put(all, std::vector<RowState>(all.size(), RowState(model_->bundle.state_bytes())));
}

void Session::fork(size_t source, const size_t* targets, size_t count) {
  const std::lock_guard<std::mutex> lock(mutex_);
  chosen(&source, 1);
  if (count == 0) {
    refuse(FWL_ERROR_ARGUMENT, "there are no targets; expected one row or more");
  }
  const std::vector<size_t> all = chosen(targets, count);
  put(all, std::vector<RowState>(all.size(), row_state(source)));
}

void Session::read_row(size_t row, void* state, size_t size) {
  const std::lock_guard<std::mutex> lock(mutex_);
  chosen(&row, 1);
  const RowState found = row_state(row);
  if (state == nullptr) {
    refuse(FWL_ERROR_ARGUMENT, "state is NULL");
  }
  if (size != found.size()) {
    refuse(FWL_ERROR_ARGUMENT, "the state of a row has " + std::to_string(found.size()) +
                                   " bytes, but there is room for " + std::to_string(size));
  }
  std::memcpy(state, found.data(), size);
}

void Session::write_row(size_t row, const void* state, size_t size) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<size_t> rows = chosen(&row, 1);
  if (state == nullptr) {
    refuse(FWL_ERROR_ARGUMENT, "state is NULL");
  }
  if (size != model_->bundle.state_bytes()) {
    refuse(FWL_ERROR_ARGUMENT, "the state has " + std::to_string(size) + " bytes; expected " +
                                   std::to_string(model_->bundle.state_bytes()));
  }
  const char* const bytes = static_cast<const char*>(state);
  const RowState given(bytes, bytes + size);
  check_state(model_->bundle, given, "row " + std::to_string(row));
  check_given(given, "row " + std::to_string(row));
  put(rows, {given});
}

void Session::save(const std::string& path, const size_t* rows, size_t count) {
  std::vector<RowState> states;
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (const size_t row : chosen(rows, count)) {
      states.push_back(row_state(row));
    }
  }
  save_state(path, model_->bundle, states);
}

void Session::load(const std::string& path, const size_t* rows, size_t count) {
  const std::vector<size_t> all = chosen(rows, count);
  const std::vector<RowState> states = load_state(path, model_->bundle, all.size());
  const std::lock_guard<std::mutex> lock(mutex_);
  for (size_t n = 0; n < states.size(); ++n) {
    check_given(states[n], "'" + path + "', row " + std::to_string(n));
  }
  put(all, states);
}

std::vector<size_t> Session::chosen(const size_t* rows, size_t count) const {
  std::vector<size_t> all;
  if (rows != nullptr && count == 0) {
    refuse(FWL_ERROR_ARGUMENT, "count is 0, but rows is not NULL; pass NULL and 0 for all rows");
  }
  if (rows == nullptr) {
    if (count > 0) {
      refuse(FWL_ERROR_ARGUMENT, "rows is NULL, but count is " + std::to_string(count));
    }
    for (size_t r = 0; r < rows_; ++r) {
      all.push_back(r);
    }
    return all;
  }
  all.assign(rows, rows + count);
  for (const size_t row : all) {
    if (row >= rows_) {
      refuse(FWL_ERROR_ARGUMENT, "row " + std::to_string(row) + " does not exist; expected 0 to " +
                                     std::to_string(rows_ - 1));
    }
  }
  if (std::set<size_t>(all.begin(), all.end()).size() < all.size()) {
    refuse(FWL_ERROR_ARGUMENT, "a row is named twice; name every row once");
  }
  return all;
}

RowState Session::row_state(size_t row) const {
  RowState state(model_->bundle.state_bytes());
  current_->read(row, state.data());
  return state;
}

// Writes states, which the caller has checked, to rows. If writing fails, all rows stay as they
// were.
void Session::put(const std::vector<size_t>& rows, const std::vector<RowState>& states) {
  Buffers& target = current_->writable(*spare_);
  for (size_t n = 0; n < rows.size(); ++n) {
    target.write(rows[n], states[n].data());
  }
  if (&target == spare_.get()) {
    std::swap(current_, spare_);
  }
  for (size_t n = 0; n < rows.size(); ++n) {
    std::memcpy(&positions_[rows[n]], states[n].data(), sizeof(int64_t)); // its first tensor
  }
}

} // namespace fwl::internal
