#include "kernels/cpu/half_rows.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "kernels/cpu/page/page_kernels.h"
#include "kernels/cpu/page/plain_kernels.h"

namespace kvtide {
namespace {

CacheType Type(const char* name) { return *ParseCacheType(name); }

TEST(HalfRowsTest, BitsMoveWhereTheTypesAgree) {
  for (const CacheType type : AllCacheTypes())
    for (const DataType data : {DataType::kF32, DataType::kF16, DataType::kBf16})
      EXPECT_EQ(SameBits(type, data), (type == Type("f16") && data == DataType::kF16) ||
                                          (type == Type("bf16") && data == DataType::kBf16))
          << Name(type);
  for (const CacheType type : CalibratedTypes()) EXPECT_FALSE(SameBits(type, DataType::kF16)) << Name(type);
}

// The plain kernels convert value by value.
TEST(HalfRowsTest, PagesAndRowsAreThoseOfThePlainKernels) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (const auto& [type, data] : {std::pair{Type("f16"), DataType::kF16}, {Type("bf16"), DataType::kBf16}})
    for (const int dim : {16, 64, 80, 96, 128, 192, 256, 512})
      for (const auto& [first, tokens] :
           {std::pair{0, 64}, std::pair{5, 1}, std::pair{61, 3}, std::pair{13, 40}}) {
        SCOPED_TRACE(testing::Message()
                     << Name(type) << " dim " << dim << " tokens " << first << " + " << tokens);
        const HalfLayout half = MakeHalfLayout(type, dim);
        constexpr size_t kHeads = 2;
        const auto width = static_cast<size_t>(dim), stride = kHeads * width + 8;
        std::vector<std::byte> pages_of_heads;
        size_t page_stride = 0;
        std::vector<uint16_t> rows(stride * static_cast<size_t>(tokens));
        for (size_t i = 0; i < rows.size(); i++) MutableTensorView(rows.data(), data).Set(i, normal(random));
        // At a multiple of 16 bytes, and not at one.
        for (const size_t apart : {half.bytes + 48, half.bytes + 2}) {
          std::vector<std::byte> pages(kHeads * apart, std::byte{0x5a}), expected = pages;
          MoveRowsIn(half, rows.data(), stride, first, tokens, {pages.data(), apart, kHeads});
          for (size_t head = 0; head < kHeads; head++)
            PlainKernels().store_rows(type, half, {rows.data(), data}, head * width, stride, first, tokens,
                                      expected.data() + head * apart);
          EXPECT_TRUE(pages == expected);
          pages_of_heads = std::move(pages);
          page_stride = apart;
        }

        std::vector<uint16_t> back(rows.size(), uint16_t{0x1234}), wanted = back;
        for (size_t t = 0; t < static_cast<size_t>(tokens); t++)
          std::copy_n(rows.begin() + static_cast<int64_t>(t * stride), kHeads * width,
                      wanted.begin() + static_cast<int64_t>(t * stride));
        MoveRowsOut(half, {pages_of_heads.data(), page_stride, kHeads}, first, tokens, back.data(), stride);
        EXPECT_EQ(back, wanted);
      }
}

}  // namespace
}  // namespace kvtide
