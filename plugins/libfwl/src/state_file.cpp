#include "state_file.h"

#include <cmath>
#include <cstring>
#include <map>
#include <optional>

#include "error.h"
#include "input_file.h"
#include "json_text.h"
#include "output_file.h"
#include "safetensors.h"
#include "sha256.h"

namespace fwl::internal {
namespace {

constexpr char kFormat[] = "fwl-state";
// Files of version 1 have no sha256.
constexpr char kVersion[] = "2", kOldVersion[] = "1";

// The longest header: of tensors and metadata, and of the positions of the rows in it.
constexpr uint64_t kHeaderBytes = 1 << 20, kHeaderBytesPerRow = 32;

// Endings of the names of tensors that stand for a compressed one.
constexpr char kHalf[] = ".half", kScale[] = ".scale";
constexpr char kLeft[] = ".left", kRight[] = ".right";
constexpr char kUsed[] = ".used";

const char* safetensors_type(Type type) {
  return type == Type::kFloat32 ? "F32" : type == Type::kFloat16 ? "F16" : "I64";
}

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

// Returns the positions of rows, separated by commas.
std::string tokens_of(const std::vector<RowState>& rows) {
  std::string tokens;
  for (const RowState& row : rows) {
    tokens += (tokens.empty() ? "" : ",") + std::to_string(position_of(row));
  }
  return tokens;
}

std::string listed(const std::vector<int64_t>& shape) {
  std::string all;
  for (const int64_t size : shape) {
    all += (all.empty() ? "[" : ",") + std::to_string(size);
  }
  return all.empty() ? "[]" : all + "]";
}

[[noreturn]] void damaged(const std::string& path, const std::string& why) {
  throw Failure(FWL_ERROR_STATE, "'" + path +
                                     "' is not a state file, or was truncated or changed (" + why +
                                     "); save it again");
}

// A state file: first its header is read and checked, and then its tensors.
class StateFile {
public:
  // Reads the header. `rows` is the number of rows that the file should hold.
  StateFile(const std::string& path, size_t rows) : path_(path), file_(path) {
    if (!file_.is_open()) {
      throw Failure(FWL_ERROR_IO, "cannot read '" + path + "': " + file_.reason());
    }
    uint64_t size = 0;
    if (file_.size() < sizeof(size) || !file_.read(reinterpret_cast<char*>(&size), sizeof(size))) {
      damaged("it has no header");
    }
    const uint64_t rest = file_.size() - sizeof(size);
    if (size > rest) {
      damaged("its header is truncated");
    }
    if (size > kHeaderBytes + rows * kHeaderBytesPerRow) {
      damaged("its header has " + std::to_string(size) + " bytes, too many for " +
              std::to_string(rows) + " rows");
    }
    std::string text(size, '\0');
    if (!file_.read(text.data(), size)) {
      damaged("its header is truncated");
    }
    header_ = parse_safetensors(text, rest - size);
    data_bytes_ = rest - size;
  }

  // Reads the tensors. The caller has compared their sizes with the model's.
  void read_data() {
    data_.resize(data_bytes_);
    if (!file_.read(data_.data(), data_bytes_) || !file_.is_at_end()) {
      damaged("its size changed while it was read");
    }
  }

  bool has(const std::string& name) const { return header_.tensors.count(name) > 0; }
  size_t count() const { return header_.tensors.size(); }
  const std::vector<int64_t>& shape(const std::string& name) const { return tensor(name).shape; }

  // Returns an entry of the metadata, or nothing.
  std::optional<std::string> metadata(const std::string& key) const {
    const auto found = header_.metadata.find(key);
    return found == header_.metadata.end() ? std::nullopt : std::optional(found->second);
  }

  // Checks type and shape of a tensor.
  void check(const std::string& name, const std::string& type,
             const std::vector<int64_t>& shape) const {
    const StoredTensor& found = tensor(name);
    if (found.type != type || found.shape != shape) {
      throw Failure(FWL_ERROR_STATE, "'" + path_ + "': state '" + name + "' is " + found.type +
                                         listed(found.shape) + ", but the model says " + type +
                                         listed(shape) + "; was it saved from another model?");
    }
  }

  const char* data(const std::string& name) const { return data_.data() + tensor(name).first; }

  // Compares tensors and metadata with the sha256, which files of version 1 do not have.
  void check_sha256() const {
    const std::optional<std::string> expected = metadata("sha256");
    const auto add_data = [&](const std::string& name, Sha256& hash) {
      const StoredTensor& found = tensor(name);
      hash.update(data_.data() + found.first, found.last - found.first);
    };
    if (expected && header_.sha256(add_data) != *expected) {
      damaged("its sha256 is not that of its content");
    }
  }

  [[noreturn]] void damaged(const std::string& why) const { internal::damaged(path_, why); }

private:
  const StoredTensor& tensor(const std::string& name) const {
    const auto found = header_.tensors.find(name);
    if (found == header_.tensors.end()) {
      damaged("it lacks the tensor '" + name + "'");
    }
    return found->second;
  }

  std::string path_;
  InputFile file_;
  SafetensorsHeader header_;
  uint64_t data_bytes_ = 0;
  std::string data_;
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

// One way in which a file may hold a tensor of the state. `check` compares types, shapes and number
// of tensors with the model before the data is read, so that no file asks for more memory than the
// model's state takes. `restore` fills the rows of the target from the data.
struct Form {
  std::string compress;             // the file's kind of compression; "" if that does not matter
  std::vector<std::string> endings; // of the names of the tensors that stand for it
  bool (*fits)(const TensorSpec& spec);
  void (*check)(const StateFile& file, const TensorSpec& spec, size_t rows);
  void (*restore)(const StateFile& file, const TensorSpec& spec, const Target& target);
};

void check_plain(const StateFile& file, const TensorSpec& spec, size_t rows) {
  file.check(spec.name, safetensors_type(spec.type), with_rows(rows, spec.shape));
}

void restore_plain(const StateFile& file, const TensorSpec& spec, const Target& target) {
  const char* data = file.data(spec.name);
  for (size_t r = 0; r < target.rows.size(); ++r) {
    std::memcpy(target.row(r), data + r * spec.bytes(), spec.bytes());
  }
}

// A float32 tensor that was saved as float16 values and one scale for each row.
void check_halves(const StateFile& file, const TensorSpec& spec, size_t rows) {
  file.check(spec.name + kHalf, "F16", with_rows(rows, spec.shape));
  file.check(spec.name + kScale, "F32", {static_cast<int64_t>(rows)});
}

void restore_halves(const StateFile& file, const TensorSpec& spec, const Target& target) {
  const size_t elements = spec.elements();
  const char* halves = file.data(spec.name + kHalf);
  const char* scales = file.data(spec.name + kScale);
  std::vector<float> values(elements);
  for (size_t r = 0; r < target.rows.size(); ++r) {
    for (size_t i = 0; i < elements; ++i) {
      uint16_t bits;
      std::memcpy(&bits, halves + (r * elements + i) * sizeof(bits), sizeof(bits));
      values[i] = from_half(bits) * float_at(scales, r);
    }
    std::memcpy(target.row(r), values.data(), spec.bytes());
  }
}

// Returns the rank of the factors of a matrix.
int64_t rank_of(const StateFile& file, const TensorSpec& spec) {
  const std::vector<int64_t>& shape = file.shape(spec.name + kLeft);
  return shape.empty() ? 0 : shape.back();
}

// A float32 matrix [K, V] that was saved as factors [K, rank] and [rank, V] of each row. Factors
// that are larger than the matrix are never saved.
void check_factors(const StateFile& file, const TensorSpec& spec, size_t rows) {
  const int64_t size_k = spec.shape[0], size_v = spec.shape[1], rank = rank_of(file, spec);
  if (rank < 1 || rank > size_k * size_v / (size_k + size_v)) {
    file.damaged("the factors of '" + spec.name + "' have rank " + std::to_string(rank));
  }
  file.check(spec.name + kLeft, "F32", with_rows(rows, {size_k, rank}));
  file.check(spec.name + kRight, "F32", with_rows(rows, {rank, size_v}));
}

void restore_factors(const StateFile& file, const TensorSpec& spec, const Target& target) {
  const auto size_k = static_cast<size_t>(spec.shape[0]);
  const auto size_v = static_cast<size_t>(spec.shape[1]);
  const auto size_r = static_cast<size_t>(rank_of(file, spec));
  const char* left = file.data(spec.name + kLeft);
  const char* right = file.data(spec.name + kRight);
  std::vector<float> values(size_k * size_v);
  for (size_t r = 0; r < target.rows.size(); ++r) {
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

// Returns how many slots of a cache a file holds, or -1 if the tensor is no cache.
int64_t used_of(const StateFile& file, const TensorSpec& spec) {
  const std::vector<int64_t>& shape = file.shape(spec.name + kUsed);
  return shape.size() == spec.shape.size() + 1 ? shape[2] : -1;
}

// A cache [heads, slots, ...] of which only the slots in use were saved; the others are zeros.
void check_used(const StateFile& file, const TensorSpec& spec, size_t rows) {
  const int64_t used = used_of(file, spec);
  if (used < 0 || used > spec.shape[1]) {
    file.damaged("'" + spec.name + kUsed + "' does not fit the model");
  }
  std::vector<int64_t> shape = spec.shape;
  shape[1] = used;
  file.check(spec.name + kUsed, safetensors_type(spec.type), with_rows(rows, shape));
}

void restore_used(const StateFile& file, const TensorSpec& spec, const Target& target) {
  const char* data = file.data(spec.name + kUsed);
  const auto heads = static_cast<size_t>(spec.shape[0]);
  const size_t whole = spec.bytes() / heads;
  const size_t slot = whole / static_cast<size_t>(spec.shape[1]);
  const size_t filled = static_cast<size_t>(used_of(file, spec)) * slot;
  for (size_t r = 0; r < target.rows.size(); ++r) {
    std::memset(target.row(r), 0, spec.bytes());
    for (size_t h = 0; h < heads; ++h) {
      std::memcpy(target.row(r) + h * whole, data + (r * heads + h) * filled, filled);
    }
  }
}

bool starts_with(const std::string& name, const std::string& start) {
  return name.compare(0, start.size(), start) == 0;
}

bool is_float(const TensorSpec& spec) {
  return spec.type == Type::kFloat32;
}

bool is_matrix(const TensorSpec& spec) {
  return is_float(spec) && spec.shape.size() == 2 &&
         (starts_with(spec.name, "fast.") || starts_with(spec.name, "anchor."));
}

bool is_cache(const TensorSpec& spec) {
  return starts_with(spec.name, "cache.") && spec.shape.size() >= 2;
}

const std::vector<Form>& forms() {
  static const std::vector<Form> kForms{
      {"fp16", {kHalf, kScale}, is_float, check_halves, restore_halves},
      {"lowrank", {kLeft, kRight}, is_matrix, check_factors, restore_factors},
      {"lowrank", {kUsed}, is_cache, check_used, restore_used},
      {"", {""}, [](const TensorSpec&) { return true; }, check_plain, restore_plain}};
  return kForms;
}

// Returns the form in which a file holds a tensor.
const Form& form_of(const StateFile& file, const TensorSpec& spec) {
  for (const Form& form : forms()) {
    const bool may_be = form.compress.empty() || form.compress == file.metadata("compress");
    if (may_be && form.fits(spec) && file.has(spec.name + form.endings[0])) {
      return form;
    }
  }
  throw Failure(FWL_ERROR_STATE, "the state file lacks the tensor '" + spec.name +
                                     "'; was it saved from another model?");
}

// Checks that a file is a state file, of a version that can be read and of this model.
void check_metadata(const StateFile& file, const std::string& path, const Bundle& bundle) {
  if (file.metadata("format") != kFormat) {
    throw Failure(FWL_ERROR_STATE,
                  "'" + path +
                      "' is a safetensors file, but not a state file; expected a file that "
                      "`fwl-export read` or fwl_session_save_state wrote");
  }
  const std::string version = file.metadata("version").value_or("");
  if (version != kVersion && version != kOldVersion) {
    throw Failure(FWL_ERROR_STATE, "'" + path + "' is a state file of version '" +
                                       printable(version.c_str()) +
                                       "', but this libfwl reads versions 1 and " + kVersion +
                                       "; update libfwl, or save the state again");
  }
  if ((version == kVersion) != file.metadata("sha256").has_value()) {
    file.damaged("a file of version 2 has a sha256, and one of version 1 has none");
  }
  const std::string compress = file.metadata("compress").value_or("");
  if (compress != "none" && compress != "fp16" && compress != "lowrank") {
    file.damaged("it has no known kind of compression");
  }
  if (file.metadata("model_id") != bundle.model_id) {
    throw Failure(FWL_ERROR_STATE,
                  "'" + path +
                      "' was saved from another model; only the model that wrote a "
                      "state can load it, at the same precision");
  }
}

// Compares a file's header with the model, and returns how many rows it holds.
size_t check_tensors(const StateFile& file, const Bundle& bundle) {
  const int64_t count = decimal(file.metadata("rows").value_or(""), "rows");
  const auto rows = static_cast<size_t>(count);
  if (rows < 1 || rows > kMaxRows) {
    file.damaged("it holds " + std::to_string(count) + " rows");
  }
  size_t expected = 0;
  for (const TensorSpec& spec : bundle.state) {
    const Form& form = form_of(file, spec);
    form.check(file, spec, rows);
    expected += form.endings.size();
  }
  if (file.count() != expected) {
    file.damaged("it has " + std::to_string(file.count()) +
                 " tensors, but the model's state needs " + std::to_string(expected));
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
  const int64_t position = position_of(row);
  const int64_t most = bundle.max_positions > 0 ? bundle.max_positions : kMostTokens;
  if (position < 0 || position > most) {
    throw Failure(FWL_ERROR_STATE, source + ": the position is " + std::to_string(position) +
                                       "; expected 0 to " + std::to_string(most) +
                                       ": do not use this state");
  }
}

void save_state(const std::string& path, const Bundle& bundle, const std::vector<RowState>& rows) {
  for (const RowState& row : rows) {
    check_state(bundle, row, "'" + path + "'");
  }
  SafetensorsHeader header;
  header.metadata = {{"format", kFormat},           {"version", kVersion},
                     {"model_id", bundle.model_id}, {"rows", std::to_string(rows.size())},
                     {"tokens", tokens_of(rows)},   {"compress", "none"}};
  std::map<std::string, size_t> starts; // of the tensors, in a row's state
  uint64_t end = 0;
  for (size_t i = 0; i < bundle.state.size(); ++i) {
    const TensorSpec& spec = bundle.state[i];
    const uint64_t first = end;
    end += rows.size() * spec.bytes();
    header.tensors[spec.name] = {safetensors_type(spec.type), with_rows(rows.size(), spec.shape),
                                 first, end};
    starts[spec.name] = row_offset(bundle, i);
  }
  header.metadata["sha256"] = header.sha256([&](const std::string& name, Sha256& hash) {
    const StoredTensor& tensor = header.tensors.at(name);
    for (const RowState& row : rows) {
      hash.update(row.data() + starts.at(name), (tensor.last - tensor.first) / rows.size());
    }
  });
  const std::string text = header.text();
  OutputFile file(path);
  file.write(text.data(), text.size());
  for (const TensorSpec& spec : bundle.state) {
    for (const RowState& row : rows) {
      file.write(row.data() + starts.at(spec.name), spec.bytes());
    }
  }
  file.commit();
}

std::vector<RowState> load_state(const std::string& path, const Bundle& bundle, size_t rows) {
  try {
    StateFile file(path, rows);
    check_metadata(file, path, bundle);
    const size_t held = check_tensors(file, bundle);
    if (held != rows) {
      throw Failure(FWL_ERROR_ARGUMENT, "'" + path + "' holds " + std::to_string(held) +
                                            " rows, but the call names " + std::to_string(rows) +
                                            "; name as many rows as the file holds");
    }
    file.read_data();
    file.check_sha256();
    std::vector<RowState> states(rows, RowState(bundle.state_bytes()));
    for (size_t i = 0; i < bundle.state.size(); ++i) {
      const TensorSpec& spec = bundle.state[i];
      form_of(file, spec).restore(file, spec, {states, row_offset(bundle, i)});
    }
    for (const RowState& state : states) {
      check_state(bundle, state, "'" + path + "'");
    }
    if (file.metadata("tokens") != tokens_of(states)) {
      damaged(path, "its metadata name other positions than its tensors");
    }
    return states;
  } catch (const Malformed& error) {
    damaged(path, printable(error.what()));
  }
}

} // namespace fwl::internal
