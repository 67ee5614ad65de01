#include "daemon/service/tensor.h"

#include <cmath>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/base/float16.h"

namespace kvtide::service {
namespace {

using ::testing::HasSubstr;

v1::Tensor MakeTensor(v1::DataType type, std::vector<int64_t> shape, size_t bytes) {
  v1::Tensor tensor;
  tensor.set_dtype(type);
  for (const int64_t dimension : shape) tensor.add_shape(dimension);
  tensor.set_data(std::string(bytes, '\0'));
  return tensor;
}

TEST(Tensor, TakesWhatItSaysItIs) {
  const v1::Tensor tensor = MakeTensor(v1::DATA_TYPE_F16, {3, 2, 16}, 3 * 2 * 16 * 2);
  const auto incoming = CheckTensor(tensor, "k", 2, 16, nullptr);
  ASSERT_TRUE(incoming.ok()) << incoming.status();
  EXPECT_EQ(incoming->tokens, 3);
  EXPECT_EQ(incoming->elements, 96u);
  EXPECT_EQ(incoming->view.type, DataType::kF16);
}

TEST(Tensor, RefusesOtherShapesAndSizes) {
  const v1::Tensor kBad[] = {
      MakeTensor(v1::DATA_TYPE_UNSPECIFIED, {1, 2, 16}, 128),
      MakeTensor(v1::DATA_TYPE_F32, {1, 2, 16}, 127),
      MakeTensor(v1::DATA_TYPE_F32, {1, 2, 16}, 256),
      MakeTensor(v1::DATA_TYPE_F32, {0, 2, 16}, 0),
      MakeTensor(v1::DATA_TYPE_F32, {1, 1, 32}, 128),
      MakeTensor(v1::DATA_TYPE_F32, {2, 16}, 128),
      MakeTensor(v1::DATA_TYPE_F32, {-1, 2, 16}, 128),
      MakeTensor(v1::DATA_TYPE_F32, {INT64_MAX, 2, 16}, 128),
  };
  for (const v1::Tensor& tensor : kBad) {
    EXPECT_EQ(CheckTensor(tensor, "k", 2, 16, nullptr).status().code(), absl::StatusCode::kInvalidArgument)
        << tensor.ShortDebugString();
  }
}

TEST(Tensor, NamesThePlaceOfANumberThatIsNone) {
  for (const float bad : {std::nanf(""), INFINITY, -INFINITY}) {
    for (const v1::DataType type : {v1::DATA_TYPE_F32, v1::DATA_TYPE_F16, v1::DATA_TYPE_BF16}) {
      const size_t size = type == v1::DATA_TYPE_F32 ? 4 : 2;
      v1::Tensor tensor = MakeTensor(type, {3, 2, 16}, 96 * size);
      EXPECT_TRUE(CheckFinite(CheckTensor(tensor, "q", 2, 16, nullptr).value(), "q", 2, 16).ok());
      const size_t place = 2 * 32 + 16 + 5;
      if (type == v1::DATA_TYPE_F32) {
        std::memcpy(tensor.mutable_data()->data() + place * 4, &bad, 4);
      } else {
        const uint16_t bits = type == v1::DATA_TYPE_F16 ? F32ToF16(bad) : F32ToBf16(bad);
        std::memcpy(tensor.mutable_data()->data() + place * 2, &bits, 2);
      }
      const absl::Status status = CheckFinite(CheckTensor(tensor, "q", 2, 16, nullptr).value(), "q", 2, 16);
      EXPECT_THAT(std::string(status.message()), HasSubstr("at token 2, head 1, index 5"));
    }
  }
}

TEST(Tensor, LiesWhereItsPlaceSays) {
  std::vector<float> arena(64);
  const TensorMemory memory(reinterpret_cast<std::byte*>(arena.data()), arena.size() * sizeof(float));
  v1::Tensor tensor;
  tensor.set_dtype(v1::DATA_TYPE_F32);
  for (const int64_t dimension : {2, 1, 4}) tensor.add_shape(dimension);
  tensor.mutable_place()->set_offset(64);
  tensor.mutable_place()->set_bytes(32);
  const auto incoming = CheckTensor(tensor, "k", 1, 4, &memory);
  ASSERT_TRUE(incoming.ok()) << incoming.status();
  EXPECT_EQ(incoming->view.data, arena.data() + 16);
  EXPECT_EQ(incoming->elements, 8u);
  const auto refused = [&](uint64_t offset, uint64_t bytes, int64_t tokens, const TensorMemory* in) {
    tensor.mutable_place()->set_offset(offset);
    tensor.mutable_place()->set_bytes(bytes);
    tensor.set_shape(0, tokens);
    return CheckTensor(tensor, "k", 1, 4, in).status().code() == absl::StatusCode::kInvalidArgument;
  };
  EXPECT_FALSE(refused(256 - 32, 32, 2, &memory));
  EXPECT_TRUE(refused(256 - 16, 32, 2, &memory)) << "beyond the end";
  EXPECT_TRUE(refused(256, 32, 2, &memory));
  EXPECT_TRUE(refused(~uint64_t{0} - 15, 32, 2, &memory)) << "around the end of numbers";
  EXPECT_TRUE(refused(~uint64_t{0} - 31, 32, 2, &memory));
  EXPECT_TRUE(refused(72, 32, 2, &memory)) << "between multiples of 16";
  EXPECT_TRUE(refused(64, 31, 2, &memory)) << "another number of bytes";
  EXPECT_TRUE(refused(64, 0, 2, &memory));
  EXPECT_TRUE(refused(64, 32, 3, &memory));
  EXPECT_TRUE(refused(64, 0, int64_t{1} << 60, &memory)) << "a product that is 0 in 64 bits";
  EXPECT_TRUE(refused(64, 32, 2, nullptr)) << "no memory is shared";
  tensor.set_data("12345678901234567890123456789012");
  EXPECT_TRUE(refused(64, 32, 2, &memory)) << "data and a place";
}

TEST(Tensor, ResultsAreConvertedToTheAskedType) {
  for (const DataType type : {DataType::kF32, DataType::kF16, DataType::kBf16}) {
    v1::Tensor tensor;
    OutgoingTensor outgoing(&tensor, type, {2, 1, 3});
    for (size_t i = 0; i < 6; i++) outgoing.view().Set(i, static_cast<float>(i) * 0.5f);
    EXPECT_EQ(tensor.data().size(), 6 * DataTypeBytes(type));
    const auto incoming = CheckTensor(tensor, "out", 1, 3, nullptr);
    ASSERT_TRUE(incoming.ok()) << incoming.status();
    for (size_t i = 0; i < 6; i++) EXPECT_EQ(incoming->view.At(i), static_cast<float>(i) * 0.5f);
  }
}

}  // namespace
}  // namespace kvtide::service
