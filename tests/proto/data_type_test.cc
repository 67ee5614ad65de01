#include "proto/data_type.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

namespace kvtide {
namespace {

using ::testing::HasSubstr;

TEST(DataTypeProto, EveryTypeGoesThereAndBack) {
  const auto* values = v1::DataType_descriptor();
  int known = 0;
  for (const DataType type : {DataType::kF32, DataType::kF16, DataType::kBf16}) {
    const v1::DataType proto = DataTypeToProto(type);
    EXPECT_THAT(v1::DataType_Name(proto),
                ::testing::StrCaseEq(std::string("DATA_TYPE_") + DataTypeName(type)));
    const auto back = DataTypeFromProto(proto);
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(*back, type);
    known++;
  }
  EXPECT_EQ(values->value_count(), known + 1) << "the API has an element type without a DataType";
}

TEST(DataTypeProto, UnsetAndUnknownAreRefused) {
  EXPECT_THAT(std::string(DataTypeFromProto(v1::DATA_TYPE_UNSPECIFIED).status().message()),
              HasSubstr("dtype is not set"));
  const absl::Status unknown = DataTypeFromProto(static_cast<v1::DataType>(77)).status();
  EXPECT_EQ(unknown.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(unknown.message()), HasSubstr("unknown dtype 77"));
}

}  // namespace
}  // namespace kvtide
