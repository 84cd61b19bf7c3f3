// Reading of JSON that somebody else wrote: strict and bounded.
#pragma once

#include <cstdint>
#include <nlohmann/json.hpp>
#include <stdexcept>
#include <string>
#include <string_view>

namespace fwl::internal {

// Data from a file is not what it should be. The message says what, and the caller adds which file.
class Malformed final : public std::runtime_error {
public:
  using std::runtime_error::runtime_error;
};

// The largest integer that a double holds exactly; no number of a file may be larger.
constexpr int64_t kLargestInteger = int64_t{1} << 53;

// Returns the value of a JSON text. Throws Malformed for what JSON forbids, and also for an object
// that names a key twice, for deep nesting and for a text that does not start with '{'.
nlohmann::json parse_json(std::string_view text);

// The functions below throw Malformed if a value is missing, has another type or is out of range;
// `name` is what the message calls it.

// Returns a member of an object.
const nlohmann::json& member(const nlohmann::json& object, const std::string& name);

int64_t integer(const nlohmann::json& value, const std::string& name, int64_t least,
                int64_t most = kLargestInteger);

// Returns a text of at most `longest` bytes without control characters.
std::string text(const nlohmann::json& value, const std::string& name, size_t longest = 4096);

bool boolean(const nlohmann::json& value, const std::string& name);

// Checks that a value is an array of at most `most` elements, and returns it.
const nlohmann::json& array(const nlohmann::json& value, const std::string& name, size_t most);

// Checks that a value is an object, and returns it.
const nlohmann::json& object(const nlohmann::json& value, const std::string& name);

// Returns the value of a decimal number without sign, spaces or leading zeros.
int64_t decimal(std::string_view digits, const std::string& name, int64_t most = kLargestInteger);

} // namespace fwl::internal
