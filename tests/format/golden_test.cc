// Freezes the bytes of every type: tests/golden/format/digests.txt has a digest for every type, side and head
// dim, and TYPE.bin the K and V half pages of head dim 64. If this fails, stored blocks of older versions
// would be misread: raise the type's kVersion, then write the files anew with
//     KVTIDE_WRITE_GOLDEN=1 build/dev/tests/format/kvtide_test_format --gtest_filter='*Golden*'
// run in the root of the tree.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <sstream>

#include "tests/format/half_page.h"
#include "tests/format/test_rows.h"
#include "tests/format/test_tide.h"

namespace kvtide {
namespace {

const char kFolder[] = "tests/golden/format/";

// 61 tokens of ordinary rows, some of them large, tiny, constant or spiked.
std::vector<float> GoldenRows(int dim) {
  std::vector<float> rows = test::BellRows(20240607u + static_cast<uint64_t>(dim), 61, dim);
  for (int i = 0; i < dim; i++) {
    rows[static_cast<size_t>(3 * dim + i)] *= 9000.0f;
    rows[static_cast<size_t>(5 * dim + i)] *= 3.0517578e-5f;
    rows[static_cast<size_t>(8 * dim + i)] = 0.75f;
    rows[static_cast<size_t>(13 * dim + i)] = i == 17 ? -31.0f : 0.0f;
    rows[static_cast<size_t>(21 * dim + i)] *= i % 16 == 2 ? 8.0f : 1.0f;
  }
  return rows;
}

HeadProfile GoldenProfile(int dim) {
  test::Random random(99);
  HeadProfile profile;
  for (int i = 0; i < dim; i++) {
    profile.mean.push_back(random.Bell());
    profile.gain.push_back(0.25f + static_cast<float>(random.Below(64)) / 32.0f);
  }
  return profile;
}

uint64_t Digest(const std::vector<std::byte>& bytes) {  // FNV-1a
  uint64_t hash = 0xcbf29ce484222325u;
  for (const std::byte b : bytes) hash = (hash ^ std::to_integer<uint64_t>(b)) * 0x100000001b3u;
  return hash;
}

std::string Digests() {
  std::ostringstream out;
  for (const CacheType type : AllCacheTypes())
    for (const int dim : test::HeadDims()) {
      const std::vector<float> rows = GoldenRows(dim);
      const HeadProfile profile = GoldenProfile(dim);
      const uint64_t k = Digest(test::HalfPage(type, Side::kKey, dim).Encode(rows, 61).bytes);
      const uint64_t k_profile =
          Digest(test::HalfPage(type, Side::kKey, dim).Encode(rows, 61, &profile).bytes);
      const uint64_t v = Digest(test::HalfPage(type, Side::kValue, dim).Encode(rows, 61).bytes);
      char line[160];
      std::snprintf(line, sizeof(line), "%s v%d d%d k %016llx k+profile %016llx v %016llx\n", Name(type),
                    Info(type).version, dim, static_cast<unsigned long long>(k),
                    static_cast<unsigned long long>(k_profile), static_cast<unsigned long long>(v));
      out << line;
    }
  return out.str();
}

std::string HalfPages(CacheType type) {
  std::string bytes;
  for (const Side side : {Side::kKey, Side::kValue}) {
    const test::HalfPage page = test::HalfPage(type, side, 64).Encode(GoldenRows(64), 61);
    bytes.append(reinterpret_cast<const char*>(page.bytes.data()), page.bytes.size());
  }
  return bytes;
}

void CompareOrWrite(const std::string& name, const std::string& now) {
  const std::string path = kFolder + name;
  if (std::getenv("KVTIDE_WRITE_GOLDEN") != nullptr) {
    std::ofstream(path, std::ios::binary) << now;
    GTEST_SKIP() << "wrote " << path;
  }
  std::ifstream file(path, std::ios::binary);
  ASSERT_TRUE(file.good()) << path << " is missing; this test runs in the root of the tree";
  const std::string golden((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  EXPECT_TRUE(golden == now) << path << " differs: the stored bytes changed";
}

TEST(GoldenDigests, OfEveryTypeSideAndDim) { CompareOrWrite("digests.txt", Digests()); }

// Calibrated types, which need a profile and code keys only: digests, and the half page of head dim 64.
std::string TideDigests(bool after_rope) {
  std::ostringstream out;
  for (const CacheType type : CalibratedTypes())
    for (const int dim : test::HeadDims()) {
      HeadProfile head = test::TideHead(dim, 77);
      if (after_rope) head = test::AfterRope(head);
      char line[160];
      std::snprintf(line, sizeof(line), "%s v%d d%d k %016llx\n", Name(type), Info(type).version, dim,
                    static_cast<unsigned long long>(
                        Digest(test::HalfPage(type, Side::kKey, dim)
                                   .Encode(GoldenRows(dim), 61, &head, after_rope ? 6400 : 0)
                                   .bytes)));
      out << line;
    }
  return out.str();
}
TEST(GoldenTideDigests, OfEveryDim) { CompareOrWrite("tide_digests.txt", TideDigests(false)); }
TEST(GoldenTideDigests, OfEveryDimAfterRope) {
  CompareOrWrite("tide_after_rope_digests.txt", TideDigests(true));
}

class GoldenTide : public testing::TestWithParam<int> {};
TEST_P(GoldenTide, HalfPage) {
  const CacheType type = CalibratedTypes()[static_cast<size_t>(GetParam())];
  const HeadProfile head = test::TideHead(64, 77);
  const test::HalfPage page = test::HalfPage(type, Side::kKey, 64).Encode(GoldenRows(64), 61, &head);
  CompareOrWrite(std::string(Name(type)) + ".bin",
                 std::string(reinterpret_cast<const char*>(page.bytes.data()), page.bytes.size()));
}
INSTANTIATE_TEST_SUITE_P(Types, GoldenTide, testing::Range(0, kTideTypes));

class Golden : public testing::TestWithParam<int> {};
TEST_P(Golden, HalfPages) {
  const CacheType type = static_cast<CacheType>(GetParam());
  CompareOrWrite(std::string(Name(type)) + ".bin", HalfPages(type));
}
INSTANTIATE_TEST_SUITE_P(Types, Golden, testing::Range(0, kCodecTypes),
                         [](const testing::TestParamInfo<int>& p) {
                           return std::string(Name(static_cast<CacheType>(p.param)));
                         });

}  // namespace
}  // namespace kvtide
