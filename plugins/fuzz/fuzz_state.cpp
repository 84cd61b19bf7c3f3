// State files.

#include <cstring>

#include "../libfwl/src/error.h"
#include "../libfwl/src/json_text.h"
#include "../libfwl/src/safetensors.h"
#include "../libfwl/src/state_file.h"
#include "target.h"

namespace fwl::fuzz {
namespace {

using namespace fwl::internal;

constexpr size_t kRows = 2;

const Bundle& bundle() {
  static const Bundle kBundle = [] {
    Bundle made{};
    made.model_id = "id";
    made.state = {{"position", {}, Type::kInt64},
                  {"cache.0.key", {2, 3, 4}, Type::kFloat32},
                  {"cache.0.value", {2, 3, 4}, Type::kFloat16},
                  {"fast.up.kernel", {6, 5}, Type::kFloat32},
                  {"fast.up.bias", {5}, Type::kFloat32}};
    return made;
  }();
  return kBundle;
}

struct Parts {
  std::string name, type;
  std::vector<int64_t> shape; // without the axis of rows
};

std::string data_hash(const SafetensorsHeader& header, std::string_view data) {
  return header.sha256([&](const std::string& name, Sha256& hash) {
    const StoredTensor& tensor = header.tensors.at(name);
    hash.update(data.data() + tensor.first, tensor.last - tensor.first);
  });
}

// Returns a file of zeros with these tensors.
std::string file_of(const std::string& compress, const std::vector<Parts>& tensors) {
  SafetensorsHeader header;
  uint64_t end = 0;
  for (const Parts& part : tensors) {
    std::vector<int64_t> shape{static_cast<int64_t>(kRows)};
    shape.insert(shape.end(), part.shape.begin(), part.shape.end());
    const uint64_t first = end;
    uint64_t bytes = part.type == "I64" ? 8 : part.type == "F32" ? 4 : 2;
    for (const int64_t size : shape) {
      bytes *= static_cast<uint64_t>(size);
    }
    end += bytes;
    header.tensors[part.name] = {part.type, shape, first, end};
  }
  header.metadata = {{"format", "fwl-state"}, {"version", "2"},  {"model_id", "id"},
                     {"rows", "2"},           {"tokens", "0,0"}, {"compress", compress}};
  const std::string data(end, '\0');
  header.metadata["sha256"] = data_hash(header, data);
  return header.text() + data;
}

} // namespace

bool accepts(std::string_view content) {
  static Scratch scratch("a.state");
  scratch.write(content);
  try {
    load_state(scratch.path(), bundle(), kRows);
    return true;
  } catch (const Failure&) {
    return false;
  }
}

std::vector<std::string> seeds() {
  const Parts position{"position", "I64", {}}, key{"cache.0.key", "F32", {2, 3, 4}},
      value{"cache.0.value", "F16", {2, 3, 4}}, kernel{"fast.up.kernel", "F32", {6, 5}},
      bias{"fast.up.bias", "F32", {5}};
  return {file_of("none", {position, key, value, kernel, bias}),
          file_of("fp16", {position,
                           {"cache.0.key.half", "F16", {2, 3, 4}},
                           {"cache.0.key.scale", "F32", {}},
                           value,
                           {"fast.up.kernel.half", "F16", {6, 5}},
                           {"fast.up.kernel.scale", "F32", {}},
                           bias}),
          file_of("lowrank", {position,
                              {"cache.0.key.used", "F32", {2, 1, 4}},
                              {"cache.0.value.used", "F16", {2, 0, 4}},
                              {"fast.up.kernel.left", "F32", {6, 2}},
                              {"fast.up.kernel.right", "F32", {2, 5}},
                              bias})};
}

std::vector<std::string> words() {
  return {"\"__metadata__\":",
          "{}",
          "null",
          "[]",
          "\"F32\"",
          "\"F16\"",
          "\"I64\"",
          "\"U8\"",
          "\"BF16\"",
          "\"none\"",
          "\"lowrank\"",
          "\"fp16\"",
          "\"rows\":\"2\",",
          ".half",
          ".scale",
          ".left",
          ".right",
          ".used",
          "\"version\":\"1\",",
          "\\u0000",
          "\xff",
          "[2,0,4]",
          "[0,0]",
          "\"position\":",
          std::string(1, '\0'),
          "-",
          "\xef\xbb\xbf",
          ",",
          "\"dtype\":",
          "[[[["};
}

// Gives the header its right length and the tensors their sha256.
std::string repaired(std::string_view content) {
  constexpr size_t kLength = sizeof(uint64_t);
  const size_t end = content.find("}}");
  if (content.size() < kLength || end == std::string_view::npos || end < kLength) {
    return std::string(content);
  }
  const size_t start = end + 2 + (content.substr(end + 2).find_first_not_of(' ') % 8);
  const std::string_view text = content.substr(kLength, std::min(start, content.size()) - kLength);
  const std::string_view data = content.substr(kLength + text.size());
  const uint64_t size = text.size();
  try {
    SafetensorsHeader header = parse_safetensors(text, data.size());
    header.metadata["sha256"] = data_hash(header, data);
    return header.text() + std::string(data);
  } catch (const Malformed&) {
    std::string mended(content);
    std::memcpy(mended.data(), &size, sizeof(size));
    return mended;
  }
}

} // namespace fwl::fuzz
