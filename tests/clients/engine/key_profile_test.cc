#include "clients/engine/key_profile.h"

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "clients/engine/key_calibration.h"
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
  ThreadPool pool(2);
  KeyCalibration calibration(Geometry(), KeysAt::kBeforeRope, pool);
  std::vector<float> keys(3 * 32), queries(3 * 64, 1.0f);
  for (size_t i = 0; i < keys.size(); ++i) keys[i] = static_cast<float>(i);
  calibration.Add(0, 64, 3, queries.data(), keys.data());
  calibration.Add(1, 64, 1, queries.data(), keys.data());
  calibration.Add(1, 65, 1, queries.data(), keys.data() + 32);
  EXPECT_EQ(calibration.tokens(), 3);
  EXPECT_EQ(calibration.means()[0][5], 32 + 5);
  EXPECT_EQ(calibration.means()[1][21], 16 + 21);
}

// Rows of a few strong directions.
std::vector<float> Rows(uint32_t seed, int tokens, int width) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows(static_cast<size_t>(tokens * width));
  for (size_t i = 0; i < rows.size(); ++i) rows[i] = 1 + normal(random) * (i % 4 == 1 ? 5.0f : 0.3f);
  return rows;
}

KeyProfile Transformed(std::vector<KeyTypeError>* errors, const KvGeometry& geometry = Geometry(),
                       KeysAt keys = KeysAt::kBeforeRope) {
  ThreadPool pool(2);
  KeyCalibration calibration(geometry, keys, pool);
  for (int layer = 0; layer < 2; ++layer) {
    const auto seed = static_cast<uint32_t>(10 * layer);
    calibration.Add(layer, 64, 300, Rows(seed, 300, 64).data(), Rows(seed + 1, 300, 32).data());
    calibration.HoldBack(layer, 364, 100, Rows(seed + 2, 100, 64).data(), Rows(seed + 3, 100, 32).data());
  }
  KeyProfile profile{"model", "text", calibration.tokens(), 2, 16, calibration.means(), {}};
  const absl::Status status = calibration.AddTransforms(&profile, errors);
  EXPECT_TRUE(status.ok()) << status;
  return profile;
}

TEST_F(KeyProfileTest, TransformsBeatTurboOnHeldBackTokensAndComeBackFromTheirFile) {
  std::vector<KeyTypeError> errors;
  const KeyProfile profile = Transformed(&errors);
  ASSERT_EQ(errors.size(), 4u);
  for (const KeyTypeError& error : errors) {
    EXPECT_GT(error.error, 0);
    EXPECT_TRUE(error.error < error.beside_error / 2 || error.type == "tide1") << error.type;
  }
  EXPECT_EQ(errors[3].beside, "turbo2") << "of twice the bits";
  EXPECT_EQ(errors[1].type, "tide3");
  EXPECT_EQ(errors[1].beside, "turbo3");
  ASSERT_TRUE(WriteKeyProfile(path_, profile).ok());
  const auto read = ReadKeyProfile(path_);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->means, profile.means);
  EXPECT_EQ(read->transforms, profile.transforms);
  EXPECT_TRUE(CheckKeyProfile(*read, Geometry()).ok());
  KvGeometry turned = Geometry();
  turned.ropes.assign(2, {RopePairs::kHalves, {1.0f, 0.5f}});
  EXPECT_THAT(std::string(CheckKeyProfile(*read, turned).message()), HasSubstr("another RoPE in layer 0"));
}

// Transforms after RoPE: of keys as they are, for a model with a RoPE that the file still names.
TEST_F(KeyProfileTest, TransformsAfterRopeComeBackAndCodeKeysAsTheyAre) {
  KvGeometry turned = Geometry();
  turned.ropes.assign(2, {RopePairs::kNeighbours, {1.0f, 0.5f}});
  std::vector<KeyTypeError> errors;
  KeyProfile profile = Transformed(&errors, turned, KeysAt::kAfterRope);
  profile.context = 400;
  for (const KeyTypeError& error : errors)
    EXPECT_TRUE(error.error < error.beside_error / 2 || error.type == "tide1") << error.type;
  EXPECT_TRUE(profile.after_rope);
  ASSERT_TRUE(WriteKeyProfile(path_, profile).ok());
  const auto read = ReadKeyProfile(path_);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_TRUE(read->after_rope);
  EXPECT_EQ(read->context, 400);
  EXPECT_EQ(read->transforms, profile.transforms);
  EXPECT_TRUE(CheckKeyProfile(*read, turned).ok());
  KvGeometry other = turned;
  other.ropes[1].frequencies[0] = 0.25f;
  EXPECT_THAT(std::string(CheckKeyProfile(*read, other).message()), HasSubstr("another RoPE in layer 1"));
  const auto coding = FormatProfile(*read);
  ASSERT_TRUE(coding.ok());
  EXPECT_FALSE(coding->keys_turned_back());
  // Nothing was turned back: the statistics are those of the same rows for a model without RoPE.
  const auto plain = FormatProfile(Transformed(&errors));
  ASSERT_TRUE(plain.ok());
  EXPECT_EQ(coding->k[3].centre, plain->k[3].centre);
  EXPECT_EQ(coding->k[3].transform, plain->k[3].transform);
  KvGeometry geometry = turned;
  UseKeyProfile(*read, &geometry);
  EXPECT_TRUE(geometry.key_transforms[1].frequencies.empty());
  const auto before = FormatProfile(Transformed(&errors, turned));
  ASSERT_TRUE(before.ok());
  EXPECT_TRUE(before->keys_turned_back());
  EXPECT_NE(before->k[3].transform, coding->k[3].transform);
}

// Held-back tokens that look nothing like the others: their keys lie where the profile has no bits.
TEST_F(KeyProfileTest, AProfileThatDoesNotHoldElsewhereIsRefused) {
  ThreadPool pool(1);
  KvGeometry geometry = Geometry();
  geometry.head_dim = 64;  // without padding, whose bits the head could use
  KeyCalibration calibration(geometry, KeysAt::kBeforeRope, pool);
  for (int layer = 0; layer < 2; ++layer) {
    calibration.Add(layer, 64, 300, Rows(1, 300, 256).data(), Rows(2, 300, 128).data());
    std::vector<float> q = Rows(3, 100, 256), k = Rows(4, 100, 128);
    std::rotate(q.begin(), q.begin() + 1, q.end());
    std::rotate(k.begin(), k.begin() + 1, k.end());
    calibration.HoldBack(layer, 364, 100, q.data(), k.data());
  }
  KeyProfile profile{"model", "text", 300, 2, 64, calibration.means(), {}};
  std::vector<KeyTypeError> errors;
  EXPECT_THAT(std::string(calibration.AddTransforms(&profile, &errors).message()),
              HasSubstr("on the tokens that were held back tide"));
  EXPECT_TRUE(profile.transforms.empty());
}

TEST_F(KeyProfileTest, RefusesDamagedTransforms) {
  std::vector<KeyTypeError> errors;
  const KeyProfile good = Transformed(&errors);
  const auto message = [&](auto change) {
    KeyProfile profile = good;
    change(profile);
    EXPECT_TRUE(WriteKeyProfile(path_, profile).ok());
    return Message();
  };
  EXPECT_THAT(message([](KeyProfile& p) { p.transforms[1].matrices[3] = NAN; }),
              HasSubstr("a value of nan in a transform"));
  EXPECT_THAT(message([](KeyProfile& p) { p.transforms[0].widths[2] = 200; }),
              HasSubstr("layers.0.key_widths has the value 200"));
  EXPECT_THAT(message([](KeyProfile& p) {
                std::fill(p.transforms[0].matrices.begin(), p.transforms[0].matrices.begin() + 256, 0.0f);
              }),
              HasSubstr("without an inverse"));
  EXPECT_THAT(message([](KeyProfile& p) {
                std::fill(p.transforms[1].widths.begin(), p.transforms[1].widths.end(), uint8_t{6});
              }),
              HasSubstr("width"));
}

TEST_F(KeyProfileTest, ComesBackFromItsFile) {
  KeyProfile profile{"model", "text", 1234, 2, 16, {std::vector<float>(32, 1.5f), std::vector<float>(32)},
                     {}};
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

TEST_F(KeyProfileTest, DamagedFilesAreReadOrRefused) {
  std::vector<KeyTypeError> errors;
  ASSERT_TRUE(WriteKeyProfile(path_, Transformed(&errors)).ok());
  std::ifstream file(path_, std::ios::binary);
  const std::string good((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  std::mt19937 random(3);
  int refused = 0;
  for (int i = 0; i < 300; ++i) {
    std::string bad = good.substr(0, i % 3 == 0 ? random() % good.size() : good.size());
    for (int flips = 0; flips < 3 && !bad.empty(); ++flips)
      bad[random() % (i % 2 == 0 ? bad.size() : std::min<size_t>(bad.size(), 900))] ^=
          static_cast<char>(1 + random() % 255);
    std::ofstream(path_, std::ios::binary) << bad;
    const auto read = ReadKeyProfile(path_);
    refused += !read.ok();
    if (read.ok()) {
      EXPECT_EQ(read->transforms.size(), read->means.size());
    }
  }
  EXPECT_GT(refused, 100);
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
  write("kvtide-key-profile-2", {first});
  EXPECT_THAT(Message(), HasSubstr("of an earlier layout, which is no longer read"));
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
