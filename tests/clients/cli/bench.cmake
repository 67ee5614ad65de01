# kvtide bench.
find_package(nlohmann_json CONFIG REQUIRED)
kvtide_add_test(kvtide_test_clients_cli_bench
  LIBS kvtide_cli_bench nlohmann_json::nlohmann_json
  SOURCES bench_command_test.cc
)
target_compile_definitions(kvtide_test_clients_cli_bench PRIVATE KVTIDE_DAEMON_PROGRAM="$<TARGET_FILE:kvtided>")
add_dependencies(kvtide_test_clients_cli_bench kvtided)
