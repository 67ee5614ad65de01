// JSON as commands print it: names of others need not be UTF-8, and show no control character.
#pragma once

#include <string>

#include "clients/cli/terminal/terminal.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {

// Ends with a newline. What is no UTF-8 becomes U+FFFD.
inline std::string JsonText(const nlohmann::ordered_json& json, int indent = 2) {
  return PrintableJson(json.dump(indent, ' ', false, nlohmann::ordered_json::error_handler_t::replace)) +
         "\n";
}

}  // namespace kvtide::cli
