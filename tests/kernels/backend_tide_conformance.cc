// Conformance of calibrated keys (tide.h): bytes are those of the definition, attention is that of float64
// over the decoded keys, and nothing is coded or attended without a profile that fits. Backends without
// kernels for them say so in CheckSupport.
#include <cmath>
#include <cstring>
#include <memory>
#include <random>

#include "kernels/format/page_codec.h"
#include "tests/format/test_tide.h"
#include "tests/kernels/attend_check.h"
#include "tests/kernels/backend_conformance.h"
#include "tests/kernels/test_sequence.h"

namespace kvtide::testing {
namespace {

constexpr int kHeadDims[] = {64, 80, 96, 112, 128, 192, 256, 512};

absl::Status CheckTide(Backend& backend) {
  const absl::Status status =
      backend.CheckSupport(BlockLayout({1, 1, 64, 64}, *ParseCachePair("tide3/turbo3")));
  EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kInvalidArgument) << status;
  return status;
}

// Ordinary rows with outliers, tiny, zero and huge ones among them, as an f16 block holds them.
std::vector<float> KeyRows(int dim, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> rows;
  for (int t = 0; t < kBlockTokens; t++)
    for (int d = 0; d < dim; d++) {
      const float size = t % 16 == 3   ? 3000.0f
                         : t % 16 == 5 ? 1e-6f
                         : t % 16 == 7 ? 0.0f
                         : t % 16 == 9 ? 20.0f
                                       : 1.0f;
      const float x = t % 32 == 11 ? (d % 2 == 0 ? 65504.0f : -65504.0f) : size * normal(random);
      rows.push_back(F16ToF32(F32ToF16(x)));
    }
  return rows;
}

constexpr int64_t kPosition = 64 * 37;

// A block of one record.
std::vector<std::byte> Block(const BlockLayout& layout, const HeadProfile* head, const std::vector<float>& k,
                             const std::vector<float>& v, int tokens) {
  std::vector<std::byte> bytes(layout.block_bytes());
  EncodeHalf(layout.pair().k, Side::kKey, layout.k(), head, kPosition, k.data(), tokens, bytes.data());
  EncodeHalf(layout.pair().v, Side::kValue, layout.v(), nullptr, v.data(), tokens,
             bytes.data() + layout.v_codes());
  return bytes;
}

// Profiles of keys before and after RoPE.
std::vector<Profile> BothProfiles(const GroupShape& shape, uint64_t seed) {
  const Profile before = test::TideProfile(shape, seed);
  return {before, test::AfterRope(before)};
}
std::string Coding(const Profile& profile) {
  return profile.keys_turned_back() ? " before RoPE" : " after RoPE";
}

void SealAndRecode(Backend& backend, int dim, const Profile& profile) {
  const GroupShape shape{1, 1, dim, 64};
  const HeadProfile& head = profile.k[0];
  const std::vector<float> v = KeyRows(64, 2);
  for (const char* to_name : {"tide4/turbo4", "tide3/turbo3", "tide2/turbo2", "tide1/turbo2", "turbo2/turbo2", "f16/turbo2"})
    for (const char* from_name : {"f16", "q8_0/turbo4", "turbo4", "tide4/turbo4"})
      for (const int tokens : {kBlockTokens, 41}) {
        SCOPED_TRACE(std::string(from_name) + " to " + to_name + " d " + std::to_string(dim) +
                     Coding(profile));
        const BlockLayout from(shape, *ParseCachePair(from_name)), to(shape, *ParseCachePair(to_name));
        std::vector<float> k = KeyRows(dim, 1);
        const std::vector<std::byte> source = Block(from, &head, k, v, kBlockTokens);
        std::vector<float> values(v.size());
        DecodeHalf(from.pair().k, Side::kKey, from.k(), &head, kPosition, source.data(), k.data());
        DecodeHalf(from.pair().v, Side::kValue, from.v(), nullptr, source.data() + from.v_codes(),
                   values.data());
        std::vector<std::byte> wanted = Block(to, &head, k, values, tokens);
        if (from.pair().k == to.pair().k && tokens == kBlockTokens)
          std::copy_n(source.data(), to.k().bytes, wanted.data());
        if (from.pair().v == to.pair().v && tokens == kBlockTokens)
          std::copy_n(source.data() + from.v_codes(), to.v().bytes, wanted.data() + to.v_codes());
        BackendBlocks a(backend, from, 1), b(backend, to, 1);
        a.Write(0, source);
        b.Write(0, std::vector<std::byte>(to.block_bytes(), std::byte{0x5a}));
        RecodePiece piece;
        piece.from = &from;
        piece.source = a.block(0);
        piece.to = &to;
        piece.target = b.block(0);
        piece.from_profile = piece.to_profile = &profile;
        piece.position = kPosition;
        piece.layers = 1;
        piece.tokens = tokens;
        const absl::Status status = backend.Recode({&piece, 1});
        ASSERT_TRUE(status.ok()) << status;
        EXPECT_EQ(b.Read(0), wanted);
      }
}

TEST_P(BackendConformance, TideSealsAndRecodesToTheBytesOfTheDefinition) {
  if (const absl::Status status = CheckTide(backend()); !status.ok()) GTEST_SKIP() << status;
  for (const int dim : kHeadDims)
    for (const Profile& profile : BothProfiles({1, 1, dim, 64}, 11)) SealAndRecode(backend(), dim, profile);
}

TEST_P(BackendConformance, TideDecodesToTheRowsOfTheDefinition) {
  if (const absl::Status status = CheckTide(backend()); !status.ok()) GTEST_SKIP() << status;
  for (const int dim : kHeadDims) {
    const GroupShape shape{1, 1, dim, 64};
    const Profile profile = test::TideProfile(shape, 12);
    const BlockLayout layout(shape, *ParseCachePair("tide3/turbo3"));
    const std::vector<std::byte> bytes = Block(layout, &profile.k[0], KeyRows(dim, 3), KeyRows(64, 4), 50);
    BackendBlocks blocks(backend(), layout, 1);
    blocks.Write(0, bytes);
    std::vector<float> wanted(static_cast<size_t>(kBlockTokens * dim)), got(wanted.size());
    DecodeHalf(layout.pair().k, Side::kKey, layout.k(), &profile.k[0], kPosition, bytes.data(),
               wanted.data());
    DecodeArgs args;
    args.layout = &layout;
    args.profile = &profile;
    args.block = blocks.block(0);
    args.position = kPosition;
    args.k = got.data();
    const absl::Status status = backend().Decode(args);
    ASSERT_TRUE(status.ok()) << status;
    EXPECT_EQ(std::memcmp(got.data(), wanted.data(), got.size() * sizeof(float)), 0) << "d " << dim;
  }
}

TEST_P(BackendConformance, TideAttendsEveryTypeAtEveryHeadDim) {
  if (const absl::Status status = CheckTide(backend()); !status.ok()) GTEST_SKIP() << status;
  for (const CacheType type : CalibratedTypes())
    for (const int dim : kHeadDims)
      for (const Profile& profile : BothProfiles({1, 2, dim, 64}, 5)) {
        SCOPED_TRACE(std::string(Name(type)) + " d " + std::to_string(dim) + Coding(profile));
        const GroupShape shape{1, 2, dim, 64};
        TestSequence sequence(backend(), shape);
        sequence.AddRun(std::string(Name(type)) + "/turbo3", 130, GaussianRows(3), &profile);
        for (const int group : {1, 4, 6}) {
          AttendCase c;
          c.group = group;
          c.queries = 2;
          CheckAttend(backend(), sequence, c);
        }
        AttendCase c;
        c.group = 3;
        c.queries = 40;
        CheckAttend(backend(), sequence, c);
      }
}

// The pairs and head dims that GPUs attend where they lie, with heads behind the first, 8 and 16 rows, masks,
// and pages that begin anywhere.
TEST_P(BackendConformance, TideAttendsWithValuesOfTheSameBits) {
  if (const absl::Status status = CheckTide(backend()); !status.ok()) GTEST_SKIP() << status;
  for (const int dim : {48, 64, 112, 128})
    for (const char* pair : {"tide4/turbo4", "tide3/turbo3", "tide2/turbo2", "tide1/turbo2"})
      for (const Profile& profile : BothProfiles({2, 3, dim, dim}, static_cast<uint64_t>(dim))) {
        SCOPED_TRACE(std::string(pair) + " d " + std::to_string(dim) + Coding(profile));
        const GroupShape shape{2, 3, dim, dim};
        TestSequence sequence(backend(), shape);
        sequence.AddRun("f16", 64, GaussianRows(1));
        sequence.AddRun(pair, 64 * 9 + 17, GaussianRows(2), &profile);
        for (const int group : {1, 8, 16, 5}) {
          AttendCase c;
          c.layer = 1;
          c.group = group;
          c.queries = group == 5 ? 3 : 1;
          CheckAttend(backend(), sequence, c);
          c.window = 150;
          CheckAttend(backend(), sequence, c);
        }
        AttendCase early;
        early.first_query_position = 200;
        early.queries = 2;
        early.softcap = 15;
        CheckAttend(backend(), sequence, early);
      }
}

// Little of everything, for tools that make it slow: a seal and attention of 8 and 16 rows.
TEST_P(BackendConformance, TideSealsAPageAndAttendsTwo) {
  if (const absl::Status status = CheckTide(backend()); !status.ok()) GTEST_SKIP() << status;
  for (const int dim : {64, 128})
    for (const Profile& profile : BothProfiles({1, 1, dim, dim}, 21)) {
      SCOPED_TRACE("d " + std::to_string(dim) + Coding(profile));
      const GroupShape shape{1, 1, dim, dim};
      const BlockLayout from(shape, ExactPair()), to(shape, *ParseCachePair("tide3/turbo3"));
      const std::vector<float> rows = KeyRows(dim, 1);
      BackendBlocks a(backend(), from, 1), b(backend(), to, 1);
      a.Write(0, Block(from, nullptr, rows, rows, kBlockTokens));
      RecodePiece piece;
      piece.from = &from;
      piece.source = a.block(0);
      piece.to = &to;
      piece.target = b.block(0);
      piece.to_profile = &profile;
      piece.position = kPosition;
      piece.layers = 1;
      const absl::Status status = backend().Recode({&piece, 1});
      ASSERT_TRUE(status.ok()) << status;
      EXPECT_EQ(b.Read(0), Block(to, &profile.k[0], rows, rows, kBlockTokens));
      TestSequence sequence(backend(), shape);
      sequence.AddRun("tide3/turbo3", 100, GaussianRows(2), &profile);
      for (const int group : {8, 16}) {
        AttendCase c;
        c.group = group;
        CheckAttend(backend(), sequence, c);
      }
    }
}

// Exact blocks, blocks of several types and of several profiles, in one sequence.
TEST_P(BackendConformance, TideAttendsRunsOfSeveralTypesAndProfiles) {
  if (const absl::Status status = CheckTide(backend()); !status.ok()) GTEST_SKIP() << status;
  const GroupShape shape{2, 2, 128, 128};
  const Profile one = test::TideProfile(shape, 6), two = test::TideProfile(shape, 60),
                after = test::AfterRope(two), means = RandomProfile(shape, 7);
  for (const int queries : {1, 3, 33}) {
    TestSequence sequence(backend(), shape);
    sequence.AddRun("f16", 64, GaussianRows(1));
    sequence.AddRun("tide3/turbo3", 192, GaussianRows(2), &one);
    sequence.AddRun("tide2/turbo2", 128, GaussianRows(3), &two);
    sequence.AddRun("tide2/turbo2", 128, GaussianRows(7), &after);
    sequence.AddRun("turbo3", 64, GaussianRows(4), &means);
    sequence.AddRun("tide4/turbo4", 64, GaussianRows(8), &after);
    sequence.AddRun("tide1/turbo2", 128, GaussianRows(9), &two);
    sequence.AddRun("tide1/turbo2", 64, GaussianRows(10), &after);
    sequence.AddRun("tide4/q8_0", 64, GaussianRows(5), &one);
    sequence.AddRun("f16", 70, GaussianRows(6));
    AttendCase c;
    c.layer = 1;
    c.queries = queries;
    CheckAttend(backend(), sequence, c);
    c.window = 300;
    c.softcap = 20;
    CheckAttend(backend(), sequence, c);
  }
}

TEST_P(BackendConformance, TideNothingGoesWithoutAProfileThatFits) {
  if (const absl::Status status = CheckTide(backend()); !status.ok()) GTEST_SKIP() << status;
  const GroupShape shape{1, 1, 64, 64};
  const Profile profile = test::TideProfile(shape, 8), other = test::TideProfile({1, 1, 128, 64}, 8),
                means = RandomProfile(shape, 9);
  const BlockLayout exact(shape, ExactPair()), coded(shape, *ParseCachePair("tide3/turbo3"));
  BackendBlocks a(backend(), exact, 1), b(backend(), coded, 1);
  a.Write(0, std::vector<std::byte>(exact.block_bytes()));
  b.Write(0, std::vector<std::byte>(coded.block_bytes()));
  std::byte* const block = b.block(0);
  const std::vector<float> q(64, 1.0f);
  std::vector<float> out(64), lse(1), rows(64 * 64);
  for (const Profile* wrong : {static_cast<const Profile*>(nullptr), &other, &means}) {
    RecodePiece piece;
    piece.from = &exact;
    piece.source = a.block(0);
    piece.to = &coded;
    piece.target = block;
    piece.to_profile = wrong;
    piece.layers = 1;
    EXPECT_EQ(backend().Recode({&piece, 1}).code(), absl::StatusCode::kInvalidArgument);
    BlockRun run;
    run.layout = &coded;
    run.profile = wrong;
    run.blocks = {&block, 1};
    run.tokens = 64;
    AttendItem item;
    item.runs = {&run, 1};
    item.q = q.data();
    item.queries = 1;
    item.first_query_position = 64;
    item.out = out.data();
    item.lse = lse.data();
    AttendArgs args;
    args.heads = 1;
    args.scale = 1;
    args.items = {&item, 1};
    EXPECT_EQ(backend().Attend(args).code(), absl::StatusCode::kInvalidArgument);
    DecodeArgs decode;
    decode.layout = &coded;
    decode.profile = wrong;
    decode.block = block;
    decode.k = rows.data();
    EXPECT_EQ(backend().Decode(decode).code(), absl::StatusCode::kInvalidArgument);
    run.profile = &profile;
    EXPECT_TRUE(backend().Attend(args).ok());
  }
  EXPECT_FALSE(backend().CheckSupport(BlockLayout(shape, {coded.pair().v, coded.pair().k})).ok());
}

}  // namespace
}  // namespace kvtide::testing
