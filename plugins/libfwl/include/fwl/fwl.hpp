/**
 * @file
 * libfwl for C++17: fwl.h with RAII, vectors and exceptions.
 *
 *     const fwl::Model model("bundle");
 *     fwl::Session session = model.session();
 *     const std::vector<float> logits = session.feed(ids); // [V], after the last id
 *
 * Every function does what the function of the same name in fwl.h does, which documents arguments,
 * shapes and statuses. Functions throw fwl::Error for a status other than FWL_OK, and
 * std::invalid_argument for vectors whose sizes do not fit the session. If a function throws, no
 * row has moved.
 */
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fwl/fwl.h"

namespace fwl {

/** A status other than FWL_OK; what() is the message. */
class Error : public std::runtime_error {
public:
  explicit Error(const fwl_error& error)
      : std::runtime_error(error.message), status_(error.status) {}
  fwl_status status() const noexcept { return status_; }

private:
  fwl_status status_;
};

/** How to open a model; the fields of fwl_options. Empty strings stand for NULL. */
struct Options {
  std::string runtime_library; /**< Path of libonnxruntime.so. Empty: search for it by name. */
  std::string plugin;          /**< Path of libfwl_ort.so. Empty: use standard operators only. */
  int threads = 0;             /**< Threads inside an operator. 0: ONNX Runtime chooses. */
  std::string backend = "onnxruntime"; /**< The runtime: "onnxruntime", "tensorrt" or "auto". */
  int device = 0;                      /**< Number of the GPU, from 0. */
  std::string tensorrt_library;        /**< Path of libnvinfer.so. Empty: search for it by name. */
  std::string tensorrt_plugin;         /**< Path of libfwl_trt.so. Empty: the one beside libfwl. */
  bool allow_embedded_plugin = false;  /**< Run code that an engine carries; see fwl_options. */
  double max_learning_weight = 0;      /**< Limit of weight times scale. 0: 10; see fwl_options. */
  double max_update_norm = 0;          /**< Limit of what a row has learned. 0: none. */
  double clip_update_norm = 0;         /**< Norm that what a row has learned keeps. 0: any. */
};

namespace detail {

template <class Function, class... Arguments>
void call(Function* function, Arguments... arguments) {
  fwl_error error;
  if (function(arguments..., &error) != FWL_OK) {
    throw Error(error);
  }
}

// Returns a pointer that is not NULL even for an empty vector, since NULL stands for all rows.
inline const size_t* some(const std::vector<size_t>& rows) {
  static const size_t none = 0;
  return rows.empty() ? &none : rows.data();
}

} // namespace detail

/** Rows of independent texts on a model. Movable, not copyable; open one with Model::session. */
class Session {
public:
  Session(Session&& other) noexcept { *this = std::move(other); }
  Session& operator=(Session&& other) noexcept {
    std::swap(handle_, other.handle_);
    rows_ = other.rows_;
    vocab_size_ = other.vocab_size_;
    state_bytes_ = other.state_bytes_;
    return *this;
  }
  ~Session() { fwl_session_close(handle_); }

  /**
   * Reads the next tokens of every row.
   *
   * @param ids            [rows, count] token ids; count is ids.size() / rows.
   * @param which          Which logits to return.
   * @param label_weights  [rows, count] how much to learn from each token. Empty: 1 everywhere.
   * @param lengths        [rows] number of real tokens in each row. Empty: count everywhere.
   * @return [rows, V] logits with FWL_LOGITS_LAST, [rows, count, V] with FWL_LOGITS_ALL, else none.
   */
  std::vector<float> feed(const std::vector<int64_t>& ids, fwl_logits which = FWL_LOGITS_LAST,
                          const std::vector<float>& label_weights = {},
                          const std::vector<int64_t>& lengths = {}) {
    const size_t count = ids.size() / rows_;
    if (ids.empty() || count * rows_ != ids.size() ||
        (!label_weights.empty() && label_weights.size() != ids.size()) ||
        (!lengths.empty() && lengths.size() != rows_)) {
      throw std::invalid_argument("ids, label_weights and lengths must have as many rows as the "
                                  "session, and one token or more");
    }
    const size_t predictions = which == FWL_LOGITS_NONE   ? 0
                               : which == FWL_LOGITS_LAST ? rows_
                                                          : ids.size();
    std::vector<float> logits(predictions * vocab_size_);
    detail::call(fwl_session_feed, handle_, ids.data(), count,
                 label_weights.empty() ? nullptr : label_weights.data(),
                 lengths.empty() ? nullptr : lengths.data(), which, logits.data(), logits.size());
    return logits;
  }

  /** Returns how many tokens each row has read, [rows]. */
  std::vector<int64_t> positions() const {
    std::vector<int64_t> found(rows_);
    detail::call(fwl_session_positions, handle_, found.data());
    return found;
  }

  /** Sets the factors, [rows], by which the learning rates are multiplied from now on. */
  void set_learning_rate_scale(const std::vector<float>& scale) {
    if (scale.size() != rows_) {
      throw std::invalid_argument("learning_rate_scale must have one number for each row");
    }
    detail::call(fwl_session_set_learning_rate_scale, handle_, scale.data());
  }

  /** Returns the norm of what each row has learned, [rows]. */
  std::vector<double> learned() const {
    std::vector<double> found(rows_);
    detail::call(fwl_session_learned, handle_, found.data());
    return found;
  }

  /** Makes all rows fresh. */
  void reset() { detail::call(fwl_session_reset, handle_, nullptr, size_t{0}); }
  /** Makes the given rows fresh; at least one. */
  void reset(const std::vector<size_t>& rows) {
    detail::call(fwl_session_reset, handle_, detail::some(rows), rows.size());
  }
  /** Saves the state of all rows to a file. */
  void save_state(const std::string& path) const {
    detail::call(fwl_session_save_state, handle_, path.c_str(), nullptr, size_t{0});
  }
  /** Saves the state of the given rows, at least one, to a file. */
  void save_state(const std::string& path, const std::vector<size_t>& rows) const {
    detail::call(fwl_session_save_state, handle_, path.c_str(), detail::some(rows), rows.size());
  }
  /** Loads a file with as many rows as the session has. */
  void load_state(const std::string& path) {
    detail::call(fwl_session_load_state, handle_, path.c_str(), nullptr, size_t{0});
  }
  /** Loads a file with as many rows as are given; its first row goes to rows[0], and so on. */
  void load_state(const std::string& path, const std::vector<size_t>& rows) {
    detail::call(fwl_session_load_state, handle_, path.c_str(), detail::some(rows), rows.size());
  }

  /** Copies the state of a row to other rows, at least one. */
  void fork(size_t source, const std::vector<size_t>& targets) {
    detail::call(fwl_session_fork, handle_, source, targets.data(), targets.size());
  }
  /** Returns a copy of a row's state, which write_row puts into any row of the same model. */
  std::vector<char> read_row(size_t row) const {
    std::vector<char> state(state_bytes_);
    detail::call(fwl_session_read_row, handle_, row, static_cast<void*>(state.data()),
                 state.size());
    return state;
  }
  /** Replaces a row's state by one that read_row has returned. */
  void write_row(size_t row, const std::vector<char>& state) {
    detail::call(fwl_session_write_row, handle_, row, static_cast<const void*>(state.data()),
                 state.size());
  }

  size_t rows() const noexcept { return rows_; }
  size_t vocab_size() const noexcept { return vocab_size_; }

private:
  friend class Model;
  Session(fwl_session* handle, size_t rows, const fwl_info& info)
      : handle_(handle), rows_(rows), vocab_size_(static_cast<size_t>(info.vocab_size)),
        state_bytes_(info.state_bytes) {}

  fwl_session* handle_ = nullptr;
  size_t rows_ = 0;
  size_t vocab_size_ = 0;
  size_t state_bytes_ = 0;
};

/** A loaded bundle. Movable, not copyable. Its sessions may outlive it. */
class Model {
public:
  /** Checks and loads the bundle in a folder. Also throws std::runtime_error if the library that
   * runs has another ABI version than fwl.h. */
  explicit Model(const std::string& bundle, const Options& options = {}) {
    if (fwl_abi_version() != FWL_ABI_VERSION) {
      throw std::runtime_error("libfwl has the ABI version " + std::to_string(fwl_abi_version()) +
                               ", but fwl.h has " + std::to_string(FWL_ABI_VERSION) +
                               "; install a library and a header of one release");
    }
    fwl_options raw;
    fwl_options_init(&raw, sizeof(raw));
    const auto text = [](const std::string& value) {
      return value.empty() ? nullptr : value.c_str();
    };
    raw.backend = options.backend.c_str();
    raw.runtime_library = text(options.runtime_library);
    raw.plugin = text(options.plugin);
    raw.threads = options.threads;
    raw.device = options.device;
    raw.tensorrt_library = text(options.tensorrt_library);
    raw.tensorrt_plugin = text(options.tensorrt_plugin);
    raw.allow_embedded_plugin = options.allow_embedded_plugin;
    raw.max_learning_weight = options.max_learning_weight;
    raw.max_update_norm = options.max_update_norm;
    raw.clip_update_norm = options.clip_update_norm;
    detail::call(fwl_model_open, bundle.c_str(), static_cast<const fwl_options*>(&raw), &handle_);
  }
  Model(Model&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Model& operator=(Model&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Model() { fwl_model_close(handle_); }

  /** Describes the model. */
  fwl_info info() const {
    fwl_info found;
    found.size = sizeof(found);
    detail::call(fwl_model_info, static_cast<const fwl_model*>(handle_), &found);
    return found;
  }

  /** Opens a session of fresh rows, 1 or more. */
  Session session(size_t rows = 1) const {
    fwl_session* opened = nullptr;
    detail::call(fwl_session_open, handle_, rows, &opened);
    return Session(opened, rows, info());
  }

private:
  fwl_model* handle_ = nullptr;
};

} // namespace fwl
