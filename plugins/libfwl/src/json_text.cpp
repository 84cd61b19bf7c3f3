#include "json_text.h"

#include <algorithm>
#include <set>
#include <vector>

#include "error.h"

namespace fwl::internal {
namespace {

using nlohmann::json;

constexpr size_t kDeepest = 16;

// Goes through a JSON text without keeping it. nlohmann's parser does the rest of the checking; it
// does not see keys that occur twice, and it keeps the last.
class Checker final : public json::json_sax_t {
public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(size_t) override { return open(); }
  bool start_array(size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool end_array() override { return close(); }
  bool key(string_t& name) override {
    if (!keys_.back().insert(name).second) {
      throw Malformed("the key '" + printable(name.c_str()) + "' occurs twice");
    }
    return true;
  }
  bool parse_error(size_t, const std::string&, const json::exception& error) override {
    throw Malformed(printable(error.what()));
  }

private:
  bool open() {
    if (keys_.size() == kDeepest) {
      throw Malformed("it is nested more than " + std::to_string(kDeepest) + " deep");
    }
    keys_.emplace_back();
    return true;
  }
  bool close() {
    keys_.pop_back();
    return true;
  }

  std::vector<std::set<std::string>> keys_; // of the objects that are open
};

[[noreturn]] void expected(const std::string& name, const std::string& what) {
  throw Malformed("'" + name + "' is not " + what);
}

} // namespace

json parse_json(std::string_view text) {
  // nlohmann's parser skips a byte-order mark, and takes a NUL byte for the end.
  if (text.empty() || text.front() != '{' || text.find('\0') != std::string_view::npos) {
    throw Malformed("it is not a JSON object");
  }
  Checker checker;
  json::sax_parse(text.begin(), text.end(), &checker);
  return json::parse(text.begin(), text.end());
}

const json& member(const json& value, const std::string& name) {
  const auto found = value.is_object() ? value.find(name) : value.end();
  if (found == value.end()) {
    throw Malformed("'" + name + "' is missing");
  }
  return *found;
}

int64_t integer(const json& value, const std::string& name, int64_t least, int64_t most) {
  // "-0" is a signed number for nlohmann; what is not negative is unsigned.
  if (value.is_number_unsigned() && value.get<uint64_t>() <= static_cast<uint64_t>(most) &&
      static_cast<int64_t>(value.get<uint64_t>()) >= least) {
    return static_cast<int64_t>(value.get<uint64_t>());
  }
  expected(name, "a whole number from " + std::to_string(least) + " to " + std::to_string(most));
}

std::string text(const json& value, const std::string& name, size_t longest) {
  const std::string* const found = value.get_ptr<const std::string*>();
  const auto is_control = [](char c) { return static_cast<unsigned char>(c) < ' ' || c == 127; };
  if (found == nullptr || found->size() > longest ||
      std::any_of(found->begin(), found->end(), is_control)) {
    expected(name,
             "a text of at most " + std::to_string(longest) + " bytes without control characters");
  }
  return *found;
}

bool boolean(const json& value, const std::string& name) {
  if (!value.is_boolean()) {
    expected(name, "true or false");
  }
  return value.get<bool>();
}

const json& array(const json& value, const std::string& name, size_t most) {
  if (!value.is_array() || value.size() > most) {
    expected(name, "a list of at most " + std::to_string(most) + " elements");
  }
  return value;
}

const json& object(const json& value, const std::string& name) {
  if (!value.is_object()) {
    expected(name, "an object");
  }
  return value;
}

int64_t decimal(std::string_view digits, const std::string& name, int64_t most) {
  int64_t number = 0;
  bool valid = !digits.empty() && digits.size() < 18 && (digits.size() == 1 || digits[0] != '0');
  for (const char digit : digits) {
    valid = valid && digit >= '0' && digit <= '9';
    number = valid ? 10 * number + (digit - '0') : 0;
  }
  if (!valid || number > most) {
    expected(name, "a number from 0 to " + std::to_string(most));
  }
  return number;
}

} // namespace fwl::internal
