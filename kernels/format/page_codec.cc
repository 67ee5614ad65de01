#include "kernels/format/page_codec.h"

#include <vector>

#include "kernels/base/check.h"
#include "kernels/format/tide.h"
#include "kernels/format/tide_codec.h"

namespace kvtide {
namespace {

constexpr int kMaxDim = 512;

template <class C>
void EncodeExact(const HalfLayout& layout, const float* rows, int tokens, std::byte* half) {
  auto* values = reinterpret_cast<uint16_t*>(half);
  for (int t = 0; t < kBlockTokens; t++)
    for (int i = 0; i < layout.stored_dim; i++) {
      const bool present = t < tokens && i < layout.head_dim;
      values[HalfPrecisionIndex(t, i, layout.stored_dim)] =
          present ? C::Pack(rows[static_cast<size_t>(t) * static_cast<size_t>(layout.head_dim) +
                                 static_cast<size_t>(i)])
                  : uint16_t{0};
    }
}

CodeOwner Owner(Side side, CodePlace place, int stored_dim) {
  return side == Side::kKey ? KeyOwner(place, stored_dim) : ValueOwner(place, stored_dim);
}

template <class C>
void PackPlane(Side side, const HalfLayout& layout, const std::vector<uint8_t>& codes, std::byte* plane) {
  const int d = layout.stored_dim;
  for (int quad = 0; quad < 2 * (d / 32); quad++)
    for (int lane = 0; lane < 32; lane++) {
      uint8_t own[32];
      uint32_t words[C::kBits];
      for (int u = 0; u < 4; u++)
        for (int e = 0; e < 8; e++) {
          const CodeOwner owner = Owner(side, {quad, lane, u, e}, d);
          own[8 * u + e] = codes[static_cast<size_t>(owner.token * d + owner.dim)];
        }
      PackQuad<C::kBits>(own, words);
      for (int w = 0; w < C::kBits; w++) StoreWord(plane, quad * C::kBits + w, lane, words[w]);
    }
}

template <class C>
void UnpackPlane(Side side, const HalfLayout& layout, const std::byte* plane, std::vector<uint8_t>& codes) {
  const int d = layout.stored_dim;
  for (int quad = 0; quad < 2 * (d / 32); quad++)
    for (int lane = 0; lane < 32; lane++) {
      uint8_t own[32];
      uint32_t words[C::kBits];
      for (int w = 0; w < C::kBits; w++) words[w] = LoadWord(plane, quad * C::kBits + w, lane);
      UnpackQuad<C::kBits>(words, own);
      for (int u = 0; u < 4; u++)
        for (int e = 0; e < 8; e++) {
          const CodeOwner owner = Owner(side, {quad, lane, u, e}, d);
          codes[static_cast<size_t>(owner.token * d + owner.dim)] = own[8 * u + e];
        }
    }
}

template <class C>
void EncodeCoded(Side side, const HalfLayout& layout, const HeadProfile* profile, const float* rows,
                 int tokens, std::byte* half) {
  const int d = layout.stored_dim;
  std::memset(half, 0, layout.bytes);
  std::vector<uint8_t> codes(static_cast<size_t>(kBlockTokens * d));
  auto* scales = reinterpret_cast<uint16_t*>(half + layout.code_bytes);
  for (int t = 0; t < kBlockTokens; t++) {
    float y[kMaxDim] = {};
    uint16_t own[kMaxDim / 32];
    if (t < tokens)
      for (int i = 0; i < layout.head_dim; i++) {
        y[i] = rows[static_cast<size_t>(t * layout.head_dim + i)];
        if (profile != nullptr && !profile->mean.empty()) y[i] -= profile->mean[static_cast<size_t>(i)];
        if (profile != nullptr && !profile->gain.empty()) y[i] *= profile->gain[static_cast<size_t>(i)];
      }
    EncodeVector<C>(y, d, side, codes.data() + static_cast<size_t>(t * d), own);
    for (int g = 0; g < layout.groups; g++) scales[g * kBlockTokens + t] = own[g];
  }
  PackPlane<C>(side, layout, codes, half);
}

template <class C>
void DecodeCoded(Side side, const HalfLayout& layout, const std::byte* half, float* rows) {
  const int d = layout.stored_dim;
  std::vector<uint8_t> codes(static_cast<size_t>(kBlockTokens * d));
  UnpackPlane<C>(side, layout, half, codes);
  const auto* scales = reinterpret_cast<const uint16_t*>(half + layout.code_bytes);
  for (int t = 0; t < kBlockTokens; t++)
    for (int i = 0; i < d; i++) {
      const float scale = F16ToF32(scales[i / C::kGroup * kBlockTokens + t]) * C::kLevelUnit;
      const size_t at = static_cast<size_t>(t * d + i);
      rows[at] = scale * static_cast<float>(C::Level(codes[at]));
    }
}

void CheckHalf(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile) {
  const CacheTypeInfo& info = Info(type);
  KVTIDE_CHECK(
      layout.stored_dim >= layout.head_dim && layout.stored_dim <= kMaxDim && layout.stored_dim % 32 == 0,
      info.name, " stored dim ", layout.stored_dim);
  KVTIDE_CHECK(layout.bytes == MakeHalfLayout(type, layout.head_dim).bytes, "layout is not of type ",
               info.name);
  if (profile == nullptr) return;
  const size_t d = static_cast<size_t>(layout.head_dim);
  KVTIDE_CHECK(profile->mean.empty() || profile->mean.size() == d, "profile mean of ", profile->mean.size(),
               " for dim ", d);
  KVTIDE_CHECK(profile->gain.empty() || profile->gain.size() == d, "profile gain of ", profile->gain.size(),
               " for dim ", d);
  KVTIDE_CHECK(side == Side::kKey || (profile->mean.empty() && profile->gain.empty()),
               "a mean or gain of V is not supported");
}

// For calibrated types: what they need, or the end.
const HeadProfile& Transform(CacheType type, Side side, const HalfLayout& layout,
                             const HeadProfile* profile) {
  const size_t d = static_cast<size_t>(layout.head_dim);
  KVTIDE_CHECK(side == Side::kKey && profile != nullptr && profile->transform.size() == d * d &&
                   profile->inverse.size() == d * d && profile->centre.size() == d &&
                   HasWidthsOf(type, profile->widths.size(), 1, layout.stored_dim),
               Name(type), " without a transform of head dim ", d);
  return *profile;
}

}  // namespace

void EncodeHalf(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                int64_t position, const float* rows, int tokens, std::byte* half) {
  CheckHalf(type, side, layout, profile);
  KVTIDE_CHECK(tokens >= 0 && tokens <= kBlockTokens, "tokens ", tokens);
  if (Info(type).calibrated)
    return EncodeTideHalf(type, layout, Transform(type, side, layout, profile), position, rows, tokens, half);
  VisitCodec(type, [&](auto codec) {
    using C = decltype(codec);
    if constexpr (C::kStorage == Storage::kHalf) {
      EncodeExact<C>(layout, rows, tokens, half);
    } else {
      EncodeCoded<C>(side, layout, profile, rows, tokens, half);
    }
  });
}

void DecodeHalfRotated(CacheType type, Side side, const HalfLayout& layout, const std::byte* half,
                       float* rows) {
  CheckHalf(type, side, layout, nullptr);
  VisitCodec(type, [&](auto codec) {
    using C = decltype(codec);
    if constexpr (C::kStorage == Storage::kHalf) {
      const auto* values = reinterpret_cast<const uint16_t*>(half);
      for (int t = 0; t < kBlockTokens; t++)
        for (int i = 0; i < layout.stored_dim; i++)
          rows[static_cast<size_t>(t * layout.stored_dim + i)] =
              C::Unpack(values[HalfPrecisionIndex(t, i, layout.stored_dim)]);
    } else {
      DecodeCoded<C>(side, layout, half, rows);
    }
  });
}

void DecodeHalf(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                int64_t position, const std::byte* half, float* rows) {
  CheckHalf(type, side, layout, profile);
  if (Info(type).calibrated)
    return DecodeTideHalf(type, layout, Transform(type, side, layout, profile), position, half, rows);
  std::vector<float> rotated(static_cast<size_t>(kBlockTokens * layout.stored_dim));
  DecodeHalfRotated(type, side, layout, half, rotated.data());
  const bool coded = Info(type).storage == Storage::kCodes;
  for (int t = 0; t < kBlockTokens; t++) {
    float* x = rotated.data() + static_cast<size_t>(t * layout.stored_dim);
    RotateInverse(type, x, layout.stored_dim);
    for (int i = 0; i < layout.head_dim; i++) {
      float value = x[i];
      if (coded && profile != nullptr && !profile->gain.empty())
        value /= profile->gain[static_cast<size_t>(i)];
      if (coded && profile != nullptr && !profile->mean.empty())
        value += profile->mean[static_cast<size_t>(i)];
      rows[static_cast<size_t>(t * layout.head_dim + i)] = value;
    }
  }
}

void EncodeHalf(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                const float* rows, int tokens, std::byte* half) {
  KVTIDE_CHECK(!Info(type).calibrated, Name(type), " without a position");
  EncodeHalf(type, side, layout, profile, 0, rows, tokens, half);
}

void DecodeHalf(CacheType type, Side side, const HalfLayout& layout, const HeadProfile* profile,
                const std::byte* half, float* rows) {
  KVTIDE_CHECK(!Info(type).calibrated, Name(type), " without a position");
  DecodeHalf(type, side, layout, profile, 0, half, rows);
}

void RotateForward(CacheType type, float* x, int stored_dim) {
  VisitCodec(type, [&](auto codec) {
    using C = decltype(codec);
    if constexpr (C::kStorage == Storage::kCodes) C::Rotation::Forward(x, stored_dim);
  });
}

void RotateInverse(CacheType type, float* x, int stored_dim) {
  VisitCodec(type, [&](auto codec) {
    using C = decltype(codec);
    if constexpr (C::kStorage == Storage::kCodes) C::Rotation::Inverse(x, stored_dim);
  });
}

}  // namespace kvtide
