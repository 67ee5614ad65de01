find_package(benchmark CONFIG REQUIRED)
kvtide_add_executable(kvtide_bench_prefix ${CMAKE_CURRENT_LIST_DIR}/prefix_bench.cc)
target_link_libraries(kvtide_bench_prefix PRIVATE kvtide_cache benchmark::benchmark)
