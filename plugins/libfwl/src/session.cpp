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

// Tells the runner that buffers are about to go, however a call ends.
struct Forget {
  ~Forget() {
    if (buffers != nullptr) {
      runner.release(*buffers);
    }
  }
  Runner& runner;
  std::unique_ptr<Buffers>& buffers;
};

} // namespace

Session::Session(std::shared_ptr<const Model> model, size_t rows)
    : model_(std::move(model)), rows_(rows) {
  if (rows < 1 || rows > (1u << 20)) {
    refuse(FWL_ERROR_ARGUMENT, "rows is " + std::to_string(rows) + "; expected 1 or more");
  }
  runner_ = model_->backend->runner(rows);
  current_ = runner_->buffers();
  spare_ = runner_->buffers();
  max_tokens_ = std::min(model_->bundle.max_tokens, model_->backend->max_tokens());
  positions_.assign(rows, 0);
  call_.learning_rate_scale.assign(rows, 1.0f);
}

void Session::feed(const int64_t* tokens, size_t count, const float* label_weights,
                   const int64_t* lengths, fwl_logits which, float* logits, size_t logits_size) {
  const std::lock_guard<std::mutex> lock(mutex_);
  check(tokens, count, label_weights, lengths);
  const auto vocabulary = static_cast<size_t>(model_->bundle.vocab_size);
  const size_t predictions = which == FWL_LOGITS_ALL    ? rows_ * count
                             : which == FWL_LOGITS_LAST ? rows_
                                                        : 0;
  if (which < FWL_LOGITS_NONE || which > FWL_LOGITS_ALL) {
    refuse(FWL_ERROR_ARGUMENT, "which is " + std::to_string(which) + "; expected 0, 1 or 2");
  }
  if (predictions > 0 && logits == nullptr) {
    refuse(FWL_ERROR_ARGUMENT, "logits is NULL");
  }
  if (logits_size < predictions * vocabulary) {
    refuse(FWL_ERROR_ARGUMENT, "logits has room for " + std::to_string(logits_size) +
                                   " floats; expected " + std::to_string(predictions * vocabulary));
  }
  std::vector<int64_t> left(rows_, static_cast<int64_t>(count)), done(rows_, 0), here(rows_);
  if (lengths != nullptr) {
    left.assign(lengths, lengths + rows_);
  }
  const std::vector<int64_t> total = left;
  const int64_t limit = model_->bundle.max_positions;
  for (size_t r = 0; r < rows_ && limit > 0; ++r) {
    if (total[r] > limit - positions_[r]) {
      refuse(FWL_ERROR_TOKEN, "row " + std::to_string(r) + " has read " +
                                  std::to_string(positions_[r]) + " tokens and is to read " +
                                  std::to_string(total[r]) + " more, but this model takes " +
                                  std::to_string(limit) +
                                  " at most; reset the row, or read a shorter text");
    }
  }
  // Logits are only written once all has gone well; one call's need no copy of their own.
  std::vector<float> results;
  std::unique_ptr<Buffers> intermediate; // the past of a later call, then its successor's present
  const Forget forget{*runner_, intermediate};
  Buffers* past = current_.get();
  Buffers* present = spare_.get();
  for (bool first = true;; first = false) {
    for (size_t r = 0; r < rows_; ++r) {
      int64_t room = std::min(left[r], max_tokens_);
      if (const int64_t interval = model_->bundle.anchor_interval; interval > 0) {
        room = std::min(room, interval - (positions_[r] + done[r]) % interval);
      }
      here[r] = room;
    }
    fill(tokens, count, label_weights, here, done, which);
    runner_->run(call_, *past, *present, found_);
    for (size_t r = 0; r < rows_; ++r) {
      for (size_t p = 0; p < call_.positions; ++p) {
        float* const values = found_.data() + (r * call_.positions + p) * vocabulary;
        const int64_t at = call_.logit_positions[r * call_.positions + p];
        if (at >= here[r]) {
          std::fill(values, values + vocabulary, 0.0f);
        } else if (!std::all_of(values, values + vocabulary,
                                [](float x) { return std::isfinite(x); })) {
          refuse(FWL_ERROR_TOKEN, "the model's output is not finite at row " + std::to_string(r) +
                                      ", position " + std::to_string(done[r] + at) +
                                      "; no row has moved: reset the row, or feed it with smaller "
                                      "label_weights");
        }
      }
    }
    for (size_t r = 0; r < rows_; ++r) {
      left[r] -= here[r];
    }
    const bool last = std::all_of(left.begin(), left.end(), [](int64_t n) { return n == 0; });
    if (first && last && predictions > 0 && found_.size() == predictions * vocabulary) {
      results.swap(found_);
    } else if (predictions > 0) {
      results.resize(predictions * vocabulary);
      for (size_t r = 0; r < rows_; ++r) {
        if (which == FWL_LOGITS_LAST && here[r] > 0) {
          std::copy_n(found_.begin() + static_cast<ptrdiff_t>(r * vocabulary), vocabulary,
                      results.begin() + static_cast<ptrdiff_t>(r * vocabulary));
        } else if (which == FWL_LOGITS_ALL) {
          std::copy_n(
              found_.begin() + static_cast<ptrdiff_t>(r * call_.positions * vocabulary),
              static_cast<size_t>(here[r]) * vocabulary,
              results.begin() +
                  static_cast<ptrdiff_t>((r * count + static_cast<size_t>(done[r])) * vocabulary));
        }
      }
    }
    for (size_t r = 0; r < rows_; ++r) {
      done[r] += here[r];
    }
    if (last) {
      break;
    }
    // The current buffers stay as they are until the end.
    if (first) {
      intermediate = runner_->buffers();
      past = present;
      present = intermediate.get();
    } else {
      std::swap(past, present);
    }
  }
  // From here on nothing fails.
  std::swap(present == intermediate.get() ? intermediate : spare_, current_);
  for (size_t r = 0; r < rows_; ++r) {
    positions_[r] += total[r];
  }
  std::copy(results.begin(), results.end(), logits);
  if (results.capacity() > found_.capacity()) {
    results.swap(found_); // its memory serves the next call
  }
}

void Session::check(const int64_t* tokens, size_t count, const float* label_weights,
                    const int64_t* lengths) const {
  if (tokens == nullptr || count < 1) {
    refuse(FWL_ERROR_ARGUMENT,
           "there are no tokens; expected [rows, count] with count of 1 or more");
  }
  if (count > SIZE_MAX / sizeof(float) / rows_ / static_cast<size_t>(model_->bundle.vocab_size)) {
    refuse(FWL_ERROR_ARGUMENT, "count is " + std::to_string(count) + "; that many do not fit");
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
        const float weight = label_weights[r * count + i];
        if (!std::isfinite(weight) || weight < 0) {
          refuse(FWL_ERROR_TOKEN, "label_weights must be finite and 0 or more");
        }
      }
    }
  }
}

void Session::fill(const int64_t* tokens, size_t count, const float* label_weights,
                   const std::vector<int64_t>& lengths, const std::vector<int64_t>& done,
                   fwl_logits which) {
  const auto longest =
      static_cast<size_t>(std::max<int64_t>(1, *std::max_element(lengths.begin(), lengths.end())));
  call_.tokens = longest;
  call_.positions = which == FWL_LOGITS_ALL ? longest : 1;
  call_.input_ids.assign(rows_ * longest, 0);
  call_.label_weights.assign(rows_ * longest, 0.0f);
  call_.logit_positions.resize(rows_ * call_.positions);
  call_.lengths = lengths;
  for (size_t r = 0; r < rows_; ++r) {
    const size_t start = r * count + static_cast<size_t>(done[r]);
    for (size_t i = 0; i < static_cast<size_t>(lengths[r]); ++i) {
      call_.input_ids[r * longest + i] = tokens[start + i];
      call_.label_weights[r * longest + i] =
          label_weights == nullptr ? 1.0f : label_weights[start + i];
    }
    for (size_t p = 0; p < call_.positions; ++p) {
      call_.logit_positions[r * call_.positions + p] =
          which == FWL_LOGITS_ALL ? static_cast<int64_t>(p) : std::max<int64_t>(lengths[r] - 1, 0);
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
  call_.learning_rate_scale.assign(scale, scale + rows_);
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
    refuse(FWL_ERROR_ARGUMENT, "there are no targets");
  }
  const std::vector<size_t> all = chosen(targets, count);
  put(all, std::vector<RowState>(all.size(), row_state(source)));
}

void Session::read_row(size_t row, void* state, size_t size) {
  const std::lock_guard<std::mutex> lock(mutex_);
  chosen(&row, 1);
  const RowState found = row_state(row);
  if (state == nullptr || size != found.size()) {
    refuse(FWL_ERROR_ARGUMENT, "the state of a row has " + std::to_string(found.size()) +
                                   " bytes, but there is room for " + std::to_string(size));
  }
  std::memcpy(state, found.data(), size);
}

void Session::write_row(size_t row, const void* state, size_t size) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<size_t> rows = chosen(&row, 1);
  if (state == nullptr || size != model_->bundle.state_bytes()) {
    refuse(FWL_ERROR_ARGUMENT, "the state has " + std::to_string(size) + " bytes; expected " +
                                   std::to_string(model_->bundle.state_bytes()));
  }
  const char* const bytes = static_cast<const char*>(state);
  const RowState given(bytes, bytes + size);
  check_state(model_->bundle, given, "row " + std::to_string(row));
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
  const std::vector<RowState> states = load_state(path, model_->bundle);
  const std::lock_guard<std::mutex> lock(mutex_);
  const std::vector<size_t> all = chosen(rows, count);
  if (states.size() != all.size()) {
    refuse(FWL_ERROR_ARGUMENT, "'" + path + "' holds " + std::to_string(states.size()) +
                                   " rows, but " + std::to_string(all.size()) +
                                   " are to be loaded");
  }
  put(all, states);
}

std::vector<size_t> Session::chosen(const size_t* rows, size_t count) const {
  std::vector<size_t> all;
  if (rows != nullptr && count == 0) {
    refuse(FWL_ERROR_ARGUMENT, "there are no rows; for all of them rows is NULL");
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
    refuse(FWL_ERROR_ARGUMENT, "a row is named twice");
  }
  return all;
}

RowState Session::row_state(size_t row) const {
  RowState state(model_->bundle.state_bytes());
  current_->read(row, state.data());
  return state;
}

// The states were checked. Where writing can fail, the rows are as before until all is written.
void Session::put(const std::vector<size_t>& rows, const std::vector<RowState>& states) {
  Buffers& target = current_->writable(*spare_);
  for (size_t n = 0; n < rows.size(); ++n) {
    target.write(rows[n], states[n].data());
  }
  if (&target == spare_.get()) {
    std::swap(current_, spare_);
  }
  for (size_t n = 0; n < rows.size(); ++n) {
    std::memcpy(&positions_[rows[n]], states[n].data(), sizeof(int64_t)); // the first tensor
  }
}

} // namespace fwl::internal
