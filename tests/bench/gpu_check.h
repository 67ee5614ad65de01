// A benchmark ends at the first CUDA call that fails, with the call and its line.
#pragma once

#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>

#define KVTIDE_BENCH_CUDA(x)                                                       \
  do {                                                                             \
    const cudaError_t error_ = (x);                                                \
    if (error_ != cudaSuccess) {                                                   \
      std::printf("%s: %s (line %d)\n", #x, cudaGetErrorString(error_), __LINE__); \
      std::exit(1);                                                                \
    }                                                                              \
  } while (0)
