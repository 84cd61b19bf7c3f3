// A session: rows of state and the calls that move them on. fwl.h documents the public functions;
// the Python twin is fwl_export/runtimes/session.py.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "fwl/fwl.h"
#include "limits.h"
#include "runtime.h"
#include "state_file.h"

namespace fwl::internal {

// A bundle, the runtime that has loaded it, and how much its sessions may learn.
struct Model {
  Bundle bundle;
  std::shared_ptr<const Runtime> runtime;
  Limits limits;
};

class Session {
public:
  Session(std::shared_ptr<const Model> model, size_t rows);

  void feed(const int64_t* tokens, size_t count, const float* label_weights, const int64_t* lengths,
            fwl_logits which, float* logits, size_t logits_size);
  std::vector<int64_t> positions();
  void set_learning_rate_scale(const float* scale);
  std::vector<double> learned(); // the norm of what each row has learned
  void reset(const size_t* rows, size_t count);
  void fork(size_t source, const size_t* targets, size_t count);
  void read_row(size_t row, void* state, size_t size);
  void write_row(size_t row, const void* state, size_t size);
  void save(const std::string& path, const size_t* rows, size_t count);
  void load(const std::string& path, const size_t* rows, size_t count);

private:
  struct Text;
  struct Progress;

  void check_tokens(const int64_t* tokens, size_t count, const float* label_weights,
                    const int64_t* lengths) const;
  void check_weight(const int64_t* tokens, const float* label_weights, size_t count, size_t row,
                    size_t column) const;
  void clip(const Progress& progress, Buffers& present) const;
  void check_norms(const Buffers& present) const;
  void check_given(const RowState& state, const std::string& source) const;
  void check_room(size_t count, fwl_logits which, const float* logits, size_t size) const;
  void check_positions(const std::vector<int64_t>& total) const;
  void set_next_lengths(Progress& progress) const;
  void fill_call(const Text& text, const Progress& progress);
  void check_output(const Progress& progress);
  [[noreturn]] void refuse_output(size_t row, int64_t at, const Progress& progress) const;
  void collect(const Text& text, const Progress& progress, std::vector<float>& results);
  std::vector<size_t> chosen(const size_t* rows, size_t count) const;
  RowState row_state(size_t row) const;
  void put(const std::vector<size_t>& rows, const std::vector<RowState>& states);

  std::mutex mutex_;
  std::shared_ptr<const Model> model_;
  size_t rows_;
  std::unique_ptr<Runner> runner_;
  std::unique_ptr<Buffers> current_, spare_; // the state, and where the next call writes
  int64_t max_tokens_ = 0;                   // the most tokens per row of one call
  std::vector<int64_t> positions_;
  Call call_;                // kept, with its memory, from call to call
  std::vector<float> found_; // the logits of the last call
};

} // namespace fwl::internal
