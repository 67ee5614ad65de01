# kvtide fleet replay: the daemon's cache over tiers without memory.
find_package(CLI11 CONFIG REQUIRED)
find_package(nlohmann_json CONFIG REQUIRED)
kvtide_add_library(kvtide_cli_replay plan/replay_command.cc)
target_link_libraries(kvtide_cli_replay
  PUBLIC kvtide_trace CLI11::CLI11
  PRIVATE kvtide_cli_terminal kvtide_cli_plan kvtide_planner nlohmann_json::nlohmann_json)
