#include "state_file.h"

#include <dirent.h>
#include <fcntl.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <memory>
#include <nlohmann/json.hpp>

#include "error.h"

namespace fwl::internal {
namespace {

using nlohmann::json;
namespace fs = std::filesystem;

constexpr char kFormat[] = "fwl-state";
constexpr char kVersion[] = "1";

// Endings of the names of tensors that stand for a compressed one.
constexpr char kHalf[] = ".half", kScale[] = ".scale";
constexpr char kLeft[] = ".left", kRight[] = ".right";
constexpr char kUsed[] = ".used";

const char* safetensors_type(Type type) {
  return type == Type::kFloat32 ? "F32" : type == Type::kFloat16 ? "F16" : "I64";
}

std::string reason() {
  return std::strerror(errno);
}

// A temporary file beside the target. `commit` renames it to the target; without that it is
// removed. Temporary files that killed processes have left behind are removed first.
class Replacement {
public:
  explicit Replacement(const std::string& target) : target_(target) {
    std::error_code absent;
    const fs::path real = fs::canonical(target, absent);
    if (!absent) { // follow links, so that a link stays a link
      target_ = real.string();
      if (!fs::is_regular_file(real, absent)) {
        throw Failure(FWL_ERROR_IO, "cannot write '" + target + "': it is not a regular file");
      }
    }
    remove_leftovers();
    do { // the name may be taken: processes in other containers can have the same id
      path_ = target_ + "." + std::to_string(getpid()) + "." + std::to_string(++count()) + ".tmp";
      file_ = open(path_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
    } while (file_ < 0 && errno == EEXIST);
    if (file_ < 0) {
      fail();
    }
  }
  ~Replacement() {
    if (file_ >= 0) {
      close(file_);
    }
    if (!renamed_) {
      unlink(path_.c_str());
    }
  }

  void write(const char* data, size_t size) {
    while (size > 0) {
      const ssize_t count = ::write(file_, data, size);
      if (count < 0 && errno == EINTR) {
        continue;
      }
      if (count < 0) {
        fail();
      }
      data += count;
      size -= static_cast<size_t>(count);
    }
  }

  void commit() {
    const int file = file_;
    file_ = -1;
    if (close(file) != 0 || std::rename(path_.c_str(), target_.c_str()) != 0) {
      fail();
    }
    renamed_ = true;
  }

private:
  // A counter that makes names differ between the threads of a process.
  static std::atomic<unsigned>& count() {
    static std::atomic<unsigned> value{0};
    return value;
  }
  void remove_leftovers() const {
    const size_t slash = target_.rfind('/') + 1; // 0 if there is none
    const std::string folder = slash == 0 ? "." : target_.substr(0, slash);
    const std::string prefix = target_.substr(slash) + ".";
    const std::unique_ptr<DIR, int (*)(DIR*)> entries(opendir(folder.c_str()), closedir);
    while (const dirent* const entry = entries ? readdir(entries.get()) : nullptr) {
      long process = 0;
      int end = 0;
      if (std::strncmp(entry->d_name, prefix.c_str(), prefix.size()) == 0 &&
          std::sscanf(entry->d_name + prefix.size(), "%ld.%*u.tmp%n", &process, &end) == 1 &&
          end > 0 && entry->d_name[prefix.size() + static_cast<size_t>(end)] == '\0' &&
          process > 0 && kill(static_cast<pid_t>(process), 0) != 0 && errno == ESRCH) {
        unlink((target_.substr(0, slash) + entry->d_name).c_str());
      }
    }
  }
  [[noreturn]] void fail() const {
    const std::string why = reason();
    throw Failure(FWL_ERROR_IO, "cannot write '" + target_ + "': " + why);
  }

  std::string target_;
  std::string path_;
  int file_ = -1;
  bool renamed_ = false;
};

// Returns where tensor `index` starts in a row's state.
size_t row_offset(const Bundle& bundle, size_t index) {
  size_t offset = 0;
  for (size_t i = 0; i < index; ++i) {
    offset += bundle.state[i].bytes();
  }
  return offset;
}

// Returns how many tokens a row has read: the first tensor of its state.
int64_t position_of(const RowState& row) {
  int64_t position;
  std::memcpy(&position, row.data(), sizeof(position));
  return position;
}

// The content of a safetensors file, with its header checked.
class Tensors {
public:
  Tensors(const std::string& path, std::string content)
      : path_(path), content_(std::move(content)) {
    uint64_t size = 0;
    if (content_.size() < sizeof(size)) {
      damaged("it has no header");
    }
    std::memcpy(&size, content_.data(), sizeof(size));
    if (size > content_.size() - sizeof(size)) {
      damaged("its header is truncated");
    }
    start_ = sizeof(size) + size;
    try {
      header_ = json::parse(content_.data() + sizeof(size), content_.data() + start_);
      if (!header_.is_object()) {
        damaged("its header is not an object");
      }
      uint64_t end = 0;
      for (const auto& [name, entry] : header_.items()) {
        if (name == "__metadata__") {
          metadata = entry;
          continue;
        }
        const uint64_t first = entry.at("data_offsets").at(0),
                       last = entry.at("data_offsets").at(1);
        if (first > last || last > content_.size() - start_) {
          damaged("tensor '" + name + "' is truncated");
        }
        end = std::max(end, last);
      }
      if (end != content_.size() - start_) {
        damaged("bytes follow its tensors");
      }
    } catch (const json::exception& error) {
      damaged(printable(error.what()));
    }
  }

  bool has(const std::string& name) const { return header_.contains(name); }

  std::vector<int64_t> shape(const std::string& name) const { return header_.at(name).at("shape"); }

  // Returns the bytes of a tensor, after checking its type, shape and size.
  const char* data(const std::string& name, const char* type,
                   const std::vector<int64_t>& shape) const {
    const json& entry = header_.at(name);
    uint64_t bytes = std::strcmp(type, "I64") == 0 ? 8 : std::strcmp(type, "F32") == 0 ? 4 : 2;
    for (const int64_t size : shape) {
      bytes *= static_cast<uint64_t>(size);
    }
    const uint64_t first = entry.at("data_offsets").at(0), last = entry.at("data_offsets").at(1);
    if (entry.at("dtype") != type || entry.at("shape") != json(shape) || last - first != bytes) {
      throw Failure(FWL_ERROR_STATE, "'" + path_ + "': state '" + name + "' is " +
                                         entry.at("dtype").dump() + entry.at("shape").dump() +
                                         ", but the model says " + type + json(shape).dump() +
                                         "; was it saved from another model?");
    }
    return content_.data() + start_ + first;
  }

  [[noreturn]] void damaged(const std::string& why) const {
    throw Failure(FWL_ERROR_STATE, "'" + path_ +
                                       "' is not a state file, or was truncated or changed (" +
                                       why + "); save it again");
  }

  json metadata = json::object();

private:
  std::string path_;
  std::string content_;
  json header_;
  size_t start_ = 0;
};

float float_at(const char* data, size_t index) {
  float value;
  std::memcpy(&value, data + index * sizeof(value), sizeof(value));
  return value;
}

std::vector<int64_t> with_rows(size_t rows, const std::vector<int64_t>& shape) {
  std::vector<int64_t> all{static_cast<int64_t>(rows)};
  all.insert(all.end(), shape.begin(), shape.end());
  return all;
}

// Where one tensor of every row is restored to: `offset` bytes into the row's state.
struct Target {
  char* row(size_t r) const { return rows[r].data() + offset; }

  std::vector<RowState>& rows;
  size_t offset;
};

// Restores a tensor that was saved as it is.
void restore_plain(const Tensors& file, const TensorSpec& spec, const Target& target) {
  const size_t bytes = spec.bytes(), rows = target.rows.size();
  const char* data = file.data(spec.name, safetensors_type(spec.type), with_rows(rows, spec.shape));
  for (size_t r = 0; r < rows; ++r) {
    std::memcpy(target.row(r), data + r * bytes, bytes);
  }
}

// Restores a float32 tensor that was saved as float16 values and one scale for each row.
void restore_halves(const Tensors& file, const TensorSpec& spec, const Target& target) {
  const size_t elements = spec.elements(), rows = target.rows.size();
  const char* halves = file.data(spec.name + kHalf, "F16", with_rows(rows, spec.shape));
  const char* scales = file.data(spec.name + kScale, "F32", {static_cast<int64_t>(rows)});
  std::vector<float> values(elements);
  for (size_t r = 0; r < rows; ++r) {
    for (size_t i = 0; i < elements; ++i) {
      uint16_t bits;
      std::memcpy(&bits, halves + (r * elements + i) * sizeof(bits), sizeof(bits));
      values[i] = from_half(bits) * float_at(scales, r);
    }
    std::memcpy(target.row(r), values.data(), spec.bytes());
  }
}

// Restores a float32 matrix [K, V] that was saved as factors [K, rank] and [rank, V] of each row.
void restore_factors(const Tensors& file, const TensorSpec& spec, const Target& target) {
  const size_t rows = target.rows.size();
  const std::vector<int64_t> shape = file.shape(spec.name + kLeft);
  const int64_t rank = shape.empty() ? 0 : shape.back();
  if (rank < 1 || rank > spec.shape[0] + spec.shape[1]) {
    file.damaged("the factors of '" + spec.name + "' have rank " + std::to_string(rank));
  }
  const auto size_k = static_cast<size_t>(spec.shape[0]);
  const auto size_v = static_cast<size_t>(spec.shape[1]);
  const auto size_r = static_cast<size_t>(rank);
  const char* left = file.data(spec.name + kLeft, "F32", with_rows(rows, {spec.shape[0], rank}));
  const char* right = file.data(spec.name + kRight, "F32", with_rows(rows, {rank, spec.shape[1]}));
  std::vector<float> values(size_k * size_v);
  for (size_t r = 0; r < rows; ++r) {
    std::fill(values.begin(), values.end(), 0.0f);
    for (size_t k = 0; k < size_k; ++k) {
      for (size_t j = 0; j < size_r; ++j) {
        const float factor = float_at(left, (r * size_k + k) * size_r + j);
        for (size_t v = 0; v < size_v; ++v) {
          values[k * size_v + v] += factor * float_at(right, (r * size_r + j) * size_v + v);
        }
      }
    }
    std::memcpy(target.row(r), values.data(), spec.bytes());
  }
}

// Restores a cache [heads, slots, size] of which only the slots in use were saved; the others are
// zeros.
void restore_used(const Tensors& file, const TensorSpec& spec, const Target& target) {
  const size_t rows = target.rows.size();
  const std::vector<int64_t> shape = file.shape(spec.name + kUsed);
  const int64_t used = shape.size() == 4 ? shape[2] : -1;
  if (used < 0 || used > spec.shape[1]) {
    file.damaged("'" + spec.name + kUsed + "' does not fit the model");
  }
  const char* data = file.data(spec.name + kUsed, safetensors_type(spec.type),
                               with_rows(rows, {spec.shape[0], used, spec.shape[2]}));
  const size_t slot = static_cast<size_t>(spec.shape[2]) * bytes_of(spec.type);
  const size_t filled = static_cast<size_t>(used) * slot;
  const size_t whole = static_cast<size_t>(spec.shape[1]) * slot;
  const auto heads = static_cast<size_t>(spec.shape[0]);
  for (size_t r = 0; r < rows; ++r) {
    std::memset(target.row(r), 0, spec.bytes());
    for (size_t h = 0; h < heads; ++h) {
      std::memcpy(target.row(r) + h * whole, data + (r * heads + h) * filled, filled);
    }
  }
}

// Restores one tensor of every row from whichever form the file holds it in.
void restore(const Tensors& file, const TensorSpec& spec, const Target& target) {
  const bool is_float = spec.type == Type::kFloat32;
  if (file.has(spec.name)) {
    restore_plain(file, spec, target);
  } else if (is_float && file.has(spec.name + kHalf)) {
    restore_halves(file, spec, target);
  } else if (is_float && spec.shape.size() == 2 && file.has(spec.name + kLeft)) {
    restore_factors(file, spec, target);
  } else if (spec.shape.size() == 3 && file.has(spec.name + kUsed)) {
    restore_used(file, spec, target);
  } else {
    throw Failure(FWL_ERROR_STATE, "the state file lacks the tensor '" + spec.name +
                                       "'; was it saved from another model?");
  }
}

std::string read_content(const std::string& path) {
  std::ifstream stream(path, std::ios::binary);
  if (!stream) {
    throw Failure(FWL_ERROR_IO, "cannot read '" + path + "': " + reason());
  }
  std::error_code absent;
  if (fs::is_directory(path, absent)) {
    throw Failure(FWL_ERROR_IO, "cannot read '" + path + "': it is a folder");
  }
  return std::string(std::istreambuf_iterator<char>(stream), {});
}

// Checks that a file is a state file, of this version and of this model.
void check_metadata(const json& metadata, const std::string& path, const Bundle& bundle) {
  if (metadata.value("format", "") != kFormat) {
    throw Failure(FWL_ERROR_STATE,
                  "'" + path +
                      "' is a safetensors file, but not a state file; expected a file that "
                      "`fwl-export read` or fwl_session_save_state wrote");
  }
  if (metadata.at("version") != kVersion) {
    throw Failure(FWL_ERROR_STATE, "'" + path + "' is a state file of version " +
                                       metadata.at("version").dump() +
                                       ", but this libfwl reads version " + kVersion +
                                       "; update libfwl, or save the state again");
  }
  if (metadata.at("model_id") != bundle.model_id) {
    throw Failure(FWL_ERROR_STATE,
                  "'" + path +
                      "' was saved from another model; only the model that wrote a "
                      "state can load it, at the same precision");
  }
}

std::vector<RowState> restored_rows(const Tensors& file, const Bundle& bundle) {
  const unsigned long count = std::stoul(file.metadata.at("rows").get<std::string>());
  if (count < 1 || count > kMaxRows) {
    file.damaged("it holds " + std::to_string(count) + " rows");
  }
  // Compares `count` with the file's size before memory is taken for that many rows.
  file.data("position", "I64", {static_cast<int64_t>(count)});
  std::vector<RowState> rows(count, RowState(bundle.state_bytes()));
  for (size_t i = 0; i < bundle.state.size(); ++i) {
    restore(file, bundle.state[i], {rows, row_offset(bundle, i)});
  }
  return rows;
}

} // namespace

float from_half(uint16_t bits) {
  const int exponent = bits >> 10 & 31, fraction = bits & 1023;
  const float magnitude = exponent == 31 ? (fraction != 0 ? NAN : INFINITY)
                          : exponent > 0
                              ? std::ldexp(static_cast<float>(1024 + fraction), exponent - 25)
                              : std::ldexp(static_cast<float>(fraction), -24);
  return (bits & 0x8000) != 0 ? -magnitude : magnitude;
}

void check_state(const Bundle& bundle, const RowState& row, const std::string& source) {
  size_t offset = 0;
  for (const TensorSpec& spec : bundle.state) {
    for (size_t i = 0; i < spec.elements(); ++i) {
      bool finite = true;
      if (spec.type == Type::kFloat32) {
        finite = std::isfinite(float_at(row.data() + offset, i));
      } else if (spec.type == Type::kFloat16) {
        uint16_t bits;
        std::memcpy(&bits, row.data() + offset + i * sizeof(bits), sizeof(bits));
        finite = (bits & 0x7c00) != 0x7c00;
      }
      if (!finite) {
        throw Failure(FWL_ERROR_STATE, source + ": state '" + spec.name +
                                           "' holds NaN or infinite values; do not use it");
      }
    }
    offset += spec.bytes();
  }
  const int64_t most = bundle.max_positions > 0 ? bundle.max_positions : kMostTokens;
  if (position_of(row) < 0 || position_of(row) > most) {
    throw Failure(FWL_ERROR_STATE, source + ": the position is " +
                                       std::to_string(position_of(row)) + "; expected 0 to " +
                                       std::to_string(most) + ": do not use this state");
  }
}

void save_state(const std::string& path, const Bundle& bundle, const std::vector<RowState>& rows) {
  json header, metadata;
  std::string tokens;
  for (const RowState& row : rows) {
    check_state(bundle, row, "'" + path + "'");
    tokens += (tokens.empty() ? "" : ",") + std::to_string(position_of(row));
  }
  metadata = {{"format", kFormat},
              {"version", kVersion},
              {"model_id", bundle.model_id},
              {"rows", std::to_string(rows.size())},
              {"tokens", tokens},
              {"compress", "none"}};
  header["__metadata__"] = metadata;
  uint64_t offset = 0;
  for (const TensorSpec& spec : bundle.state) {
    const uint64_t bytes = rows.size() * spec.bytes();
    header[spec.name] = {{"dtype", safetensors_type(spec.type)},
                         {"shape", with_rows(rows.size(), spec.shape)},
                         {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' '); // aligns the tensors
  const uint64_t size = text.size();
  Replacement file(path);
  file.write(reinterpret_cast<const char*>(&size), sizeof(size));
  file.write(text.data(), text.size());
  for (size_t i = 0; i < bundle.state.size(); ++i) {
    const size_t start = row_offset(bundle, i);
    for (const RowState& row : rows) {
      file.write(row.data() + start, bundle.state[i].bytes());
    }
  }
  file.commit();
}

std::vector<RowState> load_state(const std::string& path, const Bundle& bundle) {
  const Tensors file(path, read_content(path));
  try {
    check_metadata(file.metadata, path, bundle);
    std::vector<RowState> rows = restored_rows(file, bundle);
    for (const RowState& row : rows) {
      check_state(bundle, row, "'" + path + "'");
    }
    return rows;
  } catch (const json::exception& error) {
    file.damaged(printable(error.what()));
  } catch (const std::logic_error& error) { // std::stoul
    file.damaged("its row count is not a number");
  }
}

} // namespace fwl::internal
