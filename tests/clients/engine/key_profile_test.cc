#include "clients/engine/key_profile.h"

#include <unistd.h>

#include <cmath>
#include <filesystem>

#include "clients/engine/safetensors_writer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::engine {
namespace {

using testing::HasSubstr;

KvGeometry Geometry() {
  KvGeometry g;
  g.layers = 2;
  g.query_heads = 4;
  g.kv_heads = 2;
  g.head_dim = 16;
  return g;
}

class KeyProfileTest : public testing::Test {
 protected:
  ~KeyProfileTest() override { std::filesystem::remove(path_); }
  std::string Message() { return std::string(ReadKeyProfile(path_).status().message()); }

  const std::string path_ =
      testing::TempDir() + "/kvtide_profile_" + std::to_string(getpid()) + ".safetensors";
};

TEST_F(KeyProfileTest, MeansAreThoseOfTheKeys) {
  KeyMeans means(Geometry());
  std::vector<float> keys(3 * 32);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<float>(i);
  means.Add(0, 3, keys.data());
  means.Add(1, 1, keys.data());
  means.Add(1, 1, keys.data() + 32);
  EXPECT_EQ(means.tokens(), 3);
  EXPECT_EQ(means.means()[0][5], 32 + 5);
  EXPECT_EQ(means.means()[1][5], 16 + 5);
}

TEST_F(KeyProfileTest, ComesBackFromItsFile) {
  KeyProfile profile{"model", "text", 1234, 2, 16, {std::vector<float>(32, 1.5f), std::vector<float>(32)}};
  profile.means[1][31] = -7;
  ASSERT_TRUE(WriteKeyProfile(path_, profile).ok());
  const auto read = ReadKeyProfile(path_);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->model, "model");
  EXPECT_EQ(read->tokens, 1234);
  EXPECT_EQ(read->means, profile.means);
  EXPECT_TRUE(CheckKeyProfile(*read, Geometry()).ok());
  KvGeometry other = Geometry();
  other.kv_heads = 4;
  EXPECT_THAT(std::string(CheckKeyProfile(*read, other).message()),
              HasSubstr("the profile is of model with 2 layers of 2 KV heads of 16; this model has 2 of 4"));
}

TEST_F(KeyProfileTest, RefusesWhatIsNone) {
  const std::vector<float> mean(32, 1.0f), infinite(32, INFINITY);
  const auto write = [&](const std::string& format, const std::vector<TensorToWrite>& tensors) {
    ASSERT_TRUE(WriteSafetensors(path_, tensors, {{"format", format}, {"tokens", "5"}}).ok());
  };
  const std::string good = "kvtide-key-profile-1";
  const TensorToWrite first{"layers.0.key_mean", DataType::kF32, {2, 16}, std::as_bytes(std::span(mean))};
  write("kvtide-key-profile-9", {first});
  EXPECT_THAT(Message(), HasSubstr("its format is \"kvtide-key-profile-9\", not \"kvtide-key-profile-1\""));
  write(good, {});
  EXPECT_THAT(Message(), HasSubstr("no layers"));
  write(good, {first, {"layers.2.key_mean", DataType::kF32, {2, 16}, std::as_bytes(std::span(mean))}});
  EXPECT_THAT(Message(), HasSubstr("it has no layers.1.key_mean"));
  write(good, {first, {"layers.1.key_mean", DataType::kF32, {4, 8}, std::as_bytes(std::span(mean))}});
  EXPECT_THAT(Message(), HasSubstr("layers.1.key_mean is not f32 [kv_heads][head_dim] as that of layer 0"));
  write(good, {{"layers.0.key_mean", DataType::kF32, {2, 16}, std::as_bytes(std::span(infinite))}});
  EXPECT_THAT(Message(), HasSubstr("has the value inf"));
  write(good, {first});
  EXPECT_TRUE(ReadKeyProfile(path_).ok());
  EXPECT_FALSE(ReadKeyProfile("/no/such/profile").ok());
}

}  // namespace
}  // namespace kvtide::engine
