// The list of cache types. It makes the planner's table, the CPU and CUDA dispatch, the conformance tests and
// the benchmarks: a new type is one header and one word in CacheTypes. Types travel as names; CacheType is an
// index that is only valid inside one build.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "kernels/base/check.h"
#include "kernels/format/codec.h"
#include "kernels/format/half.h"
#include "kernels/format/iso.h"
#include "kernels/format/planar.h"
#include "kernels/format/rotor.h"
#include "kernels/format/turbo.h"
#include "kernels/format/uniform.h"
#include "kernels/format/wht4.h"

namespace kvtide {

template <class... Codecs>
struct CodecList {
  static constexpr int kSize = sizeof...(Codecs);
};

using CacheTypes = CodecList<F16, Bf16, Q8_0, Q5_0, Q4_0, Turbo4, Turbo3, Turbo2, Wht4, Iso4, Iso3, Planar4,
                             Planar3, Rotor4, Rotor3, Pq4, Pq3>;

// Calibrated types come after them. They code keys only, with a profile of the model, and are no templates:
// tide.h, tide_codec.h.
constexpr int kCodecTypes = CacheTypes::kSize, kCacheTypes = kCodecTypes + 4;

enum class CacheType : uint8_t {};

// Plain data of a type, for code that is not templated over codecs.
struct CacheTypeInfo {
  const char* name;
  Storage storage;
  int bits;   // of a code
  int group;  // values per f16 scale, 0 without scales
  int version;
  bool rotated;             // has a rotation of its own
  Equalise keys;            // what its keys want from a profile
  const char* alias_of;     // name of the type with the same bytes, or null
  bool calibrated = false;  // codes keys only, with transforms of a profile
};

const CacheTypeInfo& Info(CacheType type);
inline const char* Name(CacheType type) { return Info(type).name; }
// The types of CacheTypes, which code keys and values of any model.
std::vector<CacheType> AllCacheTypes();
// tide4, tide3, tide2, tide1: keys only.
std::vector<CacheType> CalibratedTypes();
inline int CalibratedIndex(CacheType type) { return static_cast<int>(type) - kCodecTypes; }

// InvalidArgument for an unknown name; the message lists the known ones.
absl::StatusOr<CacheType> ParseCacheType(std::string_view name);

// A K type with a V type, written `q8_0/turbo4`.
struct CachePair {
  CacheType k{}, v{};
  bool operator==(const CachePair&) const = default;
};
// "a/b", or "a" for the same type on both sides. InvalidArgument for a V type that codes keys only.
absl::StatusOr<CachePair> ParseCachePair(std::string_view text);
std::string PairName(CachePair pair);
CachePair ExactPair();  // f16/f16: the tail and the exact window

namespace internal {
template <class F, class... Codecs>
decltype(auto) VisitImpl(CacheType type, F&& f, CodecList<Codecs...>) {
  KVTIDE_CHECK(static_cast<int>(type) < kCodecTypes, "a calibrated type has no codec struct");
  using Result = decltype(f(std::declval<F16>()));
  int index = 0;
  if constexpr (std::is_void_v<Result>) {
    (void)((index++ == static_cast<int>(type) ? (f(Codecs{}), true) : false) || ...);
  } else {
    Result result{};
    (void)((index++ == static_cast<int>(type) ? (result = f(Codecs{}), true) : false) || ...);
    return result;
  }
}
}  // namespace internal

// Calls f with a value of the codec struct of `type`, which is not calibrated: VisitCodec(type, [](auto
// codec) { using C = decltype(codec); ... }).
template <class F>
decltype(auto) VisitCodec(CacheType type, F&& f) {
  return internal::VisitImpl(type, std::forward<F>(f), CacheTypes{});
}

// Like VisitCodec, but with the codec without its rotation: types that differ in the rotation alone (turbo4,
// iso4, ...) give one and the same type, so that attention kernels are compiled once for each of the few ways
// of storing.
template <class F>
decltype(auto) VisitStored(CacheType type, F&& f) {
  return VisitCodec(type, [&](auto codec) -> decltype(auto) {
    using C = decltype(codec);
    if constexpr (C::kStorage == Storage::kCodes) {
      return f(typename C::Stored{});
    } else {
      return f(codec);
    }
  });
}

}  // namespace kvtide
