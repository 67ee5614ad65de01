find_package(benchmark CONFIG REQUIRED)
kvtide_add_executable(kvtide_bench_cache ${CMAKE_CURRENT_LIST_DIR}/cache_bench.cc)
target_link_libraries(kvtide_bench_cache PRIVATE kvtide_cache benchmark::benchmark benchmark::benchmark_main)
