find_package(benchmark CONFIG REQUIRED)
kvtide_add_executable(engine_bench ${CMAKE_CURRENT_LIST_DIR}/engine_bench.cc)
target_link_libraries(engine_bench PRIVATE kvtide_engine benchmark::benchmark)
