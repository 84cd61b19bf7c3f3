// Finds in an ONNX file which other files its tensors take their data from. The Python twin is
// fwl_export/bundle/onnx_file.py.
#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace fwl::internal {

// A tensor whose data is in another file.
struct ExternalTensor {
  std::string name;
  int32_t type = 0; // a value of onnx::TensorProto::DataType
  std::vector<int64_t> shape;
  std::string location; // path of the file, relative to the ONNX file's folder
  uint64_t offset = 0;
  std::optional<uint64_t> length; // absent: to the file's end
  bool is_initializer = false; // of the main graph, not of a graph inside it, a node or a function
};

// Returns all such tensors of a model, wherever they are. Throws Malformed for bytes that are not
// an ONNX model, and for what protobuf allows but no exporter writes: a field that occurs twice, an
// old-style group, a field of the wrong type, and graphs nested deeply.
std::vector<ExternalTensor> external_tensors(std::string_view model);

} // namespace fwl::internal
