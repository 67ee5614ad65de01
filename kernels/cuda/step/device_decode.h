// Decode attention for engines that compute on the GPU themselves, over pages in its memory: their own, or
// the daemon's, mapped by CUDA IPC. One query token per sequence. Everything is device memory of the caller,
// calls only put kernels on the caller's stream, and how the work is cut is decided on the device: a CUDA
// graph that captured Plan and the Attend calls of all layers replays with the lengths, block tables, queries
// and blocks of that moment.
//
//   auto decode = DeviceDecode::Make(options, layers);   // allocates; not while a capture is under way
//   decode->Plan(stream);                                // once per step: reads lengths and tables
//   for (each layer) { ...; decode->Attend(layer, stream); }
//
// Not thread-safe: one step at a time, on one stream. The device current at Make must be current in all
// calls.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/data_type.h"
#include "kernels/format/block_layout.h"

namespace kvtide {

// The blocks of one kind (coded, or exact = f16) of all sequences; rows of a table are `max_blocks` long.
struct DecodeTable {
  const std::byte* const* blocks =
      nullptr;  // [max_sequences][max_blocks] start of each block; null: no blocks of this kind
  const int32_t* tokens = nullptr;  // [max_sequences], 0 = none, at most 64 * max_blocks
  // [max_sequences] tokens at the beginning that the query does not see (sliding windows), or null = none.
  const int32_t* hidden = nullptr;
  int max_blocks = 0;
};

struct DecodeOptions {
  GroupShape shape;                // of the layer group; all its layers share lengths and tables
  CachePair pair;                  // of the coded blocks; f16/f16 if there are only exact ones
  int heads = 0;                   // query heads: up to 16 for each KV head
  int max_sequences = 0;           // 1..4096; those without tokens get output 0 and log-sum-exp -inf
  float scale = 0;                 // of q.k; usually 1/sqrt(head_dim_k)
  float softcap = 0;               // 0 = none; else logit = softcap * tanh(logit / softcap)
  DataType type = DataType::kF16;  // of q and out
  DecodeTable coded, exact;
};

// Where one layer's tensors lie; layers may share buffers.
struct DecodeLayer {
  int layer = 0;            // within the layer group
  const void* q = nullptr;  // [max_sequences][heads][head_dim_k], unrotated
  void* out = nullptr;      // [max_sequences][heads][head_dim_v]
  float* lse = nullptr;     // [max_sequences][heads], natural log
  // Profile of the coded keys (kernels/format/profile.h), or null.
  const float* k_mean = nullptr;  // [max_sequences][kv_heads][head_dim_k]
  const float* k_gain = nullptr;  // same
  const float* sinks = nullptr;   // [heads], an extra logit that takes part with value 0, or null
};

class DeviceDecode {
 public:
  virtual ~DeviceDecode() = default;
  // InvalidArgument for a shape or pair that has no kernel of its own, ResourceExhausted when memory is
  // short.
  static absl::StatusOr<std::unique_ptr<DeviceDecode>> Make(const DecodeOptions& options,
                                                            const std::vector<DecodeLayer>& layers);

  // Once for each step, before the first Attend: one kernel for all layers.
  virtual absl::Status Plan(cudaStream_t stream) = 0;
  // `index` into `layers`.
  virtual absl::Status Attend(int index, cudaStream_t stream) = 0;
  // What Make allocated on the device.
  virtual size_t device_bytes() const = 0;
};

}  // namespace kvtide
