// A session: rows of state and the calls that move them on; see fwl_export/runtimes/session.py.
#pragma once

#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "backend.h"
#include "fwl/fwl.h"
#include "state_file.h"

namespace fwl::internal {

struct Model {
  Bundle bundle;
  std::shared_ptr<const Backend> backend;
};

class Session {
public:
  Session(std::shared_ptr<const Model> model, size_t rows);

  void feed(const int64_t* tokens, size_t count, const float* label_weights, const int64_t* lengths,
            fwl_logits which, float* logits, size_t logits_size);
  std::vector<int64_t> positions();
  void set_learning_rate_scale(const float* scale);
  void reset(const size_t* rows, size_t count);
  void fork(size_t source, const size_t* targets, size_t count);
  void read_row(size_t row, void* state, size_t size);
  void write_row(size_t row, const void* state, size_t size);
  void save(const std::string& path, const size_t* rows, size_t count);
  void load(const std::string& path, const size_t* rows, size_t count);

private:
  void check(const int64_t* tokens, size_t count, const float* label_weights,
             const int64_t* lengths) const;
  void fill(const int64_t* tokens, size_t count, const float* label_weights,
            const std::vector<int64_t>& lengths, const std::vector<int64_t>& done,
            fwl_logits which);
  std::vector<size_t> chosen(const size_t* rows, size_t count) const;
  RowState row_state(size_t row) const;
  void put(const std::vector<size_t>& rows, const std::vector<RowState>& states);

  std::mutex mutex_;
  std::shared_ptr<const Model> model_;
  size_t rows_;
  std::unique_ptr<Runner> runner_;
  std::unique_ptr<Buffers> current_, spare_;
  int64_t max_tokens_ = 0; // of a call
  std::vector<int64_t> positions_;
  Call call_;
  std::vector<float> found_;
};

} // namespace fwl::internal
