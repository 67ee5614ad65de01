// Logging of the daemon: one line for each event on stderr, a message and key=value pairs, by spdlog; gRPC's
// own messages go the same way. Colour only on a terminal and never with NO_COLOR.
#pragma once

#include <string>

namespace kvtide {

// `level`: trace, debug, info, warning or error. `json`: an object a line (log_json.h). Call once, before
// threads start.
void SetUpLogging(const std::string& level, bool json);

// Of what is logged from now on. Any thread.
void SetLogLevel(const std::string& level);

}  // namespace kvtide
