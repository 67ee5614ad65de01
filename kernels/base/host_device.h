// KVTIDE_HD marks functions that run on the CPU and in CUDA kernels alike. In plain C++ it is empty, so that
// headers of the format layer compile with any compiler.
#pragma once

#ifdef __CUDACC__
#define KVTIDE_HD __host__ __device__
#else
#define KVTIDE_HD
#endif
