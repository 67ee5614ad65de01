#include "kernels/cpu/half_rows.h"

#include <gtest/gtest.h>

#include <random>
#include <vector>

#include "kernels/cpu/page_kernels.h"
#include "kernels/cpu/plain_kernels.h"

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
        const auto stride = static_cast<size_t>(2 * dim + 8);
        std::vector<uint16_t> rows(stride * static_cast<size_t>(tokens));
        for (size_t i = 0; i < rows.size(); i++) MutableTensorView(rows.data(), data).Set(i, normal(random));
        std::vector<std::byte> page(half.bytes, std::byte{0x5a}), expected = page;
        MoveRowsIn(half, rows.data(), stride, first, tokens, page.data());
        PlainKernels().store_rows(type, half, {rows.data(), data}, 0, stride, first, tokens, expected.data());
        EXPECT_TRUE(page == expected);

        std::vector<uint16_t> back(rows.size(), uint16_t{0x1234}), wanted = back;
        for (size_t t = 0; t < static_cast<size_t>(tokens); t++)
          std::copy_n(rows.begin() + static_cast<int64_t>(t * stride), dim,
                      wanted.begin() + static_cast<int64_t>(t * stride));
        MoveRowsOut(half, page.data(), first, tokens, back.data(), stride);
        EXPECT_EQ(back, wanted);
      }
}

}  // namespace
}  // namespace kvtide
