// State files. fwl_export/bundle/state_file.py describes the format.
#pragma once

#include <string>
#include <vector>

#include "bundle.h"
#include "runtime.h"

namespace fwl::internal {

// The most rows of a session or a state file.
constexpr size_t kMaxRows = 1u << 20;

// The most tokens that a row can have read, unless the model says fewer; the same in Python.
constexpr int64_t kMostTokens = int64_t{1} << 53;

// The state of one row outside a session: its tensors one after the other, in the model's order.
using RowState = std::vector<char>;

// Writes rows to a file that then takes the place of what was at `path`; see OutputFile.
void save_state(const std::string& path, const Bundle& bundle, const std::vector<RowState>& rows);

// Reads a file of `rows` rows. Before it takes memory for them, it compares the file's sizes with
// the model and with `rows`. Throws Failure if the file cannot be read, is damaged, belongs to
// another model, has another number of rows, or holds values that are not finite.
std::vector<RowState> load_state(const std::string& path, const Bundle& bundle, size_t rows);

// Checks the values of one row: all finite, and a position that the model can reach. Throws
// Failure; `source` names the row in its message.
void check_state(const Bundle& bundle, const RowState& row, const std::string& source);

// Converts a float16 number, given by its bits.
float from_half(uint16_t bits);

} // namespace fwl::internal
