# kvtide bench: what a pool takes by way and by tier, beside what the machine takes.
find_package(CLI11 CONFIG REQUIRED)
find_package(nlohmann_json CONFIG REQUIRED)
kvtide_add_library(kvtide_cli_bench
  bench/bench_command.cc
  bench/bench_report.cc
  bench/bench_run.cc
  bench/roofline.cc
)
target_link_libraries(kvtide_cli_bench
  PUBLIC kvtide_pool kvtide_cli_engine CLI11::CLI11
  PRIVATE kvtide_cli_ops kvtide_daemon kvtide_planner nlohmann_json::nlohmann_json)
