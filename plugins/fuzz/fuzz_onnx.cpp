// ONNX files, of which libfwl reads where tensors keep their data.

#include "../libfwl/src/json_text.h"
#include "../libfwl/src/onnx_file.h"
#include "target.h"

namespace fwl::fuzz {
namespace {

std::string varint(uint64_t value) {
  std::string bytes;
  for (; value >= 128; value >>= 7) {
    bytes += static_cast<char>((value & 127) | 128);
  }
  return bytes + static_cast<char>(value);
}

// Returns a field that holds bytes: a text or a message.
std::string field(uint64_t number, const std::string& content) {
  return varint(number << 3 | 2) + varint(content.size()) + content;
}

std::string number(uint64_t field_number, uint64_t value) {
  return varint(field_number << 3) + varint(value);
}

// A tensor of 3 x 4 floats in another file.
std::string tensor(const std::string& name) {
  const auto entry = [](const char* key, const char* value) {
    return field(13, field(1, key) + field(2, value));
  };
  return number(1, 3) + number(1, 4) + number(2, 1) + field(8, name) +
         entry("location", "model.onnx.data") + entry("offset", "4096") + entry("length", "48") +
         number(14, 1);
}

} // namespace

bool accepts(std::string_view content) {
  try {
    internal::external_tensors(content);
    return true;
  } catch (const internal::Malformed&) {
    return false;
  }
}

std::vector<std::string> seeds() {
  const std::string inner = field(5, tensor("inner")) + field(15, field(1, tensor("sparse")));
  const std::string attribute = field(5, tensor("t")) + field(6, inner) + field(10, tensor("u")) +
                                field(11, inner) + field(22, field(2, tensor("v")));
  const std::string node = field(1, "x") + field(2, "y") + field(4, "If") + field(5, attribute);
  const std::string deeper = field(5, field(6, field(1, node)));
  const std::string graph = field(1, node) + field(1, deeper) + field(2, "main") +
                            field(5, tensor("w")) + field(11, "input") + field(12, "output");
  const std::string function = field(7, node) + field(10, "fwl") + field(11, attribute);
  return {number(1, 10) + field(7, graph) + field(8, number(2, 20)) + field(20, field(2, inner)) +
              field(25, function),
          field(7, field(5, tensor("w"))), ""};
}

std::vector<std::string> words() {
  return {"location",
          "offset",
          "length",
          "checksum",
          field(13, field(1, "location")),
          tensor("x"),
          field(7, ""),
          field(5, tensor("y")),
          number(14, 1),
          number(14, 0),
          number(1, uint64_t{0} - 1),
          std::string(11, '\xff'),
          varint(uint64_t{1} << 63),
          "*/_ORT_MEM_ADDR_/*",
          "ORTM"};
}

std::string repaired(std::string_view content) {
  return std::string(content);
}

} // namespace fwl::fuzz
