#include "safetensors.h"

#include <algorithm>

#include "error.h"
#include "json_text.h"

namespace fwl::internal {
namespace {

using nlohmann::json;

constexpr char kMetadata[] = "__metadata__", kSha256[] = "sha256";
constexpr size_t kMostSizes = 8, kLongestName = 256;
constexpr size_t kLongestValue = size_t{1} << 25; // of metadata: the positions of 2^20 rows

// Bytes of one element. safetensors knows further types, which no state has.
const std::map<std::string, uint64_t>& element_bytes() {
  static const std::map<std::string, uint64_t> kBytes{
      {"BOOL", 1}, {"U8", 1},  {"I8", 1},  {"U16", 2}, {"I16", 2}, {"F16", 2}, {"BF16", 2},
      {"U32", 4},  {"I32", 4}, {"F32", 4}, {"U64", 8}, {"I64", 8}, {"F64", 8}};
  return kBytes;
}

StoredTensor parse_tensor(const json& entry, const std::string& name) {
  if (object(entry, name).size() != 3) {
    throw Malformed("'" + name + "' has other members than dtype, shape and data_offsets");
  }
  StoredTensor tensor{text(member(entry, "dtype"), name + ": dtype", 16), {}, 0, 0};
  const auto type = element_bytes().find(tensor.type);
  if (type == element_bytes().end()) {
    throw Malformed("'" + name + "' has the unknown type '" + tensor.type + "'");
  }
  uint64_t bytes = type->second;
  for (const json& size : array(member(entry, "shape"), name + ": shape", kMostSizes)) {
    tensor.shape.push_back(integer(size, name + ": shape", 0));
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(tensor.shape.back()), &bytes)) {
      throw Malformed("the size of '" + name + "' is out of range");
    }
  }
  const json& offsets = array(member(entry, "data_offsets"), name + ": data_offsets", 2);
  if (offsets.size() != 2) {
    throw Malformed("'" + name + ": data_offsets' are not two numbers");
  }
  tensor.first = static_cast<uint64_t>(integer(offsets[0], name + ": data_offsets", 0));
  tensor.last = static_cast<uint64_t>(integer(offsets[1], name + ": data_offsets", 0));
  if (tensor.last < tensor.first || tensor.last - tensor.first != bytes) {
    throw Malformed("the data_offsets of '" + name + "' do not fit its shape");
  }
  return tensor;
}

// Checks that the tensors cover the data without a gap and without overlapping.
void check_cover(const std::map<std::string, StoredTensor>& tensors, uint64_t data_bytes) {
  std::vector<std::pair<uint64_t, uint64_t>> ranges;
  for (const auto& entry : tensors) {
    ranges.emplace_back(entry.second.first, entry.second.last);
  }
  std::sort(ranges.begin(), ranges.end());
  uint64_t end = 0;
  for (const auto& [first, last] : ranges) {
    if (first != end) {
      throw Malformed("two tensors overlap, or there is a gap between them");
    }
    end = last;
  }
  if (end > data_bytes) {
    throw Malformed("its tensors are truncated");
  }
  if (end < data_bytes) {
    throw Malformed("bytes follow its tensors");
  }
}

} // namespace

SafetensorsHeader parse_safetensors(std::string_view header, uint64_t data_bytes) {
  const json parsed = parse_json(header);
  SafetensorsHeader found;
  for (const auto& [name, entry] : parsed.items()) {
    if (name != kMetadata) {
      found.tensors[text(name, "a tensor's name", kLongestName)] = parse_tensor(entry, name);
      continue;
    }
    for (const auto& [key, value] : object(entry, kMetadata).items()) {
      found.metadata[text(key, "a key of the metadata", kLongestName)] =
          text(value, printable(key.c_str()), kLongestValue);
    }
  }
  check_cover(found.tensors, data_bytes);
  return found;
}

std::string SafetensorsHeader::sha256(
    const std::function<void(const std::string& name, Sha256& hash)>& add_data) const {
  Sha256 hash;
  const auto add_line = [&](const std::string& line) {
    hash.update((line + '\n').data(), line.size() + 1);
  };
  for (const auto& [name, tensor] : tensors) {
    add_line(name);
    add_line(tensor.type);
    std::string sizes;
    for (const int64_t size : tensor.shape) {
      sizes += (sizes.empty() ? "" : ",") + std::to_string(size);
    }
    add_line(sizes);
    add_data(name, hash);
  }
  for (const auto& [key, value] : metadata) {
    if (key != kSha256) {
      add_line(key);
      add_line(value);
    }
  }
  return hash.hex();
}

std::string SafetensorsHeader::text() const {
  json header{{kMetadata, metadata}};
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.type},
                    {"shape", tensor.shape},
                    {"data_offsets", {tensor.first, tensor.last}}};
  }
  std::string text = header.dump();
  text.resize((text.size() + 7) / 8 * 8, ' '); // aligns the tensors
  const uint64_t size = text.size();
  return std::string(reinterpret_cast<const char*>(&size), sizeof(size)) + text;
}

} // namespace fwl::internal
