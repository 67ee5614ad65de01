#include "clients/engine/gguf_blocks.h"

#include <cstring>

#include "kernels/base/check.h"
#include "kernels/base/float16.h"

namespace kvtide::engine {
namespace {

constexpr int kSuper = 256;  // values of a K-group

uint16_t Bits16(const uint8_t* p) { return static_cast<uint16_t>(p[0] | p[1] << 8); }
float Half(const uint8_t* p) { return F16ToF32(Bits16(p)); }
uint32_t Bits32(const uint8_t* p) {
  return static_cast<uint32_t>(p[0]) | static_cast<uint32_t>(p[1]) << 8 | static_cast<uint32_t>(p[2]) << 16 |
         static_cast<uint32_t>(p[3]) << 24;
}

// Of 32 values: the low nibbles of 16 bytes are values 0..15, the high ones 16..31.
void DecodeFours(const uint8_t* codes, float scale, float minimum, int offset, float* to) {
  for (int i = 0; i < 16; ++i) {
    to[i] = static_cast<float>((codes[i] & 15) - offset) * scale + minimum;
    to[i + 16] = static_cast<float>((codes[i] >> 4) - offset) * scale + minimum;
  }
}

// The same with a fifth bit of each value in a word.
void DecodeFives(const uint8_t* codes, uint32_t fifth, float scale, float minimum, int offset, float* to) {
  for (int i = 0; i < 16; ++i) {
    const int low = (codes[i] & 15) | static_cast<int>(fifth >> i & 1) << 4;
    const int high = codes[i] >> 4 | static_cast<int>(fifth >> (i + 16) & 1) << 4;
    to[i] = static_cast<float>(low - offset) * scale + minimum;
    to[i + 16] = static_cast<float>(high - offset) * scale + minimum;
  }
}

// Scale and minimum of the eight 32-value parts of q4_K and q5_K: 6 bits each in 12 bytes.
void PartScale(int part, const uint8_t* packed, int* scale, int* minimum) {
  if (part < 4) {
    *scale = packed[part] & 63;
    *minimum = packed[part + 4] & 63;
  } else {
    *scale = (packed[part + 4] & 15) | (packed[part - 4] >> 6) << 4;
    *minimum = packed[part + 4] >> 4 | (packed[part] >> 6) << 4;
  }
}

// [16 bytes of 4-bit scales and minima][64 bytes of 2-bit codes][scale][minimum]
void DecodeQ2K(const uint8_t* from, float* to) {
  const float scale = Half(from + 80), minimum = Half(from + 82);
  for (int i = 0; i < kSuper; ++i) {
    const int half = i / 128, shift = i % 128 / 32 * 2, byte = half * 32 + i % 32;
    const uint8_t part = from[i / 16];
    to[i] = scale * static_cast<float>(part & 15) * static_cast<float>(from[16 + byte] >> shift & 3) -
            minimum * static_cast<float>(part >> 4);
  }
}

// [32 bytes of third bits][64 bytes of 2-bit codes][12 bytes of 6-bit scales][scale]
void DecodeQ3K(const uint8_t* from, float* to) {
  const uint8_t *third = from, *codes = from + 32, *packed = from + 96;
  const float scale = Half(from + 108);
  int scales[16];
  for (int i = 0; i < 16; ++i) {
    const int low = i < 8 ? packed[i] & 15 : packed[i - 8] >> 4;
    scales[i] = (low | (packed[8 + i % 4] >> (i / 4 * 2) & 3) << 4) - 32;
  }
  for (int i = 0; i < kSuper; ++i) {
    const int half = i / 128, quarter = i % 128 / 32, byte = half * 32 + i % 32;
    const int code =
        (codes[byte] >> (2 * quarter) & 3) - ((third[i % 32] >> (4 * half + quarter) & 1) ? 0 : 4);
    to[i] = scale * static_cast<float>(scales[i / 16]) * static_cast<float>(code);
  }
}

// [scale][minimum][12 bytes of 6-bit scales and minima][128 bytes of codes]
void DecodeQ4K(const uint8_t* from, float* to) {
  const float scale = Half(from), minimum = Half(from + 2);
  for (int part = 0; part < 8; ++part) {
    int s = 0, m = 0;
    PartScale(part, from + 4, &s, &m);
    const float d = scale * static_cast<float>(s), low = minimum * static_cast<float>(m);
    const uint8_t* codes = from + 16 + part / 2 * 32;
    for (int i = 0; i < 32; ++i)
      to[32 * part + i] = d * static_cast<float>(part % 2 == 0 ? codes[i] & 15 : codes[i] >> 4) - low;
  }
}

// [scale][minimum][12 bytes of 6-bit scales and minima][32 bytes of fifth bits][128 bytes of codes]
void DecodeQ5K(const uint8_t* from, float* to) {
  const float scale = Half(from), minimum = Half(from + 2);
  const uint8_t* fifth = from + 16;
  for (int part = 0; part < 8; ++part) {
    int s = 0, m = 0;
    PartScale(part, from + 4, &s, &m);
    const float d = scale * static_cast<float>(s), low = minimum * static_cast<float>(m);
    const uint8_t* codes = from + 48 + part / 2 * 32;
    for (int i = 0; i < 32; ++i) {
      const int code = (part % 2 == 0 ? codes[i] & 15 : codes[i] >> 4) | (fifth[i] >> part & 1) << 4;
      to[32 * part + i] = d * static_cast<float>(code) - low;
    }
  }
}

// [128 bytes of low nibbles][64 bytes of upper pairs][16 scales of 8 bits][scale]
void DecodeQ6K(const uint8_t* from, float* to) {
  const uint8_t *low = from, *high = from + 128;
  const auto* scales = reinterpret_cast<const int8_t*>(from + 192);
  const float scale = Half(from + 208);
  for (int i = 0; i < kSuper; ++i) {
    const int half = i / 128, quarter = i % 128 / 32, place = i % 32;
    const uint8_t nibbles = low[64 * half + 32 * (quarter % 2) + place];
    const int code =
        ((quarter < 2 ? nibbles & 15 : nibbles >> 4) | (high[32 * half + place] >> (2 * quarter) & 3) << 4) -
        32;
    to[i] = scale * static_cast<float>(scales[i / 16]) * static_cast<float>(code);
  }
}

void DecodeGroup(GgufType type, const uint8_t* from, float* to) {
  switch (type) {
    case GgufType::kF32:
      std::memcpy(to, from, 4);
      return;
    case GgufType::kF16:
      *to = Half(from);
      return;
    case GgufType::kBf16:
      *to = Bf16ToF32(Bits16(from));
      return;
    case GgufType::kQ4_0:
      return DecodeFours(from + 2, Half(from), 0, 8, to);
    case GgufType::kQ4_1:
      return DecodeFours(from + 4, Half(from), Half(from + 2), 0, to);
    case GgufType::kQ5_0:
      return DecodeFives(from + 6, Bits32(from + 2), Half(from), 0, 16, to);
    case GgufType::kQ5_1:
      return DecodeFives(from + 8, Bits32(from + 4), Half(from), Half(from + 2), 0, to);
    case GgufType::kQ8_0:
      for (int i = 0; i < 32; ++i) to[i] = Half(from) * static_cast<float>(static_cast<int8_t>(from[2 + i]));
      return;
    case GgufType::kQ2K:
      return DecodeQ2K(from, to);
    case GgufType::kQ3K:
      return DecodeQ3K(from, to);
    case GgufType::kQ4K:
      return DecodeQ4K(from, to);
    case GgufType::kQ5K:
      return DecodeQ5K(from, to);
    case GgufType::kQ6K:
      return DecodeQ6K(from, to);
  }
}

}  // namespace

GgufTypeInfo InfoOfGguf(uint32_t type) {
  switch (static_cast<GgufType>(type)) {
    case GgufType::kF32:
      return {"F32", 1, 4};
    case GgufType::kF16:
      return {"F16", 1, 2};
    case GgufType::kBf16:
      return {"BF16", 1, 2};
    case GgufType::kQ4_0:
      return {"Q4_0", 32, 18};
    case GgufType::kQ4_1:
      return {"Q4_1", 32, 20};
    case GgufType::kQ5_0:
      return {"Q5_0", 32, 22};
    case GgufType::kQ5_1:
      return {"Q5_1", 32, 24};
    case GgufType::kQ8_0:
      return {"Q8_0", 32, 34};
    case GgufType::kQ2K:
      return {"Q2_K", 256, 84};
    case GgufType::kQ3K:
      return {"Q3_K", 256, 110};
    case GgufType::kQ4K:
      return {"Q4_K", 256, 144};
    case GgufType::kQ5K:
      return {"Q5_K", 256, 176};
    case GgufType::kQ6K:
      return {"Q6_K", 256, 210};
  }
  return {};
}

void DecodeGguf(GgufType type, const std::byte* from, size_t values, float* to) {
  const GgufTypeInfo info = InfoOfGguf(static_cast<uint32_t>(type));
  const auto group = static_cast<size_t>(info.group);
  KVTIDE_CHECK(info.name != nullptr && values % group == 0);
  const auto* bytes = reinterpret_cast<const uint8_t*>(from);
  for (size_t i = 0; i < values / group; ++i)
    DecodeGroup(type, bytes + i * static_cast<size_t>(info.bytes), to + i * group);
}

}  // namespace kvtide::engine
