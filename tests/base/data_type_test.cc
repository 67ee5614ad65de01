#include "kernels/base/data_type.h"

#include <gtest/gtest.h>

#include <string>

namespace kvtide {
namespace {

TEST(DataType, NamesAndSizes) {
  EXPECT_EQ(DataTypeBytes(DataType::kF32), 4u);
  EXPECT_EQ(DataTypeBytes(DataType::kF16), 2u);
  EXPECT_EQ(DataTypeBytes(DataType::kBf16), 2u);
  EXPECT_EQ(std::string(DataTypeName(DataType::kF32)), "f32");
  EXPECT_EQ(std::string(DataTypeName(DataType::kF16)), "f16");
  EXPECT_EQ(std::string(DataTypeName(DataType::kBf16)), "bf16");
}

TEST(TensorView, ReadsEveryType) {
  const float f32[2] = {1.5f, -3.25f};
  const uint16_t f16[2] = {F32ToF16(1.5f), F32ToF16(-3.25f)};
  const uint16_t bf16[2] = {F32ToBf16(1.5f), F32ToBf16(-3.25f)};
  for (const TensorView view : {TensorView{f32, DataType::kF32}, TensorView{f16, DataType::kF16},
                                TensorView{bf16, DataType::kBf16}}) {
    EXPECT_EQ(view.At(0), 1.5f) << DataTypeName(view.type);
    EXPECT_EQ(view.At(1), -3.25f) << DataTypeName(view.type);
  }
}

}  // namespace
}  // namespace kvtide
