# kvtide connect: how engines use kvtide. Needs neither the daemon nor an engine.
find_package(CLI11 CONFIG REQUIRED)
find_package(nlohmann_json CONFIG REQUIRED)
kvtide_add_library(kvtide_cli_connect
  connect/connect_command.cc
  connect/connect_plan.cc
  terminal/shell_words.cc
)
target_link_libraries(kvtide_cli_connect
  PUBLIC kvtide_planner CLI11::CLI11 nlohmann_json::nlohmann_json
  PRIVATE kvtide_cli_plan kvtide_cli_terminal kvtide_client)
