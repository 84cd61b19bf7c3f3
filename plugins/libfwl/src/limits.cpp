#include "limits.h"

#include <cmath>
#include <cstdio>
#include <cstring>
#include <numeric>

#include "error.h"

namespace fwl::internal {
namespace {

constexpr char kFast[] = "fast."; // what the names of the sums of gradients begin with

double checked(const char* name, double value, double otherwise) {
  if (!(value >= 0)) { // also if it is NaN
    throw Failure(FWL_ERROR_ARGUMENT, std::string(name) + " is " + number_text(value) +
                                          "; expected 0 for the default, a number above 0, or "
                                          "infinity for no limit");
  }
  return value > 0 ? value : otherwise;
}

// Adds up squares in double precision, in which they cannot overflow, and in several sums, which
// need not wait for each other.
template <class Value, class Widen>
double sum_of_squares(const char* data, size_t count, const Widen& widen) {
  constexpr size_t kSums = 8;
  double sums[kSums] = {};
  for (size_t i = 0; i < count; ++i) {
    Value value;
    std::memcpy(&value, data + i * sizeof(value), sizeof(value));
    const double wide = widen(value);
    sums[i % kSums] += wide * wide;
  }
  return std::accumulate(sums, sums + kSums, 0.0);
}

} // namespace

Limits limits_of(double max_learning_weight, double max_update_norm, double clip_update_norm) {
  Limits limits;
  const double weight =
      checked("max_learning_weight", max_learning_weight, limits.max_learning_weight);
  if (weight <= std::numeric_limits<float>::max()) {
    limits.max_learning_weight = static_cast<float>(weight);
  } else {
    limits.max_learning_weight = std::numeric_limits<float>::infinity();
  }
  limits.max_update_norm = checked("max_update_norm", max_update_norm, limits.max_update_norm);
  limits.clip_update_norm = checked("clip_update_norm", clip_update_norm, limits.clip_update_norm);
  return limits;
}

double learned_norm(const Bundle& bundle, const RowState& row) {
  double total = 0;
  size_t offset = 0;
  for (const TensorSpec& spec : bundle.state) {
    const char* const data = row.data() + offset;
    offset += spec.bytes();
    if (spec.name.rfind(kFast, 0) != 0) {
      continue;
    }
    if (spec.type == Type::kFloat32) {
      total += sum_of_squares<float>(data, spec.elements(), [](float x) { return double{x}; });
    } else if (spec.type == Type::kFloat16) {
      total += sum_of_squares<uint16_t>(data, spec.elements(),
                                        [](uint16_t x) { return double{from_half(x)}; });
    }
  }
  return std::sqrt(total);
}

void scale_learned(const Bundle& bundle, RowState& row, float factor) {
  size_t offset = 0;
  for (const TensorSpec& spec : bundle.state) {
    char* const data = row.data() + offset;
    offset += spec.bytes();
    if (spec.name.rfind(kFast, 0) != 0 || spec.type != Type::kFloat32) {
      continue; // the sums of every bundle are float32
    }
    for (size_t i = 0; i < spec.elements(); ++i) {
      float value;
      std::memcpy(&value, data + i * sizeof(value), sizeof(value));
      value *= factor;
      std::memcpy(data + i * sizeof(value), &value, sizeof(value));
    }
  }
}

std::string number_text(double number) {
  char text[32];
  std::snprintf(text, sizeof(text), "%.6g", number);
  return text;
}

} // namespace fwl::internal
