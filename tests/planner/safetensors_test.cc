// Weights from synthetic safetensors headers, whole and damaged.
#include "planner/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "planner/model/load_model.h"

namespace kvtide::planner {
namespace {

using ::testing::HasSubstr;
namespace fs = std::filesystem;

std::string Error(const std::string& json, int64_t data = -1) {
  const auto header = ParseSafetensorsHeader(json, data);
  return header.ok() ? "no error" : std::string(header.status().message());
}

std::string File(const std::string& json, size_t data_bytes) {
  const uint64_t length = json.size();
  std::string file(8, '\0');
  std::memcpy(file.data(), &length, 8);
  return file + json + std::string(data_bytes, '\0');
}

class Folder {
 public:
  Folder() : path_(fs::path(::testing::TempDir()) / ("kvtide_safetensors_" + std::to_string(getpid()))) {
    fs::remove_all(path_);
    fs::create_directories(path_);
  }
  ~Folder() { fs::remove_all(path_); }
  void Write(const std::string& name, const std::string& text) {
    std::ofstream(path_ / name, std::ios::binary) << text;
  }
  std::string path() const { return path_.string(); }

 private:
  fs::path path_;
};

TEST(Safetensors, SumsTensors) {
  const auto header = ParseSafetensorsHeader(
      R"({"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[4,8],"data_offsets":[0,64]},
          "b":{"dtype":"F32","shape":[],"data_offsets":[64,68]},"c":{"dtype":"F4","shape":[3],"data_offsets":[68,70]}})",
      70);
  ASSERT_TRUE(header.ok()) << header.status();
  ASSERT_EQ(header->tensors.size(), 3u);
  EXPECT_EQ(header->tensors.at("a").dtype, "BF16");
  EXPECT_THAT(header->tensors.at("a").shape, ::testing::ElementsAre(4, 8));
  EXPECT_EQ(header->tensors.at("b").begin, 64);
  EXPECT_EQ(header->notes.at("format"), "pt");
  EXPECT_EQ(header->tensor_bytes, 70);
  EXPECT_EQ(header->elements, 36);
}

TEST(Safetensors, FolderGivesExactWeightsWithoutReadingThem) {
  Folder folder;
  folder.Write("config.json",
               R"({"model_type":"llama","num_hidden_layers":2,"num_attention_heads":8,"num_key_value_heads":2,
                                  "hidden_size":512,"vocab_size":1000,"max_position_embeddings":4096})");
  folder.Write("a.safetensors", File(R"({"x":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}})", 16));
  folder.Write("b.safetensors", File(R"({"y":{"dtype":"F16","shape":[4],"data_offsets":[0,8]}})", 8));
  const auto model = LoadModel(folder.path());
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->weights->bytes, 24);
  EXPECT_EQ(model->weights->provenance, Provenance::kExact);
  EXPECT_EQ(model->geometry.layers.size(), 2u);
}

TEST(Safetensors, ShardsOfTheIndexMustExist) {
  Folder folder;
  folder.Write("a.safetensors", File(R"({"x":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}})", 16));
  folder.Write("model.safetensors.index.json", R"({"weight_map":{"x":"a.safetensors","y":"b.safetensors"}})");
  EXPECT_THAT(std::string(ReadSafetensorsFolder(folder.path()).status().message()),
              HasSubstr("b.safetensors: cannot be opened"));
  folder.Write("model.safetensors.index.json", R"({"weight_map":[]})");
  EXPECT_THAT(std::string(ReadSafetensorsFolder(folder.path()).status().message()), HasSubstr("weight_map"));
}

TEST(SafetensorsDamaged, LengthOfTheHeader) {
  EXPECT_THAT(std::string(ParseSafetensorsLength("abc").status().message()),
              HasSubstr("shorter than the 8 bytes"));
  EXPECT_THAT(std::string(ParseSafetensorsLength("\xff\xff\xff\xff\xff\xff\xff\xff").status().message()),
              HasSubstr("outside 2 to"));
  Folder folder;
  folder.Write("t.safetensors",
               File(R"({"x":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}})", 16).substr(0, 40));
  EXPECT_THAT(std::string(ReadSafetensorsFile(folder.path() + "/t.safetensors").status().message()),
              HasSubstr("longer than the file"));
  folder.Write("u.safetensors", File(R"({"x":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}})", 3));
  EXPECT_THAT(std::string(ReadSafetensorsFile(folder.path() + "/u.safetensors").status().message()),
              HasSubstr("truncated download"));
}

TEST(SafetensorsDamaged, EachFaultNamesTheTensor) {
  EXPECT_THAT(Error("[]"), HasSubstr("not a JSON object"));
  EXPECT_THAT(Error("{\"a\":"), HasSubstr("not a JSON object"));
  EXPECT_THAT(Error(R"({"a":{"dtype":"F16"}})"), HasSubstr("tensor 'a': dtype, shape and data_offsets"));
  EXPECT_THAT(Error(R"({"a":{"dtype":"X9","shape":[1],"data_offsets":[0,1]}})"),
              HasSubstr("unknown dtype 'X9'"));
  EXPECT_THAT(Error(R"({"a":{"dtype":3,"shape":[1],"data_offsets":[0,1]}})"),
              HasSubstr("dtype is not a name"));
  EXPECT_THAT(Error(R"({"a":{"dtype":"F16","shape":[-1],"data_offsets":[0,1]}})"),
              HasSubstr("not a number of 0 or more"));
  EXPECT_THAT(Error(R"({"a":{"dtype":"F16","shape":[1],"data_offsets":[-2,0]}})"),
              HasSubstr("not a pair of numbers"));
  EXPECT_THAT(Error(R"({"a":{"dtype":"F16","shape":[1],"data_offsets":[4,2]}})"), HasSubstr("not in order"));
  EXPECT_THAT(Error(R"({"a":{"dtype":"F16","shape":[4],"data_offsets":[0,4]}})"),
              HasSubstr("span 4 bytes, shape and dtype need 8"));
  EXPECT_THAT(Error(R"({"a":{"dtype":"F16","shape":[4294967296,4294967296],"data_offsets":[0,4]}})"),
              HasSubstr("absurdly large"));
  EXPECT_THAT(Error(R"({"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}})", 2),
              HasSubstr("the file holds 2 bytes"));
  EXPECT_THAT(Error(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},
                        "b":{"dtype":"U8","shape":[4],"data_offsets":[2,6]}})"),
              HasSubstr("tensor 'b': it shares bytes with tensor 'a'"));
  EXPECT_THAT(Error(R"({"__metadata__":[]})"), HasSubstr("__metadata__"));
}

TEST(SafetensorsDamaged, ShardsOutsideTheFolderAndTensorsInTwo) {
  Folder folder;
  folder.Write("model.safetensors.index.json", R"({"weight_map":{"x":"../a.safetensors"}})");
  EXPECT_THAT(std::string(SafetensorsShards(folder.path()).status().message()),
              HasSubstr("leaves the folder"));
  folder.Write("a.safetensors", File(R"({"x":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}})", 16));
  folder.Write("b.safetensors", File(R"({"x":{"dtype":"F16","shape":[8],"data_offsets":[0,16]}})", 16));
  folder.Write("model.safetensors.index.json", R"({"weight_map":{"x":"a.safetensors","y":"b.safetensors"}})");
  EXPECT_THAT(std::string(ReadSafetensorsFolder(folder.path()).status().message()),
              HasSubstr("is in another shard too"));
}

}  // namespace
}  // namespace kvtide::planner
