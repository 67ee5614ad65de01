#include "clients/engine/safetensors.h"

#include <cstring>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/clients/engine/test_model.h"

namespace kvtide::engine {
namespace {

using testing::HasSubstr;

std::span<const std::byte> Bytes(const std::string& text) {
  return std::as_bytes(std::span<const char>(text.data(), text.size()));
}

std::string WithHeader(const std::string& header, size_t data_bytes) {
  std::string file;
  for (int i = 0; i < 8; ++i) file.push_back(static_cast<char>(header.size() >> (8 * i) & 0xff));
  return file + header + std::string(data_bytes, '\1');
}

std::string Message(const std::string& file) {
  return std::string(ParseSafetensors(Bytes(file)).status().message());
}

TEST(SafetensorsTest, ReadsWhatWasWritten) {
  const TestTensors tensors = {{"a", {{2, 3}, {1, 2, 3, 4, 5, 6}}}, {"b", {{1}, {-0.5f}}}};
  const std::string file = SafetensorsBytes(tensors, "F32");
  const auto parsed = ParseSafetensors(Bytes(file));
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const WeightTensor& a = parsed->at("a");
  EXPECT_EQ(a.type, DataType::kF32);
  EXPECT_THAT(a.shape, testing::ElementsAre(2, 3));
  float last = 0;
  std::memcpy(&last, a.bytes.data() + 20, 4);
  EXPECT_EQ(last, 6.0f);
}

TEST(SafetensorsTest, RefusesEveryTruncation) {
  const std::string file = SafetensorsBytes({{"a", {{4}, {1, 2, 3, 4}}}, {"b", {{2}, {5, 6}}}}, "BF16");
  for (size_t size = 0; size < file.size(); ++size) {
    EXPECT_FALSE(ParseSafetensors(Bytes(file.substr(0, size))).ok())
        << size << " of " << file.size() << " bytes";
  }
}

TEST(SafetensorsTest, SaysWhatIsWrong) {
  EXPECT_THAT(Message(WithHeader("[1]", 0)), HasSubstr("not a JSON object"));
  EXPECT_THAT(Message(WithHeader(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", 4)),
              HasSubstr("need 8"));
  EXPECT_THAT(Message(WithHeader(R"({"a":{"dtype":"Q7","shape":[2],"data_offsets":[0,4]}})", 4)),
              HasSubstr("unknown dtype 'Q7'"));
  EXPECT_THAT(Message(WithHeader(R"({"a":{"dtype":"F32","shape":[-2],"data_offsets":[0,4]}})", 4)),
              HasSubstr("not a number of 0 or more"));
  EXPECT_THAT(
      Message(WithHeader(
          R"({"a":{"dtype":"F32","shape":[281474976710656,281474976710656],"data_offsets":[0,4]}})", 4)),
      HasSubstr("absurdly large"));
  EXPECT_THAT(Message(WithHeader(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[8,4]}})", 8)),
              HasSubstr("not in order"));
  EXPECT_THAT(
      Message(WithHeader(
          R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})",
          6)),
      HasSubstr("shares bytes"));
  EXPECT_THAT(Message(std::string("\xff\xff\xff\xff\xff\xff\xff\xff", 8)), HasSubstr("header length"));
}

TEST(SafetensorsFolderTest, ReadsShardsThroughTheIndex) {
  const std::string folder = MakeFolder("shards");
  WriteFile(folder + "/one.safetensors", SafetensorsBytes({{"a", {{1}, {1}}}}, "F32"));
  WriteFile(folder + "/two.safetensors", SafetensorsBytes({{"b", {{1}, {2}}}}, "F16"));
  WriteFile(folder + "/model.safetensors.index.json",
            R"({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}})");
  const auto model = SafetensorsFolder::Open(folder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE(model->Has("a"));
  EXPECT_EQ(model->Get("b", std::vector<int64_t>{1})->type, DataType::kF16);
  EXPECT_EQ(model->Get("c", std::vector<int64_t>{1}).status().code(), absl::StatusCode::kNotFound);
}

TEST(SafetensorsFolderTest, RefusesMissingShardsPathsAndFolders) {
  const std::string folder = MakeFolder("bad_shards");
  EXPECT_EQ(SafetensorsFolder::Open(folder).status().code(), absl::StatusCode::kNotFound);
  WriteFile(folder + "/model.safetensors", "");
  EXPECT_THAT(std::string(SafetensorsFolder::Open(folder).status().message()), HasSubstr("is empty"));
  WriteFile(folder + "/model.safetensors.index.json", R"({"weight_map": {"a": "gone.safetensors"}})");
  EXPECT_THAT(std::string(SafetensorsFolder::Open(folder).status().message()), HasSubstr("gone.safetensors"));
  WriteFile(folder + "/model.safetensors.index.json", R"({"weight_map": {"a": "../a.safetensors"}})");
  EXPECT_EQ(SafetensorsFolder::Open(folder).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(SafetensorsFolder::Open(folder + "/none").status().code(), absl::StatusCode::kNotFound);
}

TEST(SafetensorsFolderTest, RefusesIntegerWeightsByName) {
  const std::string folder = MakeFolder("integers");
  WriteFile(folder + "/model.safetensors",
            WithHeader(R"({"w":{"dtype":"I8","shape":[4],"data_offsets":[0,4]}})", 4));
  const auto model = SafetensorsFolder::Open(folder);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_THAT(std::string(model->Get("w", std::vector<int64_t>{4}).status().message()), HasSubstr("w is I8"));
}

}  // namespace
}  // namespace kvtide::engine
