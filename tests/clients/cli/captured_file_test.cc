#include "clients/cli/capture/captured_file.h"

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>

#include "clients/cli/capture/capture_writer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/clients/cli/capture_files.h"

namespace kvtide::cli {
namespace {

using testing::AllOf;
using testing::HasSubstr;

std::string Path(const std::string& name) {
  return testing::TempDir() + "/kvtide_" + std::to_string(getpid()) + "_" + name;
}

absl::StatusOr<CapturedFile> OpenBytes(const std::string& bytes) {
  const std::string path = Path("captured.safetensors");
  std::ofstream(path, std::ios::binary) << bytes;
  auto file = CapturedFile::Open(path);
  std::filesystem::remove(path);  // the mapping stays
  return file;
}

std::string ErrorOf(const FileTensors& tensors, const std::map<std::string, std::string>& metadata = {}) {
  const auto file = OpenBytes(FileBytes(tensors, metadata));
  if (!file.ok()) return std::string(file.status().message());
  for (int l = 0; l < static_cast<int>(file->layers().size()); ++l) {
    const auto vectors = file->Read(l);
    if (!vectors.ok()) return std::string(vectors.status().message());
  }
  return "no error";
}

TEST(CapturedFileTest, ReadsEveryElementType) {
  for (const char* type : {"F32", "F16", "BF16"}) {
    const FileTensors tensors = SmallCapture(type);
    const auto file = OpenBytes(FileBytes(tensors, {{"model", "tiny"}, {"rope", "applied"}}));
    ASSERT_TRUE(file.ok()) << file.status();
    ASSERT_EQ(file->layers().size(), 2u);
    EXPECT_EQ(file->tokens(), 200);
    EXPECT_EQ(file->Metadata("model"), "tiny");
    EXPECT_EQ(file->Metadata("text"), "");
    const LayerShape& shape = file->layers()[1].shape;
    EXPECT_EQ(shape.query_heads, 4);
    EXPECT_EQ(shape.kv_heads, 2);
    EXPECT_EQ(shape.head_dim_k, 64);
    EXPECT_EQ(shape.head_dim_v, 32);
    EXPECT_FLOAT_EQ(shape.scale, 0.125f);
    const auto vectors = file->Read(1);
    ASSERT_TRUE(vectors.ok()) << vectors.status();
    const std::vector<float>& v = tensors.at("layers.1.v").values;
    ASSERT_EQ(vectors->v.size(), v.size());
    for (size_t i = 0; i < v.size(); ++i) ASSERT_NEAR(vectors->v[i], v[i], std::abs(v[i]) / 200) << type << i;
    EXPECT_TRUE(vectors->sinks.empty());
  }
}

TEST(CapturedFileTest, NotesChangeScaleWindowAndSinks) {
  FileTensors tensors = SmallCapture();
  tensors["layers.0.sinks"] = {"F32", {4}, {0, 1, 2, 3}};
  tensors["layers.0.q"] = RandomTensor({7, 4, 64}, 3);
  tensors["embedding"] = {"F32", {1}, {0}};  // others are left alone
  const auto file = OpenBytes(FileBytes(tensors, {{"scale", "0.5"}, {"sliding_window", "128"}}));
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_FLOAT_EQ(file->layers()[0].shape.scale, 0.5f);
  EXPECT_EQ(file->layers()[0].shape.sliding_window, 128);
  EXPECT_EQ(file->layers()[0].queries, 7);
  EXPECT_THAT(file->Read(0)->sinks, testing::ElementsAre(0, 1, 2, 3));
}

TEST(CapturedFileTest, NamesWhatIsMissingOrOdd) {
  const auto with = [](const std::string& name, FileTensor tensor) {
    FileTensors tensors = SmallCapture();
    tensors[name] = std::move(tensor);
    return ErrorOf(tensors);
  };
  FileTensors missing = SmallCapture();
  missing.erase("layers.0.v");
  EXPECT_THAT(ErrorOf(missing), HasSubstr("no tensor layers.0.v"));
  FileTensors gap = SmallCapture();
  for (const char* part : {"k", "v", "q"})
    gap[std::string("layers.5.") + part] = gap[std::string("layers.0.") + part];
  EXPECT_THAT(ErrorOf(gap), HasSubstr("no tensor layers.2.k"));
  EXPECT_THAT(ErrorOf({{"weight", RandomTensor({2, 2}, 1)}}),
              AllOf(HasSubstr("no tensor layers.0.k"), HasSubstr("a captured file has")));
  EXPECT_THAT(with("layers.1.k", RandomTensor({200, 128}, 1)),
              HasSubstr("layers.1.k has the shape [200, 128]"));
  EXPECT_THAT(with("layers.1.v", RandomTensor({199, 2, 32}, 1)), HasSubstr("differ in tokens or KV heads"));
  EXPECT_THAT(with("layers.1.q", RandomTensor({200, 4, 32}, 1)), HasSubstr("differ in the head dim"));
  EXPECT_THAT(with("layers.1.q", RandomTensor({201, 4, 64}, 1)), HasSubstr("more queries than tokens"));
  EXPECT_THAT(with("layers.1.q", RandomTensor({200, 3, 64}, 1)), HasSubstr("no multiple of the KV heads"));
  EXPECT_THAT(with("layers.1.v", RandomTensor({200, 2, 20}, 1)), HasSubstr("head dim 20"));
  EXPECT_THAT(with("layers.1.k", RandomTensor({0, 2, 64}, 1)), HasSubstr("[0, 2, 64]"));
  EXPECT_THAT(with("layers.1.sinks", RandomTensor({3}, 1)), HasSubstr("3 values for 4 query heads"));
  FileTensor broken = RandomTensor({200, 2, 32}, 1);
  broken.values[77] = NAN;
  EXPECT_THAT(with("layers.1.v", broken), AllOf(HasSubstr("layers.1.v"), HasSubstr("nan at 77")));
  FileTensors shorter = SmallCapture();
  for (const auto& [part, width] : std::map<std::string, int64_t>{{"k", 64}, {"v", 32}})
    shorter["layers.1." + part] = RandomTensor({100, 2, width}, 1);
  shorter["layers.1.q"] = RandomTensor({100, 4, 64}, 1);
  EXPECT_THAT(ErrorOf(shorter), HasSubstr("layers.1.k has 100 tokens, layer 0 has 200"));
  EXPECT_THAT(ErrorOf(SmallCapture(), {{"rope", "none"}}), HasSubstr("after RoPE"));
  EXPECT_THAT(ErrorOf(SmallCapture(), {{"scale", "-1"}}), HasSubstr("scale"));
  EXPECT_THAT(ErrorOf(SmallCapture(), {{"sliding_window", "wide"}}), HasSubstr("sliding_window"));
  EXPECT_EQ(CapturedFile::Open("/nowhere/x").status().code(), absl::StatusCode::kNotFound);
}

TEST(CapturedFileTest, IntegersAreNoVectors) {
  std::string bytes = FileBytes(SmallCapture());
  const size_t at = bytes.find("\"F32\"");
  bytes.replace(at, 5, "\"I32\"");
  EXPECT_THAT(std::string(OpenBytes(bytes).status().message()),
              HasSubstr("captured tensors are F32, F16 or BF16"));
}

// Damaged headers and lengths: an error or a whole file, never a crash or a read outside.
TEST(CapturedFileTest, DamagedFilesAreRefusedOrReadWhole) {
  FileTensors tensors;
  tensors["layers.0.k"] = RandomTensor({3, 1, 16}, 1);
  tensors["layers.0.v"] = RandomTensor({3, 1, 16}, 2);
  tensors["layers.0.q"] = RandomTensor({2, 2, 16}, 3);
  const std::string whole = FileBytes(tensors, {{"rope", "applied"}});
  std::mt19937 random(20261122);
  int refused = 0;
  constexpr int kRounds = 4000;
  for (int round = 0; round < kRounds; ++round) {
    std::string bytes = whole;
    const int changes = 1 + static_cast<int>(random() % 3);
    for (int c = 0; c < changes; ++c) {
      const size_t at = random() % std::min<size_t>(bytes.size(), 400);
      bytes[at] = static_cast<char>(random() % 4 == 0 ? random() : "0123456789[]{},:\"kvqF"[random() % 21]);
    }
    if (random() % 8 == 0) bytes.resize(random() % bytes.size());
    std::map<std::string, std::string> metadata;
    const auto layers =
        ParseCapture({reinterpret_cast<const std::byte*>(bytes.data()), bytes.size()}, &metadata);
    if (!layers.ok()) {
      ++refused;
      EXPECT_FALSE(layers.status().message().empty());
      continue;
    }
    for (const CapturedLayer& layer : *layers) {
      EXPECT_LE(layer.queries, layer.tokens);
      EXPECT_GE(layer.k.bytes.data(), reinterpret_cast<const std::byte*>(bytes.data()));
      EXPECT_LE(layer.v.bytes.data() + layer.v.bytes.size(),
                reinterpret_cast<const std::byte*>(bytes.data() + bytes.size()));
    }
  }
  EXPECT_GT(refused, kRounds / 2);
}

TEST(CaptureWriterTest, WhatIsWrittenInPiecesIsReadAgain) {
  const std::string path = Path("written.safetensors");
  CaptureShape shape{{2, 4, 2, 32, 0}, 100, 30, DataType::kF32};
  const FileTensor k = RandomTensor({100, 2, 32}, 1), v = RandomTensor({100, 2, 32}, 2),
                   q = RandomTensor({100, 4, 32}, 3);
  {
    auto writer = CaptureWriter::Create(path, shape, {{"model", "m \xff"}});
    ASSERT_TRUE(writer.ok()) << writer.status();
    for (int start = 0; start < 100; start += 37) {
      const int n = std::min(37, 100 - start);
      for (int layer = 0; layer < 2; ++layer) {
        ASSERT_TRUE((*writer)
                        ->Write(layer, start, n, q.values.data() + start * 128, k.values.data() + start * 64,
                                v.values.data() + start * 64)
                        .ok());
      }
    }
    EXPECT_FALSE(std::filesystem::exists(path));
    ASSERT_TRUE((*writer)->Finish().ok());
    EXPECT_EQ(static_cast<int64_t>(std::filesystem::file_size(path)), (*writer)->bytes());
  }
  const auto file = CapturedFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  const auto vectors = file->Read(1);
  ASSERT_TRUE(vectors.ok()) << vectors.status();
  EXPECT_EQ(vectors->k, k.values);
  EXPECT_EQ(vectors->v, v.values);
  EXPECT_EQ(vectors->q, std::vector<float>(q.values.end() - 30 * 128, q.values.end()));
  std::filesystem::remove(path);
}

TEST(CaptureWriterTest, LeavesNothingBehindWhenItDoesNotFinish) {
  const std::string path = Path("unfinished.safetensors");
  const float huge[32] = {1e6f};
  {
    auto writer = CaptureWriter::Create(path, {{1, 1, 1, 32, 0}, 1, 1, DataType::kF16}, {});
    ASSERT_TRUE(writer.ok());
    const absl::Status status = (*writer)->Write(0, 0, 1, huge, huge, huge);
    EXPECT_THAT(std::string(status.message()), AllOf(HasSubstr("f16 cannot hold"), HasSubstr("--dtype f32")));
  }
  EXPECT_FALSE(std::filesystem::exists(path));
  EXPECT_FALSE(std::filesystem::exists(path + ".part"));
  EXPECT_EQ(CaptureWriter::Create("/nowhere/x", {{1, 1, 1, 32, 0}, 1, 1, DataType::kF16}, {}).status().code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace kvtide::cli
