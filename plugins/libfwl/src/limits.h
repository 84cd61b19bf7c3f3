// Limits on what a session learns, and the norms of what its rows have learned. The Python twin is
// fwl_export/runtimes/limits.py.
#pragma once

#include <limits>

#include "state_file.h"

namespace fwl::internal {

// See the fields of these names in fwl_options; here infinity means no limit.
struct Limits {
  float max_learning_weight = 10; // rounded as weights and scales are
  double max_update_norm = std::numeric_limits<double>::infinity();
  double clip_update_norm = std::numeric_limits<double>::infinity();

  bool has_norm() const { return max_update_norm < std::numeric_limits<double>::infinity(); }
  bool clips() const { return clip_update_norm < std::numeric_limits<double>::infinity(); }
};

// Tokens of a row between two places where what it has learned is clipped. Calls of the model end
// there, as at anchors, so that the logits do not depend on how a text is split into feeds.
constexpr int64_t kClipInterval = 32;

// Returns the limits that a program asked for, where 0 stands for the default. Throws Failure.
Limits limits_of(double max_learning_weight, double max_update_norm, double clip_update_norm = 0);

// Returns the norm over all fast weights of a row: the root of the sum of their squares.
double learned_norm(const Bundle& bundle, const RowState& row);

// Multiplies all fast weights of a row by a factor.
void scale_learned(const Bundle& bundle, RowState& row, float factor);

// Returns a number for a message: six digits at most, without trailing zeros.
std::string number_text(double number);

} // namespace fwl::internal
