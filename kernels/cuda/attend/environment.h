// What attention computes with on one device.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>

namespace kvtide {
class SecondHand;
}

namespace kvtide::cuda {

class ProfileStore;
class Rotations;

struct AttendEnvironment {
  int processors = 0;
  size_t scratch_bytes = 0;
  // Queries and results of up to so many bytes are read and written where they lie in pinned memory of the
  // host.
  size_t in_place_bytes = 0;
  SecondHand* hand = nullptr;  // helps to copy queries and results of large calls, or null
  Rotations* rotations = nullptr;
  ProfileStore* profiles = nullptr;
  bool read_in_place = true;   // f16 blocks by prefills; else their addresses are not known to the host
  int most_decode_rows = 256;  // items with more rows per KV head are prefill (prefill_call.h)
  // Of the code that the device runs (device_image.h): shared memory of a CTA, 0 = the most that this build
  // counts on; prefill kernels for 9.x only; launches that overlap, from 9.0 on.
  int shared_limit = 0;
  bool warpgroups = true, dependent_launches = true;
  // Recorded around the kernels of a batch if not null: benchmarks measure with them.
  cudaEvent_t begin = nullptr, end = nullptr;
};

}  // namespace kvtide::cuda
