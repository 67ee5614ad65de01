// Makes entries of the kernel list from codecs, head dims and rows: picks warps and ring slots by registers
// and shared memory.
#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/cuda/attend/attend_kernel.cuh"
#include "kernels/cuda/attend/joint_kernel.cuh"
#include "kernels/cuda/attend/kernel_list.h"
#include "kernels/cuda/attend/query_kernel.cuh"

namespace kvtide::cuda {

// The shared memory sizes of the architectures that this build is for: __CUDA_ARCH_LIST__ is a list such as
// 800,900.
constexpr bool BuiltWithLimit(int limit) {
  for (const int arch : {__CUDA_ARCH_LIST__})
    if (SharedLimitOf(arch / 10) == limit) return true;
  return false;
}
template <int kLimit>
struct SharedLimit {
  static constexpr int value = kLimit;
};
template <class F>
void ForEachSharedLimit(F f) {
  if constexpr (BuiltWithLimit(kSharedLimits[0])) f(SharedLimit<kSharedLimits[0]>{});
  if constexpr (BuiltWithLimit(kSharedLimits[1])) f(SharedLimit<kSharedLimits[1]>{});
  if constexpr (BuiltWithLimit(kSharedLimits[2])) f(SharedLimit<kSharedLimits[2]>{});
}

template <class C>
constexpr Form FormOfCodec() {
  if (std::is_same_v<C, F16>) return Form::kF16;
  if (std::is_same_v<C, Bf16>) return Form::kBf16;
  if (std::is_same_v<C, Q8_0>) return Form::kQ8;
  if (std::is_same_v<C, Q5_0>) return Form::kQ5;
  if (std::is_same_v<C, Q4_0>) return Form::kQ4;
  if (std::is_same_v<C, typename Turbo4::Stored>) return Form::kCode4;
  if (std::is_same_v<C, typename Turbo3::Stored>) return Form::kCode3;
  if (std::is_same_v<C, typename Turbo2::Stored>) return Form::kCode2;
  if (std::is_same_v<C, typename Wht4::Stored>) return Form::kUniform4;
  return Form::kOther;
}

// Warps that the registers of a tile allow: rows of output, in units of 8 x 128 values, decide.
constexpr int WarpsByRegisters(int dk, int dv, int tiles, bool half) {
  const int wide = dk > dv ? dk : dv;
  if (half) return wide <= 256 && tiles * wide <= 256 ? 8 : 4;
  if (tiles == 1) return wide <= 64 ? 16 : wide <= 192 ? 12 : 8;
  return wide <= 96 ? 12 : 8;
}

// Pieces in flight for each warp, the one at hand included. More only lengthen the queue in front of the
// memory: the first pages come later, and nothing gets faster.
constexpr int kSlots = 2;

// As many of the wanted warps as fit, with whole pages if those fit with all of them. kCtaWarps: of the CTA,
// 0 = no more than take part.
template <class Tile, int kWarps, bool kWhole, int kSharedLimit, int kCtaWarps = 0>
struct ConfigFor {
  using Config = AttendConfig<Tile, kWarps, kSlots, kWhole, kCtaWarps == 0 ? kWarps : kCtaWarps>;
  static constexpr auto Pick() {
    if constexpr (Config::kSharedBytes <= kSharedLimit) {
      return Config{};
    } else {
      constexpr int kFewer = kWhole ? kWarps : kWarps - 1;
      return typename ConfigFor<Tile, kFewer, false, kSharedLimit, kCtaWarps>::Type{};
    }
  }
  using Type = decltype(Pick());
};

// Tokens of an f16 tile: pieces of 8 KB where the head dim allows.
constexpr int HalfTokens(int d) { return d <= 64 ? 64 : d <= 128 ? 32 : 16; }

template <class Config, class Tile, int kSharedLimit>
JointKernel MakeJoint() {
  using Info = TileInfo<Tile>;
  constexpr int D = Info::kDk, kWarps = std::min(Config::kWarps, WarpsByRegisters(D, D, Info::kTiles, true));
  using Exact = HalfTile<DeviceWarp, false, D, D, Info::kTiles, HalfTokens(D)>;
  using ExactConfig = typename ConfigFor<Exact, kWarps, false, kSharedLimit, Config::kWarps>::Type;
  using Joint = JointConfig<Config, ExactConfig>;
  return {reinterpret_cast<const void*>(&JointKernelFunction<Config, Tile, ExactConfig, Exact>),
          reinterpret_cast<const void*>(
              &JointQueryKernel<typename Joint::CodedQuery, typename Joint::ExactQuery>),
          Joint::kSharedBytes, ExactConfig::kWarps};
}

template <class Info>
constexpr int WarpsOf() {
  if constexpr (Info::kRebuilt)
    return Info::kWarps;
  else
    return WarpsByRegisters(Info::kDk, Info::kDv, Info::kTiles, !Info::kCoded);
}

template <class Tile, int kSharedLimit>
AttendKernel MakeEntry(Form k, Form v) {
  using Info = TileInfo<Tile>;
  constexpr int kWarps = WarpsOf<Info>();
  using Config = typename ConfigFor<Tile, kWarps, Info::kCoded && !Info::kRebuilt, kSharedLimit>::Type;
  AttendKernel kernel{k,
                      v,
                      Info::kDk,
                      Info::kDv,
                      Config::kRows,
                      Config::kThreads,
                      Config::kSharedBytes,
                      reinterpret_cast<const void*>(&AttendKernelFunction<Config, Tile>),
                      reinterpret_cast<const void*>(&QueryKernel<typename Info::Query>),
                      32 * Config::kRows,
                      Config::kQueryBytes,
                      Tile::kKUnit,
                      kSharedLimit,
                      {}};
  // At 512 the two bodies in one kernel keep too much of each other in local memory.
  if constexpr (Info::kCoded && !Info::kRebuilt && Info::kDk <= 256)
    kernel.joint = MakeJoint<Config, Tile, kSharedLimit>();
  return kernel;
}

template <class K, class V, int D, int MT>
void AddCodedTile(std::vector<AttendKernel>* list) {
  using KS = typename K::Stored;
  using VS = typename V::Stored;
  using Tile = CodedTile<DeviceWarp, KS, VS, D, D, MT>;
  ForEachSharedLimit([list](auto limit) {
    list->push_back(MakeEntry<Tile, decltype(limit)::value>(FormOfCodec<KS>(), FormOfCodec<VS>()));
  });
}
template <bool kBf16, int D, int MT>
void AddHalfTile(std::vector<AttendKernel>* list) {
  constexpr Form form = kBf16 ? Form::kBf16 : Form::kF16;
  ForEachSharedLimit([list](auto limit) {
    list->push_back(
        MakeEntry<HalfTile<DeviceWarp, kBf16, D, D, MT, HalfTokens(D)>, decltype(limit)::value>(form, form));
  });
}

// 8 rows and, where the registers allow, 16.
template <class K, class V, int D>
void AddCoded(std::vector<AttendKernel>* list) {
  AddCodedTile<K, V, D, 1>(list);
  if constexpr (D <= 256) AddCodedTile<K, V, D, 2>(list);
}
template <bool kBf16, int D>
void AddHalf(std::vector<AttendKernel>* list) {
  AddHalfTile<kBf16, D, 1>(list);
  if constexpr (D <= 256) AddHalfTile<kBf16, D, 2>(list);
}

// The pairs that every head dim has.
template <int D>
void AddCommonPairs(std::vector<AttendKernel>* list) {
  AddHalf<false, D>(list);
  AddCoded<Q8_0, Q8_0, D>(list);
  AddCoded<Q8_0, Turbo4, D>(list);
  AddCoded<Q8_0, Turbo3, D>(list);
  AddCoded<Turbo4, Turbo4, D>(list);
  AddCoded<Turbo4, Turbo3, D>(list);
  AddCoded<Turbo3, Turbo3, D>(list);
  AddCoded<Turbo2, Turbo2, D>(list);
  AddCoded<Wht4, Wht4, D>(list);
}

}  // namespace kvtide::cuda
