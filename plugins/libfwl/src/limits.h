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

  bool has_norm() const { return max_update_norm < std::numeric_limits<double>::infinity(); }
};

// Returns the limits that a program asked for, where 0 stands for the default. Throws Failure.
Limits limits_of(double max_learning_weight, double max_update_norm);

// Returns the norm over all fast weights of a row: the root of the sum of their squares.
double learned_norm(const Bundle& bundle, const RowState& row);

// Returns a number for a message: six digits at most, without trailing zeros.
std::string number_text(double number);

} // namespace fwl::internal
