// State files; fwl_export/bundle/state_file.py says what is in them.
#pragma once

#include <string>
#include <vector>

#include "backend.h"
#include "bundle.h"

namespace fwl::internal {

// Rows of state outside a session, the tensors of a row one after the other.
using RowState = std::vector<char>;

// Writes rows beside the file, then renames. Throws Failure, and leaves what was there.
void save_state(const std::string& path, const Bundle& bundle, const std::vector<RowState>& rows);

// Throws Failure: the file is damaged, of another model, or holds values that are not finite.
std::vector<RowState> load_state(const std::string& path, const Bundle& bundle);

// Throws Failure: the state is not one of this model, as far as can be seen.
void check_state(const Bundle& bundle, const RowState& row, const std::string& source);

float from_half(uint16_t bits);

} // namespace fwl::internal
