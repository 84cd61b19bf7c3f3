// State files. fwl_export/bundle/state_file.py describes the format.
#pragma once

#include <string>
#include <vector>

#include "bundle.h"
#include "runtime.h"

namespace fwl::internal {

// The most rows of a session or a state file.
constexpr size_t kMaxRows = 1u << 20;

// The most tokens that a row may have read: far from where 64 bits overflow, and exact in double.
constexpr int64_t kMostTokens = int64_t{1} << 53;

// The state of one row outside a session: its tensors one after the other, in the model's order.
using RowState = std::vector<char>;

// Writes rows to a file beside the target, then renames it. If it throws Failure, what was at
// `path` is unchanged.
void save_state(const std::string& path, const Bundle& bundle, const std::vector<RowState>& rows);

// Reads rows. Throws Failure if the file cannot be read, is damaged, belongs to another model, or
// holds values that are not finite.
std::vector<RowState> load_state(const std::string& path, const Bundle& bundle);

// Checks the values of one row: all finite, and a position in range. Throws Failure; `source`
// names the row in its message.
void check_state(const Bundle& bundle, const RowState& row, const std::string& source);

// Converts a float16 number, given by its bits.
float from_half(uint16_t bits);

} // namespace fwl::internal
