find_package(benchmark CONFIG REQUIRED)
kvtide_add_executable(kvtide_bench_attend_metadata ${CMAKE_CURRENT_LIST_DIR}/attend_metadata_bench.cc)
target_link_libraries(kvtide_bench_attend_metadata PRIVATE kvtide_cache benchmark::benchmark benchmark::benchmark_main ${CMAKE_DL_LIBS})
