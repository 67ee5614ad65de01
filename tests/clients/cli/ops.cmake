# The commands that ask a running daemon.
find_package(nlohmann_json CONFIG REQUIRED)
kvtide_add_test(kvtide_test_clients_cli_ops
  LIBS kvtide_cli_ops kvtide_planner nlohmann_json::nlohmann_json
  SOURCES
    config_command_test.cc
    doctor_checks_test.cc
    doctor_engine_test.cc
    ops_commands_test.cc
    seq_command_test.cc
    status_report_test.cc
    top_screen_test.cc
)
target_compile_definitions(kvtide_test_clients_cli_ops PRIVATE KVTIDE_DAEMON_PROGRAM="$<TARGET_FILE:kvtided>")
add_dependencies(kvtide_test_clients_cli_ops kvtided)
