// Values of GGUF tensors: the plain types f32, f16 and bf16, and ggml's groups of 32 values (q4_0 .. q8_0) or
// 256 (q2_K .. q6_K), as ggml-common.h of llama.cpp lays them out, little-endian. A group decodes to scale *
// code (+ minimum), computed in f32 as ggml does.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace kvtide::engine {

// ggml's numbers of the types that are read.
enum class GgufType : uint32_t {
  kF32 = 0,
  kF16 = 1,
  kQ4_0 = 2,
  kQ4_1 = 3,
  kQ5_0 = 6,
  kQ5_1 = 7,
  kQ8_0 = 8,
  kQ2K = 10,
  kQ3K = 11,
  kQ4K = 12,
  kQ5K = 13,
  kQ6K = 14,
  kBf16 = 30,
};

struct GgufTypeInfo {
  const char* name = nullptr;
  int group = 0, bytes = 0;  // values and bytes of a group
};
// name is null for a type that is not read.
GgufTypeInfo InfoOfGguf(uint32_t type);

// Decodes `values` values, whole groups. `from` may be unaligned.
void DecodeGguf(GgufType type, const std::byte* from, size_t values, float* to);

}  // namespace kvtide::engine
