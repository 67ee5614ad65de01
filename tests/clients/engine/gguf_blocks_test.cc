// Each type is written by its layout from known scales and codes, and has to come back as scale x code +
// minimum.
#include "clients/engine/gguf_blocks.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "kernels/base/float16.h"

namespace kvtide::engine {
namespace {

class Blocks : public testing::Test {
 protected:
  void Byte(int value) { bytes_.push_back(static_cast<char>(value)); }
  // A random f16, written; its value.
  float Scale() {
    const uint16_t bits = F32ToF16(std::normal_distribution<float>(0, 0.1f)(random_));
    Byte(bits & 255);
    Byte(bits >> 8);
    return F16ToF32(bits);
  }
  int Below(int n) { return static_cast<int>(random_() % static_cast<uint32_t>(n)); }
  std::vector<int> Codes(int count, int below) {
    std::vector<int> codes;
    for (int i = 0; i < count; ++i) codes.push_back(Below(below));
    return codes;
  }
  void Expect(GgufType type, const std::vector<float>& wanted) {
    const GgufTypeInfo info = InfoOfGguf(static_cast<uint32_t>(type));
    ASSERT_EQ(bytes_.size(),
              wanted.size() / static_cast<size_t>(info.group) * static_cast<size_t>(info.bytes));
    std::vector<float> got(wanted.size());
    const std::string odd = "x" + bytes_;  // unaligned
    DecodeGguf(type, reinterpret_cast<const std::byte*>(odd.data()) + 1, wanted.size(), got.data());
    for (size_t i = 0; i < wanted.size(); ++i)
      ASSERT_NEAR(got[i], wanted[i], 1e-6f * std::abs(wanted[i]) + 1e-7f) << info.name << " value " << i;
  }
  // Low nibbles of 32 codes in 16 bytes.
  void Nibbles(const std::vector<int>& codes) {
    for (int i = 0; i < 16; ++i)
      Byte((codes[static_cast<size_t>(i)] & 15) | (codes[static_cast<size_t>(i) + 16] & 15) << 4);
  }
  void FifthBits(const std::vector<int>& codes) {
    uint32_t word = 0;
    for (size_t i = 0; i < 32; ++i) word |= static_cast<uint32_t>(codes[i] >> 4) << i;
    for (int i = 0; i < 4; ++i) Byte(static_cast<int>(word >> (8 * i) & 255));
  }
  // Eight 6-bit scales and minima in 12 bytes.
  void PackSixes(const std::vector<int>& s, const std::vector<int>& m) {
    for (size_t j = 0; j < 4; ++j) Byte(s[j] | (s[j + 4] >> 4) << 6);
    for (size_t j = 0; j < 4; ++j) Byte(m[j] | (m[j + 4] >> 4) << 6);
    for (size_t j = 0; j < 4; ++j) Byte((s[j + 4] & 15) | (m[j + 4] & 15) << 4);
  }

  std::mt19937 random_{7};
  std::string bytes_;
};

TEST_F(Blocks, GroupsOf32) {
  for (const GgufType type :
       {GgufType::kQ4_0, GgufType::kQ4_1, GgufType::kQ5_0, GgufType::kQ5_1, GgufType::kQ8_0}) {
    bytes_.clear();
    std::vector<float> wanted;
    for (int group = 0; group < 5; ++group) {
      const bool five = type == GgufType::kQ5_0 || type == GgufType::kQ5_1;
      const bool minimum = type == GgufType::kQ4_1 || type == GgufType::kQ5_1;
      const float d = Scale(), m = minimum ? Scale() : 0;
      const std::vector<int> codes = Codes(32, type == GgufType::kQ8_0 ? 256 : five ? 32 : 16);
      if (five) FifthBits(codes);
      if (type == GgufType::kQ8_0) {
        for (const int code : codes) Byte(code);
      } else {
        Nibbles(codes);
      }
      const int offset = minimum ? 0 : type == GgufType::kQ4_0 ? 8 : type == GgufType::kQ5_0 ? 16 : 0;
      for (const int code : codes)
        wanted.push_back(
            d * static_cast<float>(type == GgufType::kQ8_0 ? static_cast<int8_t>(code) : code - offset) + m);
    }
    Expect(type, wanted);
  }
}

TEST_F(Blocks, FoursAndFivesOf256) {
  for (const bool five : {false, true}) {
    bytes_.clear();
    std::vector<float> wanted;
    for (int group = 0; group < 4; ++group) {
      const float d = Scale(), m = Scale();
      const std::vector<int> s = Codes(8, 64), low = Codes(8, 64), codes = Codes(256, five ? 32 : 16);
      PackSixes(s, low);
      if (five)
        for (size_t i = 0; i < 32; ++i) {
          int byte = 0;
          for (size_t part = 0; part < 8; ++part) byte |= (codes[32 * part + i] >> 4) << part;
          Byte(byte);
        }
      for (size_t pair = 0; pair < 4; ++pair)
        for (size_t i = 0; i < 32; ++i)
          Byte((codes[64 * pair + i] & 15) | (codes[64 * pair + 32 + i] & 15) << 4);
      for (size_t i = 0; i < 256; ++i)
        wanted.push_back(d * static_cast<float>(s[i / 32] * codes[i]) - m * static_cast<float>(low[i / 32]));
    }
    Expect(five ? GgufType::kQ5K : GgufType::kQ4K, wanted);
  }
}

TEST_F(Blocks, TwosOf256) {
  const std::vector<int> s = Codes(16, 16), low = Codes(16, 16), codes = Codes(256, 4);
  for (size_t i = 0; i < 16; ++i) Byte(s[i] | low[i] << 4);
  for (size_t half = 0; half < 2; ++half)
    for (size_t i = 0; i < 32; ++i) {
      int byte = 0;
      for (size_t q = 0; q < 4; ++q) byte |= codes[128 * half + 32 * q + i] << (2 * q);
      Byte(byte);
    }
  const float d = Scale(), m = Scale();
  std::vector<float> wanted;
  for (size_t i = 0; i < 256; ++i)
    wanted.push_back(d * static_cast<float>(s[i / 16] * codes[i]) - m * static_cast<float>(low[i / 16]));
  Expect(GgufType::kQ2K, wanted);
}

TEST_F(Blocks, ThreesOf256) {
  const std::vector<int> s = Codes(16, 64), codes = Codes(256, 8);  // stored: scale + 32, code + 4
  for (size_t i = 0; i < 32; ++i) {
    int byte = 0;
    for (size_t part = 0; part < 8; ++part) byte |= (codes[32 * part + i] >> 2) << part;
    Byte(byte);
  }
  for (size_t half = 0; half < 2; ++half)
    for (size_t i = 0; i < 32; ++i) {
      int byte = 0;
      for (size_t q = 0; q < 4; ++q) byte |= (codes[128 * half + 32 * q + i] & 3) << (2 * q);
      Byte(byte);
    }
  for (size_t i = 0; i < 8; ++i) Byte((s[i] & 15) | (s[i + 8] & 15) << 4);
  for (size_t i = 0; i < 4; ++i)
    Byte(s[i] >> 4 | (s[i + 4] >> 4) << 2 | (s[i + 8] >> 4) << 4 | (s[i + 12] >> 4) << 6);
  const float d = Scale();
  std::vector<float> wanted;
  for (size_t i = 0; i < 256; ++i)
    wanted.push_back(d * static_cast<float>((s[i / 16] - 32) * (codes[i] - 4)));
  Expect(GgufType::kQ3K, wanted);
}

TEST_F(Blocks, SixesOf256) {
  const std::vector<int> codes = Codes(256, 64), s = Codes(16, 256);
  for (size_t half = 0; half < 2; ++half)
    for (size_t i = 0; i < 64; ++i)
      Byte((codes[128 * half + i] & 15) | (codes[128 * half + 64 + i] & 15) << 4);
  for (size_t half = 0; half < 2; ++half)
    for (size_t i = 0; i < 32; ++i) {
      int byte = 0;
      for (size_t q = 0; q < 4; ++q) byte |= (codes[128 * half + 32 * q + i] >> 4) << (2 * q);
      Byte(byte);
    }
  for (const int scale : s) Byte(scale);
  const float d = Scale();
  std::vector<float> wanted;
  for (size_t i = 0; i < 256; ++i)
    wanted.push_back(d * static_cast<float>(static_cast<int8_t>(s[i / 16]) * (codes[i] - 32)));
  Expect(GgufType::kQ6K, wanted);
}

TEST_F(Blocks, PlainTypesAndWhatIsNotRead) {
  std::vector<float> wanted = {1.5f, -2.25f, 0};
  bytes_.assign(reinterpret_cast<const char*>(wanted.data()), 12);
  Expect(GgufType::kF32, wanted);
  for (const GgufType type : {GgufType::kF16, GgufType::kBf16}) {
    bytes_.clear();
    for (const float x : wanted) {
      const uint16_t bits = type == GgufType::kF16 ? F32ToF16(x) : F32ToBf16(x);
      Byte(bits & 255);
      Byte(bits >> 8);
    }
    Expect(type, wanted);
  }
  for (const uint32_t type : {4u, 9u, 15u, 16u, 39u, 1000u}) EXPECT_EQ(InfoOfGguf(type).name, nullptr);
}

}  // namespace
}  // namespace kvtide::engine
