// One encoded half page with its type, for tests.
#pragma once

#include <string>
#include <vector>

#include "kernels/format/page_codec.h"

namespace kvtide::test {

struct HalfPage {
  CacheType type;
  Side side;
  HalfLayout layout;
  std::vector<std::byte> bytes;

  HalfPage(CacheType t, Side s, int head_dim)
      : type(t), side(s), layout(MakeHalfLayout(t, head_dim)), bytes(layout.bytes, std::byte{0xa5}) {}

  HalfPage& Encode(const std::vector<float>& rows, int tokens = kBlockTokens,
                   const HeadProfile* profile = nullptr, int64_t position = 0) {
    EncodeHalf(type, side, layout, profile, position, rows.data(), tokens, bytes.data());
    return *this;
  }
  std::vector<float> Decode(const HeadProfile* profile = nullptr, int64_t position = 0) const {
    std::vector<float> rows(static_cast<size_t>(kBlockTokens * layout.head_dim));
    DecodeHalf(type, side, layout, profile, position, bytes.data(), rows.data());
    return rows;
  }
  std::vector<float> DecodeRotated() const {
    std::vector<float> rows(static_cast<size_t>(kBlockTokens * layout.stored_dim));
    DecodeHalfRotated(type, side, layout, bytes.data(), rows.data());
    return rows;
  }
  bool coded() const { return Info(type).storage == Storage::kCodes; }
};

inline const std::vector<int>& HeadDims() {
  static const std::vector<int> dims = {64, 80, 96, 112, 128, 192, 256, 512};
  return dims;
}

inline std::string SideName(Side side) { return side == Side::kKey ? "k" : "v"; }

}  // namespace kvtide::test
