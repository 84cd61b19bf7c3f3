// The manifest of a bundle.

#include "../libfwl/src/bundle.h"
#include "../libfwl/src/error.h"
#include "target.h"

namespace fwl::fuzz {

bool accepts(std::string_view content) {
  static Scratch scratch("manifest.json");
  scratch.write(content);
  try {
    internal::read_bundle(scratch.folder());
    return true;
  } catch (const internal::Failure&) {
    return false;
  }
}

std::vector<std::string> seeds() {
  return {
      R"({"schema_version": 3, "model_id": "68d0d964", "precision": "fp32", "max_tokens": 256,
  "opset": 20, "op": {"domain": "fwl", "name": "LinearAttentionUpdate", "version": 2, "nodes": 2},
  "config": {"schema_version": 1, "vocab_size": 2048,
    "backbone": {"type": "decoder", "width": 224, "max_positions": 100000, "norm_epsilon": 1e-06},
    "fast_weights": {"input_size": 224, "anchor_interval": 256, "logit_softcap": 0.0}},
  "state": [{"name": "position", "shape": [], "dtype": "int64"},
    {"name": "cache.0.key", "shape": [7, 383, 32], "dtype": "float32"},
    {"name": "fast.up.kernel", "shape": [224, 896], "dtype": "float16"}],
  "versions": {"torch": "2.13.0"},
  "files": {"model.onnx": {"sha256": "00ff", "bytes": 220003},
    "engines/a.engine": {"sha256": "00ff", "bytes": 12}}})",
      R"({"schema_version":3,"model_id":"","precision":"","max_tokens":1,"config":{"vocab_size":1,
  "backbone":{},"fast_weights":{}},"op":{"version":2},"state":[{"name":"position","shape":[1],"dtype":"int64"}],
  "files":{}})"};
}

std::vector<std::string> words() {
  return {"null",
          "true",
          "{}",
          "[]",
          "[[",
          "\"",
          "\\u0000",
          "\\ud800",
          "\xff",
          "\"state\":[",
          "\"files\":{",
          "\"../x\":",
          "\"/etc/passwd\":{\"sha256\":\"\",\"bytes\":1},",
          "NaN",
          "\"position\"",
          "\"float32\"",
          "\"int64\"",
          "[1,1,1,1,1,1,1,1,1]",
          "-0",
          "\"max_tokens\":1,",
          std::string(1, '\0'),
          "{\"a\":",
          "//",
          "\xef\xbb\xbf"};
}

std::string repaired(std::string_view content) {
  return std::string(content);
}

} // namespace fwl::fuzz
