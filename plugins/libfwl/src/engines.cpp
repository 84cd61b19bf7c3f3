#include "engines.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "error.h"
#include "json_text.h"

namespace fwl::internal {
namespace {

using nlohmann::json;

constexpr int kMetadataVersion = 1;
constexpr char kFolder[] = "engines/";
constexpr char kEnd[] = ".json";
constexpr uint64_t kMetadataBytes = 4 << 20;
constexpr size_t kLongestText = 128;
constexpr int64_t kLargestSm = 10000;

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

// Reads the metadata of an engine; `name` is its path inside the bundle, without an ending.
Engine parse_metadata(const json& metadata, const Bundle& bundle, const std::string& name) {
  const json& version = member(metadata, "schema_version");
  if (!version.is_number_unsigned() || version != kMetadataVersion) {
    throw Failure(FWL_ERROR_BUNDLE,
                  "'" + name + kEnd + "' has schema_version " + printable(version.dump().c_str()) +
                      ", but this libfwl reads " + std::to_string(kMetadataVersion) +
                      "; build the engine again");
  }
  const auto file = bundle.files.find(name + ".engine");
  if (file == bundle.files.end()) {
    throw Failure(FWL_ERROR_BUNDLE, "'" + name + kEnd +
                                        "' describes an engine that is missing; build the engine "
                                        "again");
  }
  if (text(member(metadata, "model_id"), "model_id") != bundle.model_id ||
      text(member(metadata, "sha256"), "sha256") != file->second.sha256) {
    throw Failure(FWL_ERROR_BUNDLE, "'" + name +
                                        "' was built from another model; build the "
                                        "engine again with `fwl-export build`");
  }
  Engine engine;
  engine.name = name.substr(sizeof(kFolder) - 1);
  engine.variant = text(member(metadata, "flavour"), "flavour", kLongestText);
  engine.version = text(member(metadata, "version"), "version", kLongestText);
  engine.sm = static_cast<int>(integer(member(metadata, "sm"), "sm", 1, kLargestSm));
  engine.plugin = text(member(metadata, "update_path"), "update_path", kLongestText) == "plugin";
  engine.embedded = boolean(member(metadata, "plugin_embedded"), "plugin_embedded");
  engine.in_place = boolean(member(metadata, "in_place_state"), "in_place_state");
  const auto tensors = metadata.find("in_place_tensors");
  if (tensors != metadata.end() && !tensors->is_null()) {
    engine.in_place_tensors.emplace();
    for (const json& tensor : array(*tensors, "in_place_tensors", bundle.state.size())) {
      engine.in_place_tensors->push_back(text(tensor, "in_place_tensors"));
    }
  }
  return engine;
}

Engine read_metadata(const Bundle& bundle, const std::string& file) {
  const auto entry = bundle.files.find(file);
  if (entry != bundle.files.end() && entry->second.bytes > kMetadataBytes) {
    throw Failure(FWL_ERROR_BUNDLE, "'" + file + "' has " + std::to_string(entry->second.bytes) +
                                        " bytes; expected at most " +
                                        std::to_string(kMetadataBytes));
  }
  try {
    return parse_metadata(parse_json(checked_content(bundle, file)), bundle,
                          file.substr(0, file.size() - (sizeof(kEnd) - 1)));
  } catch (const Malformed& error) {
    throw Failure(FWL_ERROR_BUNDLE, "'" + file + "' is malformed (" + printable(error.what()) +
                                        "); build the engine again");
  }
}

std::string build_command(const Bundle& bundle, const Place& place) {
  return "`fwl-export build " + bundle.folder + " --variant " + place.variant + " --sm " +
         std::to_string(place.sm) + "`";
}

bool is_usable(const Engine& engine, const Place& place) {
  return !engine.plugin || (engine.embedded ? place.allows_embedded : place.has_plugin);
}

} // namespace

std::array<int, 3> version_of(const std::string& text) {
  std::array<int, 3> version{};
  const char* at = text.c_str();
  for (int& part : version) {
    char* end = nullptr;
    part = static_cast<int>(std::clamp<long>(std::strtol(at, &end, 10), 0, 1 << 20));
    at = *end == '.' ? end + 1 : end;
  }
  return version;
}

std::string version_text(const std::array<int, 3>& version) {
  return std::to_string(version[0]) + "." + std::to_string(version[1]) + "." +
         std::to_string(version[2]);
}

Engine choose_engine(const Bundle& bundle, const Place& place) {
  std::vector<Engine> fitting;
  std::string others;
  for (const auto& file : bundle.files) {
    if (file.first.rfind(kFolder, 0) != 0 || !ends_with(file.first, kEnd)) {
      continue;
    }
    Engine engine = read_metadata(bundle, file.first);
    if (engine.variant == place.variant && engine.sm == place.sm &&
        version_of(engine.version) == place.version) {
      fitting.push_back(std::move(engine));
    } else {
      others += (others.empty() ? "; it has " : ", ") + engine.name;
    }
  }
  const std::string here =
      place.title + " " + version_text(place.version) + " on SM" + std::to_string(place.sm);
  if (fitting.empty()) {
    throw Absent(FWL_ERROR_BUNDLE, "bundle '" + bundle.folder + "' has no engine for " + here +
                                       others + "; build one with " + build_command(bundle, place));
  }
  // Engines that can run are better than others, then those with fwl's plugin, then those that need
  // no copy of the old state.
  const auto rank = [&](const Engine& engine) {
    return std::array<bool, 3>{is_usable(engine, place), engine.plugin, !engine.in_place};
  };
  const Engine& best =
      *std::max_element(fitting.begin(), fitting.end(),
                        [&](const Engine& a, const Engine& b) { return rank(a) < rank(b); });
  if (!is_usable(best, place)) {
    throw Failure(FWL_ERROR_RUNTIME,
                  best.embedded ? "engine '" + best.name +
                                      "' carries a plugin, code that would run in this "
                                      "process; if you trust the bundle, set allow_embedded_plugin"
                                : "engine '" + best.name +
                                      "' needs fwl's plugin; give the path of "
                                      "libfwl_trt.so as tensorrt_plugin");
  }
  if (place.wants_plugin && !best.plugin) {
    throw Failure(FWL_ERROR_BUNDLE, "tensorrt_plugin was given, but no engine for " + here +
                                        " uses it; build one with " + build_command(bundle, place) +
                                        " --plugin required");
  }
  return best;
}

} // namespace fwl::internal
