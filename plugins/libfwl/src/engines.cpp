#include "engines.h"

#include <algorithm>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <vector>

#include "error.h"

namespace fwl::internal {
namespace {

using nlohmann::json;

constexpr int kMetadataVersion = 1;
constexpr char kFolder[] = "engines/";
constexpr char kEnd[] = ".json";

bool ends_with(const std::string& text, const std::string& end) {
  return text.size() >= end.size() && text.compare(text.size() - end.size(), end.size(), end) == 0;
}

Engine read_metadata(const Bundle& bundle, const std::string& file) {
  const std::string content = checked_content(bundle, file);
  try {
    const json metadata = json::parse(content);
    if (metadata.at("schema_version") != kMetadataVersion) {
      throw Failure(FWL_ERROR_BUNDLE,
                    "'" + file + "' has schema_version " + metadata.at("schema_version").dump() +
                        ", but this libfwl reads " + std::to_string(kMetadataVersion) +
                        "; build the engine again");
    }
    const std::string name = file.substr(0, file.size() - (sizeof(kEnd) - 1));
    if (metadata.at("model_id") != bundle.model_id ||
        metadata.at("sha256") != bundle.files.at(name + ".engine").sha256) {
      throw Failure(FWL_ERROR_BUNDLE, "'" + name +
                                          "' was built from another model; build the "
                                          "engine again with `fwl-export build`");
    }
    Engine engine;
    engine.name = name.substr(sizeof(kFolder) - 1);
    engine.variant = metadata.at("flavour");
    engine.version = metadata.at("version");
    engine.sm = metadata.at("sm");
    engine.plugin = metadata.at("update_path") == "plugin";
    engine.embedded = metadata.at("plugin_embedded");
    engine.in_place = metadata.at("in_place_state");
    if (metadata.contains("in_place_tensors") && !metadata["in_place_tensors"].is_null()) {
      engine.in_place_tensors = metadata["in_place_tensors"].get<std::vector<std::string>>();
    }
    return engine;
  } catch (const json::exception& error) {
    throw Failure(FWL_ERROR_BUNDLE, "'" + file + "' is malformed (" + printable(error.what()) +
                                        "); build the engine again");
  } catch (const std::out_of_range&) {
    throw Failure(FWL_ERROR_BUNDLE,
                  "'" + file + "' describes an engine that is missing; build the engine again");
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
    part = static_cast<int>(std::strtol(at, &end, 10));
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
