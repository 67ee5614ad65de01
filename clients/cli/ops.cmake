# The commands that ask a running daemon: status, top, doctor, seq.
find_package(CLI11 CONFIG REQUIRED)
find_package(nlohmann_json CONFIG REQUIRED)
kvtide_add_library(kvtide_cli_ops
  ops/config_command.cc
  ops/doctor_checks.cc
  ops/doctor_command.cc
  ops/doctor_engine.cc
  ops/health_command.cc
  ops/persist_command.cc
  ops/seq_command.cc
  ops/seq_verbs.cc
  ops/status_command.cc
  ops/status_report.cc
  ops/top_command.cc
  ops/top_screen.cc
)
target_compile_definitions(kvtide_cli_ops PRIVATE KVTIDE_VERSION="${PROJECT_VERSION}")
target_link_libraries(kvtide_cli_ops
  PUBLIC kvtide_client kvtide_cli_engine CLI11::CLI11
  PRIVATE kvtide_cli_connect kvtide_cli_plan kvtide_daemon kvtide_planner nlohmann_json::nlohmann_json ${CMAKE_DL_LIBS})
