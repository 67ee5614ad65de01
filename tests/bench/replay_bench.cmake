find_package(nlohmann_json CONFIG REQUIRED)
find_package(CLI11 CONFIG REQUIRED)
kvtide_add_executable(kvtide_bench_replay ${CMAKE_CURRENT_LIST_DIR}/replay_bench.cc)
target_link_libraries(kvtide_bench_replay PRIVATE kvtide_trace nlohmann_json::nlohmann_json CLI11::CLI11)
