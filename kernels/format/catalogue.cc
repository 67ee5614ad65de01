#include "kernels/format/catalogue.h"

#include <algorithm>
#include <array>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "kernels/format/tide.h"

namespace kvtide {
namespace {

template <class C>
constexpr CacheTypeInfo MakeInfo() {
  static_assert(Codec<C>);
  CacheTypeInfo info{C::kName,    C::kStorage, C::kBits,        C::kGroup,
                     C::kVersion, false,       Equalise::kNone, nullptr};
  if constexpr (C::kStorage == Storage::kCodes) {
    static_assert(CodedCodec<C>);
    info.rotated = !std::is_same_v<typename C::Rotation, NoRotation>;
  }
  if constexpr (requires { C::kKeys; }) info.keys = C::kKeys;
  if constexpr (requires { C::kAliasOf; }) info.alias_of = C::kAliasOf;
  return info;
}

template <class... Codecs>
constexpr std::array<CacheTypeInfo, sizeof...(Codecs)> MakeTable(CodecList<Codecs...>) {
  return {MakeInfo<Codecs>()...};
}

constexpr CacheTypeInfo Tide(const char* name, int bits) {
  return {name, Storage::kCodes, bits, kMaxTideDim, kTideVersion, true, Equalise::kNone, nullptr, true};
}

constexpr auto kCodecTable = MakeTable(CacheTypes{});
constexpr auto kTable = [] {
  std::array<CacheTypeInfo, kCacheTypes> table{};
  for (size_t i = 0; i < kCodecTable.size(); i++) table[i] = kCodecTable[i];
  for (size_t i = 0; i < kTideTypes; i++) table[kCodecTypes + i] = Tide(kTideNames[i], kTideBits[i]);
  return table;
}();
static_assert(kCacheTypes == kCodecTypes + kTideTypes);

}  // namespace

const CacheTypeInfo& Info(CacheType type) {
  KVTIDE_CHECK(static_cast<size_t>(type) < kTable.size(), "cache type ", static_cast<int>(type));
  return kTable[static_cast<size_t>(type)];
}

std::vector<CacheType> AllCacheTypes() {
  std::vector<CacheType> types;
  for (int i = 0; i < kCodecTypes; i++) types.push_back(static_cast<CacheType>(i));
  return types;
}

std::vector<CacheType> CalibratedTypes() {
  std::vector<CacheType> types;
  for (int i = kCodecTypes; i < kCacheTypes; i++) types.push_back(static_cast<CacheType>(i));
  return types;
}

absl::StatusOr<CacheType> ParseCacheType(std::string_view name) {
  std::string known;
  for (size_t i = 0; i < kTable.size(); i++) {
    if (name == kTable[i].name) return static_cast<CacheType>(i);
    absl::StrAppend(&known, i == 0 ? "" : ", ", kTable[i].name);
  }
  return absl::InvalidArgumentError(
      absl::StrCat("unknown cache type '", std::string(name), "'; known: ", known));
}

absl::StatusOr<CachePair> ParseCachePair(std::string_view text) {
  const size_t slash = text.find('/');
  CachePair pair;
  KVTIDE_ASSIGN_OR_RETURN(pair.k, ParseCacheType(text.substr(0, slash)));
  if (slash == std::string_view::npos) {
    pair.v = pair.k;
  } else {
    KVTIDE_ASSIGN_OR_RETURN(pair.v, ParseCacheType(text.substr(slash + 1)));
  }
  if (Info(pair.v).calibrated)
    return absl::InvalidArgumentError(absl::StrCat("pair '", std::string(text), "': ", Name(pair.v),
                                                   " codes keys only; write ", Name(pair.k), "/turbo",
                                                   std::max(2, Info(pair.v).bits), ", for example"));
  return pair;
}

std::string PairName(CachePair pair) { return absl::StrCat(Name(pair.k), "/", Name(pair.v)); }

CachePair ExactPair() {
  static const CacheType kF16 = *ParseCacheType("f16");
  return {kF16, kF16};
}

}  // namespace kvtide
