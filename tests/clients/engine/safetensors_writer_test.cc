#include "clients/engine/safetensors_writer.h"

#include <unistd.h>

#include <filesystem>

#include "clients/engine/safetensors.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::engine {
namespace {

TEST(SafetensorsWriterTest, TheReaderReadsWhatIsWritten) {
  const std::string path = testing::TempDir() + "/kvtide_writer_" + std::to_string(getpid()) + ".safetensors";
  const std::vector<float> a = {1, 2, 3, 4, 5, 6};
  const std::vector<uint16_t> b = {0x3c00, 0x4000};
  const std::vector<TensorToWrite> tensors = {{"a", DataType::kF32, {2, 3}, std::as_bytes(std::span(a))},
                                              {"b", DataType::kF16, {2}, std::as_bytes(std::span(b))}};
  ASSERT_TRUE(WriteSafetensors(path, tensors, {{"format", "test"}, {"note", "\"quoted\""}}).ok());
  const auto file = MappedFile::Open(path);
  ASSERT_TRUE(file.ok()) << file.status();
  std::map<std::string, std::string> metadata;
  const auto read = ParseSafetensors((*file)->bytes(), &metadata);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(metadata["note"], "\"quoted\"");
  EXPECT_THAT(read->at("a").shape, testing::ElementsAre(2, 3));
  float row[3];
  read->at("a").Row(1, row);
  EXPECT_THAT(row, testing::ElementsAre(4, 5, 6));
  EXPECT_EQ(read->at("b").type, DataType::kF16);
  // Data begins at a whole word, so that it can be mapped.
  EXPECT_EQ(SafetensorsHeader(tensors, {}).size() % 8, 0u);
  std::filesystem::remove(path);
}

TEST(SafetensorsWriterTest, AFileThatCannotBeWrittenIsNotThere) {
  const absl::Status status = WriteSafetensors("/no/such/folder/x.safetensors", {}, {});
  EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("cannot write /no/such/folder"));
}

}  // namespace
}  // namespace kvtide::engine
