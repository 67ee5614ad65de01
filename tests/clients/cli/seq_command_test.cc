// `kvtide seq read` against a real kvtided: what was appended comes back, in both file formats.
#include "clients/cli/ops/seq_command.h"

#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "clients/cli/daemon_process.h"
#include "clients/engine/safetensors.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::cli {
namespace {

using testing::HasSubstr;

constexpr int kTokens = 70, kHeads = 2, kDim = 16, kWidth = kHeads * kDim;

class SeqReadTest : public testing::Test {
 protected:
  void SetUp() override {
    DaemonOptions options;
    options.program = KVTIDE_DAEMON_PROGRAM;
    options.device_bytes = 16 << 20;
    auto daemon = DaemonProcess::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = std::move(*daemon);
    auto client = client::Client::Connect(daemon_->address());
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = std::move(*client);
    client::ModelLayer layer;
    layer.kv_heads = layer.query_heads = kHeads;
    layer.head_dim_k = layer.head_dim_v = kDim;
    ASSERT_TRUE(client_->RegisterModel({"m", {layer, layer}}).ok());
    client::SequenceOptions f16;
    f16.pair = "f16/f16";
    const auto sequence = client_->CreateSequence("m", f16);
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    options_.sequence = *sequence;
    for (int i = 0; i < kTokens * kWidth; ++i)
      k_.push_back(static_cast<float>(i % 1000)), v_.push_back(-k_.back());
    const std::vector<int64_t> shape = {kTokens, kHeads, kDim};
    const std::vector<client::LayerTokens> layers = {
        {0, client::TensorRef::F32(k_, shape), client::TensorRef::F32(v_, shape)},
        {1, client::TensorRef::F32(v_, shape), client::TensorRef::F32(k_, shape)}};
    ASSERT_TRUE(client_->Append(*sequence, 0, layers).ok());
  }
  ~SeqReadTest() override { std::filesystem::remove(options_.out_file); }

  void WriteTo(const std::string& ending) {
    options_.out_file = testing::TempDir() + "/kvtide_seq_" + std::to_string(getpid()) + ending;
  }
  std::string Error() { return std::string(ReadSequence(*client_, options_).status().message()); }

  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<client::Client> client_;
  SeqReadOptions options_;
  std::vector<float> k_, v_;
};

TEST_F(SeqReadTest, AllLayersAsSafetensors) {
  WriteTo(".safetensors");
  options_.type = DataType::kF32;
  const auto said = ReadSequence(*client_, options_);
  ASSERT_TRUE(said.ok()) << said.status();
  EXPECT_THAT(*said, HasSubstr("2 layers, 70 tokens"));
  const auto file = engine::MappedFile::Open(options_.out_file);
  ASSERT_TRUE(file.ok()) << file.status();
  std::map<std::string, std::string> metadata;
  const auto tensors = engine::ParseSafetensors((*file)->bytes(), &metadata);
  ASSERT_TRUE(tensors.ok()) << tensors.status();
  EXPECT_EQ(metadata["pair"], "f16/f16");
  EXPECT_EQ(tensors->size(), 4u);
  const engine::WeightTensor& k = tensors->at("layers.1.v");  // layer 1 has them the other way round
  EXPECT_THAT(k.shape, testing::ElementsAre(kTokens, kHeads, kDim));
  ASSERT_EQ(k.bytes.size(), k_.size() * sizeof(float));
  EXPECT_EQ(std::memcmp(k.bytes.data(), k_.data(), k.bytes.size()), 0);
}

TEST_F(SeqReadTest, OneArrayAsNpy) {
  WriteTo(".npy");
  options_.layers = {0};
  options_.part = "v";
  options_.first = 64;
  options_.tokens = 3;
  const auto said = ReadSequence(*client_, options_);
  ASSERT_TRUE(said.ok()) << said.status();
  std::ifstream in(options_.out_file, std::ios::binary);
  const std::string bytes(std::istreambuf_iterator<char>(in), {});
  ASSERT_GT(bytes.size(), 64u);
  EXPECT_EQ(bytes.substr(0, 8), std::string("\x93NUMPY\x01\x00", 8));
  const size_t header = static_cast<unsigned char>(bytes[8]) + 256u * static_cast<unsigned char>(bytes[9]);
  EXPECT_EQ((10 + header) % 64, 0u);
  EXPECT_THAT(bytes.substr(10, header),
              HasSubstr("{'descr': '<f2', 'fortran_order': False, 'shape': (3, 2, 16), }"));
  EXPECT_EQ(bytes[10 + header - 1], '\n');
  ASSERT_EQ(bytes.size(), 10 + header + 3 * kWidth * 2);
  for (size_t i = 0; i < 3 * kWidth; ++i) {
    uint16_t half;
    std::memcpy(&half, bytes.data() + 10 + header + 2 * i, 2);
    EXPECT_EQ(F16ToF32(half), v_[64 * kWidth + i]);
  }
}

TEST_F(SeqReadTest, SaysWhatIsWrong) {
  WriteTo(".txt");
  EXPECT_THAT(Error(), HasSubstr("must end in .safetensors or .npy"));
  WriteTo(".npy");
  EXPECT_THAT(Error(), HasSubstr("a .npy file has one array"));
  WriteTo(".safetensors");
  options_.first = 70;
  EXPECT_THAT(Error(), HasSubstr("has 70 tokens: nothing from 70 on"));
  options_.first = 0;
  options_.layers = {5};
  EXPECT_FALSE(ReadSequence(*client_, options_).ok());
  options_.layers = {};
  options_.out_file = "/no/such/folder/x.safetensors";
  EXPECT_THAT(Error(), HasSubstr("cannot write"));
  options_.sequence = 12345;
  EXPECT_THAT(Error(), HasSubstr("the daemon holds no sequence 12345"));
}

}  // namespace
}  // namespace kvtide::cli
