#include "onnx_file.h"

#include <algorithm>
#include <set>

#include "json_text.h"

namespace fwl::internal {
namespace {

// Messages of onnx.proto.
enum class Message { kModel, kTraining, kGraph, kFunction, kNode, kAttribute, kSparse, kTensor };

// A field that holds a message, or several.
struct Field {
  Message parent;
  uint64_t number;
  Message child;
  bool is_repeated;
};

// The fields through which a model reaches a tensor.
constexpr Field kFields[] = {
    {Message::kModel, 7, Message::kGraph, false},
    {Message::kModel, 20, Message::kTraining, true},
    {Message::kModel, 25, Message::kFunction, true},
    {Message::kTraining, 1, Message::kGraph, false},
    {Message::kTraining, 2, Message::kGraph, false},
    {Message::kGraph, 1, Message::kNode, true},
    {Message::kGraph, 5, Message::kTensor, true},
    {Message::kGraph, 15, Message::kSparse, true},
    {Message::kFunction, 7, Message::kNode, true},
    {Message::kFunction, 11, Message::kAttribute, true},
    {Message::kNode, 5, Message::kAttribute, true},
    {Message::kAttribute, 5, Message::kTensor, false},
    {Message::kAttribute, 6, Message::kGraph, false},
    {Message::kAttribute, 10, Message::kTensor, true},
    {Message::kAttribute, 11, Message::kGraph, true},
    {Message::kAttribute, 22, Message::kSparse, false},
    {Message::kAttribute, 23, Message::kSparse, true},
    {Message::kSparse, 1, Message::kTensor, false},
    {Message::kSparse, 2, Message::kTensor, false},
};

// Messages inside each other, of which an If inside an If takes three.
constexpr int kDeepest = 40;
constexpr size_t kMostSizes = 8;

// Fields of TensorProto and of StringStringEntryProto, and a value of TensorProto.DataLocation.
constexpr uint64_t kDims = 1, kDataType = 2, kName = 8, kExternalData = 13, kDataLocation = 14;
constexpr uint64_t kKey = 1, kValue = 2;
constexpr int32_t kExternal = 1;

// Protobuf's wire types.
enum Wire : uint64_t { kVarint = 0, kFixed64 = 1, kBytes = 2, kFixed32 = 5 };

// Goes through the fields of a message.
class Reader {
public:
  explicit Reader(std::string_view message) : rest_(message) {}

  // Reads the next field. Returns false at the end.
  bool next() {
    if (rest_.empty()) {
      return false;
    }
    const uint64_t tag = varint();
    number = tag >> 3;
    wire = static_cast<Wire>(tag & 7);
    if (number < 1 || number >= uint64_t{1} << 29) {
      throw Malformed("it has a field without a valid number");
    }
    if (wire == kVarint) {
      value = varint();
    } else if (wire == kBytes) {
      bytes = take(varint());
    } else if (wire == kFixed64 || wire == kFixed32) {
      take(wire == kFixed64 ? 8 : 4);
    } else {
      throw Malformed("it has a field of the unknown type " + std::to_string(wire));
    }
    return true;
  }

  void require(Wire expected) const {
    if (wire != expected) {
      throw Malformed("field " + std::to_string(number) + " has the wrong type");
    }
  }

  uint64_t number = 0;
  Wire wire = kVarint;
  uint64_t value = 0;     // of a varint
  std::string_view bytes; // of a field that holds bytes

  uint64_t varint() {
    uint64_t result = 0;
    for (int shift = 0; shift < 70; shift += 7) {
      if (rest_.empty()) {
        throw Malformed("it ends inside a number");
      }
      const auto byte = static_cast<unsigned char>(rest_.front());
      rest_.remove_prefix(1);
      result |= uint64_t{byte & 127u} << std::min(shift, 63);
      if (byte < 128) {
        return result;
      }
    }
    throw Malformed("it has a number of more than ten bytes");
  }

  bool is_at_end() const { return rest_.empty(); }

private:
  std::string_view take(uint64_t size) {
    if (size > rest_.size()) {
      throw Malformed("it ends inside a field");
    }
    const std::string_view taken = rest_.substr(0, size);
    rest_.remove_prefix(size);
    return taken;
  }

  std::string_view rest_;
};

// Notes that a field was seen, which may occur once only. Protobuf would merge two of them.
void once(std::set<uint64_t>& seen, uint64_t number) {
  if (!seen.insert(number).second) {
    throw Malformed("field " + std::to_string(number) + " occurs twice in one message");
  }
}

// Reads one entry of a tensor's external_data into `tensor`.
void read_entry(std::string_view message, ExternalTensor& tensor, std::set<std::string>& keys) {
  std::string key, value;
  std::set<uint64_t> seen;
  for (Reader reader(message); reader.next();) {
    if (reader.number == kKey || reader.number == kValue) {
      reader.require(kBytes);
      once(seen, reader.number);
      (reader.number == kKey ? key : value) = reader.bytes;
    }
  }
  if (!keys.insert(key).second) {
    throw Malformed("a tensor's external data names '" + key + "' twice");
  }
  if (key == "location") {
    tensor.location = value;
  } else if (key == "offset") {
    tensor.offset = static_cast<uint64_t>(decimal(value, key));
  } else if (key == "length") {
    tensor.length = static_cast<uint64_t>(decimal(value, key));
  } else if (key != "checksum") {
    throw Malformed("a tensor's external data has the unknown key '" + key + "'");
  }
}

// Reads a tensor's sizes, which may be written one by one or packed.
void read_dims(const Reader& field, std::vector<int64_t>& dims) {
  if (field.wire == kVarint) {
    dims.push_back(static_cast<int64_t>(field.value));
  } else {
    field.require(kBytes);
    for (Reader packed(field.bytes); !packed.is_at_end() && dims.size() <= kMostSizes;) {
      dims.push_back(static_cast<int64_t>(packed.varint()));
    }
  }
  if (dims.size() > kMostSizes) {
    throw Malformed("a tensor has more than " + std::to_string(kMostSizes) + " axes");
  }
}

class Walker {
public:
  void walk(Message kind, std::string_view message, int depth) {
    if (depth > kDeepest) {
      throw Malformed("its graphs are nested too deeply");
    }
    if (kind == Message::kTensor) {
      read_tensor(message, depth);
      return;
    }
    std::set<uint64_t> seen;
    for (Reader reader(message); reader.next();) {
      const auto* const field =
          std::find_if(std::begin(kFields), std::end(kFields), [&](const Field& f) {
            return f.parent == kind && f.number == reader.number;
          });
      if (field == std::end(kFields)) {
        continue;
      }
      reader.require(kBytes);
      if (!field->is_repeated) {
        once(seen, reader.number);
      }
      walk(field->child, reader.bytes, depth + 1);
    }
  }

  std::vector<ExternalTensor> found;

private:
  void read_tensor(std::string_view message, int depth) {
    ExternalTensor tensor;
    bool external = false;
    std::set<uint64_t> seen;
    std::set<std::string> keys;
    for (Reader reader(message); reader.next();) {
      if (reader.number == kDims) {
        read_dims(reader, tensor.shape);
      } else if (reader.number == kExternalData) {
        reader.require(kBytes);
        read_entry(reader.bytes, tensor, keys);
      } else if (reader.number == kName) {
        reader.require(kBytes);
        once(seen, reader.number);
        tensor.name = reader.bytes;
      } else if (reader.number == kDataType || reader.number == kDataLocation) {
        reader.require(kVarint);
        once(seen, reader.number);
        if (reader.number == kDataType) {
          tensor.type = static_cast<int32_t>(reader.value);
        } else {
          external = static_cast<int32_t>(reader.value) == kExternal; // as protobuf does
        }
      }
    }
    if (external != !keys.empty()) {
      throw Malformed("a tensor says two things about where its data is");
    }
    if (external) {
      tensor.is_initializer = depth == kDepthOfInitializers;
      found.push_back(std::move(tensor));
    }
  }

  static constexpr int kDepthOfInitializers = 2; // model, graph, tensor
};

} // namespace

std::vector<ExternalTensor> external_tensors(std::string_view model) {
  Walker walker;
  walker.walk(Message::kModel, model, 0);
  return walker.found;
}

} // namespace fwl::internal
