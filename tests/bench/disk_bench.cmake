find_package(benchmark CONFIG REQUIRED)
kvtide_add_executable(kvtide_bench_disk ${CMAKE_CURRENT_LIST_DIR}/disk_bench.cc)
target_link_libraries(kvtide_bench_disk PRIVATE kvtide_disk benchmark::benchmark benchmark::benchmark_main)
