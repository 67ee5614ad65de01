#include "tests/daemon/remote/remote_conformance.h"

#include <cstring>
#include <random>
#include <set>
#include <string>

#include "tests/daemon/cache/cache_node.h"

namespace kvtide::testing {
namespace {

constexpr RemoteLimit kLimit{absl::Seconds(30), nullptr};

BlockLabel Label(uint64_t bytes, int64_t index = 0) {
  BlockLabel label;
  label.bytes = bytes;
  label.model_hash = 7;
  label.name_space_hash = 8;
  label.sequence = 9;
  label.index = index;
  label.chain = {1, 2};
  label.k_type = "q8_0";
  label.v_type = "turbo4";
  label.codec_version_k = 3;
  label.codec_version_v = 4;
  label.profile_hash = 5;
  label.layout_hash = 6;
  return label;
}
RemoteName Named(uint64_t key, int group = 0) { return {RemoteName::Kind::kBlock, {key, ~key}, group}; }

struct Bytes {
  explicit Bytes(size_t size, unsigned seed = 1) : bytes(size) {
    std::mt19937 random(seed);
    for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  }
  RemoteJob Writing(const RemoteName& name, BlockLabel label) {
    RemoteJob job;
    job.name = name;
    job.label = label;
    job.copy = [this](size_t at, std::span<std::byte> piece) {
      std::memcpy(piece.data(), bytes.data() + at, piece.size());
      return absl::OkStatus();
    };
    return job;
  }
  RemoteJob Reading(const RemoteName& name, BlockLabel label) {
    RemoteJob job;
    job.name = name;
    job.label = label;
    job.copy = [this](size_t at, std::span<std::byte> piece) {
      bytes.resize(std::max(bytes.size(), at + piece.size()));
      std::memcpy(bytes.data() + at, piece.data(), piece.size());
      return absl::OkStatus();
    };
    return job;
  }
  std::vector<std::byte> bytes;
};

absl::Status Write(RemoteTier& tier, const std::string& space, const RemoteName& name,
                   const BlockLabel& label, Bytes& bytes) {
  RemoteJob job = bytes.Writing(name, label);
  tier.Write(space, {&job, 1}, kLimit);
  return job.status;
}
absl::Status Read(RemoteTier& tier, const std::string& space, const RemoteName& name, const BlockLabel& label,
                  Bytes& bytes) {
  RemoteJob job = bytes.Reading(name, label);
  tier.Read(space, {&job, 1}, kLimit);
  return job.status;
}

TEST_P(RemoteConformance, BlocksOfAllSizesComeBackToAnotherTier) {
  std::shared_ptr<void> store;
  const auto make = GetParam().make(&store);
  const auto a = make(), b = make();
  std::vector<Bytes> blocks;
  std::vector<RemoteJob> writes, reads;
  const size_t sizes[] = {1, 100, 4095, 4096, 4097, 8192, 50'000, 1 << 20};
  for (const size_t size : sizes) blocks.emplace_back(size, static_cast<unsigned>(size));
  for (Bytes& block : blocks)
    writes.push_back(block.Writing(Named(block.bytes.size()), Label(block.bytes.size())));
  a->Write("space", writes, kLimit);
  std::vector<Bytes> back(blocks.size(), Bytes(0));
  for (size_t i = 0; i < blocks.size(); i++) {
    ASSERT_TRUE(writes[i].status.ok()) << writes[i].status;
    reads.push_back(back[i].Reading(Named(sizes[i]), Label(sizes[i])));
    reads.back().label.profile_hash = 0;
    reads.back().label.sequence = 0;
  }
  b->Read("space", reads, kLimit);
  for (size_t i = 0; i < blocks.size(); i++) {
    ASSERT_TRUE(reads[i].status.ok()) << reads[i].status;
    EXPECT_EQ(back[i].bytes, blocks[i].bytes);
    EXPECT_EQ(reads[i].label.profile_hash, 5u) << "what was found is said";
    EXPECT_EQ(reads[i].label.sequence, 9u);
    EXPECT_EQ(reads[i].label.checksum, writes[i].label.checksum);
  }
  EXPECT_EQ(b->Stats().read_blocks, blocks.size());
  EXPECT_EQ(a->Stats().written_blocks, blocks.size());
}

TEST_P(RemoteConformance, WhatIsFoundIsWhatIsThere) {
  std::shared_ptr<void> store;
  const auto tier = GetParam().make(&store)();
  std::vector<RemoteName> names;
  for (uint64_t key = 0; key < 600; key++) {
    names.push_back(Named(key, static_cast<int>(key % 3)));
    if (key % 7 == 2) continue;
    Bytes bytes(10, static_cast<unsigned>(key));
    ASSERT_TRUE(Write(*tier, "space", names.back(), Label(10, static_cast<int64_t>(key)), bytes).ok());
  }
  const auto found = tier->Find("space", names, kLimit);
  ASSERT_EQ(found.size(), names.size());
  for (size_t i = 0; i < names.size(); i++) {
    EXPECT_EQ(found[i].has_value(), i % 7 != 2) << i;
    if (!found[i].has_value()) continue;
    EXPECT_EQ(found[i]->index, static_cast<int64_t>(i));
  }
  EXPECT_TRUE(tier->Find("space", {}, kLimit).empty());
}

TEST_P(RemoteConformance, NamesAndSpacesNeverMeet) {
  std::shared_ptr<void> store;
  const auto tier = GetParam().make(&store)();
  Bytes bytes(100);
  ASSERT_TRUE(Write(*tier, "space", Named(1, 2), Label(100), bytes).ok());
  const RemoteName others[] = {Named(2, 2),
                               Named(1, 1),
                               {RemoteName::Kind::kProfile, {1, ~uint64_t{1}}, 2},
                               {RemoteName::Kind::kBlock, {~uint64_t{1}, 1}, 2}};
  Bytes back(0);
  for (const RemoteName& other : others)
    EXPECT_TRUE(absl::IsNotFound(Read(*tier, "space", other, Label(100), back)));
  for (const char* space : {"", "spac", "space ", "Space", "space\n"}) {
    EXPECT_TRUE(absl::IsNotFound(Read(*tier, space, Named(1, 2), Label(100), back)));
    const RemoteName name = Named(1, 2);
    EXPECT_FALSE(tier->Find(space, {&name, 1}, kLimit)[0].has_value());
  }
  EXPECT_TRUE(Read(*tier, "space", Named(1, 2), Label(100), back).ok());
}

TEST_P(RemoteConformance, AnotherLabelIsDataLoss) {
  std::shared_ptr<void> store;
  const auto tier = GetParam().make(&store)();
  const std::pair<const char*, std::function<void(BlockLabel&)>> changes[] = {
      {"size", [](BlockLabel& l) { l.bytes++; }},
      {"model", [](BlockLabel& l) { l.model_hash++; }},
      {"namespace", [](BlockLabel& l) { l.name_space_hash++; }},
      {"tenant", [](BlockLabel& l) { l.tenant++; }},
      {"group", [](BlockLabel& l) { l.group++; }},
      {"index", [](BlockLabel& l) { l.index++; }},
      {"key", [](BlockLabel& l) { l.chain[1]++; }},
      {"type of keys", [](BlockLabel& l) { l.k_type = "q4_0"; }},
      {"type of values", [](BlockLabel& l) { l.v_type = "q4_0"; }},
      {"codec of keys", [](BlockLabel& l) { l.codec_version_k++; }},
      {"codec of values", [](BlockLabel& l) { l.codec_version_v++; }},
      {"layout", [](BlockLabel& l) { l.layout_hash++; }},
      {"kind", [](BlockLabel& l) { l.kind = BlockLabel::Kind::kManifest; }},
      {"checksum", [](BlockLabel& l) { l.checksum = 1; }},
  };
  for (const auto& [what, change] : changes) {
    Bytes bytes(100), back(0);
    ASSERT_TRUE(Write(*tier, "space", Named(1), Label(100), bytes).ok());
    BlockLabel wanted = Label(100);
    change(wanted);
    EXPECT_TRUE(absl::IsDataLoss(Read(*tier, "space", Named(1), wanted, back))) << what;
    EXPECT_TRUE(back.bytes.empty()) << what << ": bytes of another block came out";
  }
}

TEST_P(RemoteConformance, TheLastWriteCounts) {
  std::shared_ptr<void> store;
  const auto tier = GetParam().make(&store)();
  for (const size_t size : {50'000, 10, 20'000}) {
    Bytes bytes(size, static_cast<unsigned>(size)), back(0);
    ASSERT_TRUE(Write(*tier, "space", Named(1), Label(size), bytes).ok());
    ASSERT_TRUE(Read(*tier, "space", Named(1), Label(size), back).ok());
    EXPECT_EQ(back.bytes, bytes.bytes);
  }
}

TEST_P(RemoteConformance, JobsFailAlone) {
  std::shared_ptr<void> store;
  const auto tier = GetParam().make(&store)();
  Bytes one(20'000, 1), two(20'000, 2), three(20'000, 3);
  std::vector<RemoteJob> jobs = {one.Writing(Named(1), Label(20'000)), two.Writing(Named(2), Label(20'000)),
                                 three.Writing(Named(3), Label(20'000))};
  jobs[1].copy = [](size_t, std::span<std::byte>) { return absl::InternalError("planted"); };
  tier->Write("space", jobs, kLimit);
  EXPECT_TRUE(jobs[0].status.ok());
  EXPECT_TRUE(absl::IsInternal(jobs[1].status));
  EXPECT_TRUE(jobs[2].status.ok());
  Bytes a(0), b(0), c(0);
  std::vector<RemoteJob> reads = {a.Reading(Named(1), Label(20'000)), b.Reading(Named(2), Label(20'000)),
                                  c.Reading(Named(3), Label(20'000))};
  reads[0].copy = [](size_t, std::span<std::byte>) { return absl::InternalError("planted"); };
  tier->Read("space", reads, kLimit);
  EXPECT_TRUE(absl::IsInternal(reads[0].status));
  EXPECT_TRUE(absl::IsNotFound(reads[1].status));
  ASSERT_TRUE(reads[2].status.ok()) << reads[2].status;
  EXPECT_EQ(c.bytes, three.bytes);
}

TEST_P(RemoteConformance, WhatIsErasedIsGoneAndNothingElse) {
  std::shared_ptr<void> store;
  const auto tier = GetParam().make(&store)();
  Bytes bytes(20'000), back(0);
  std::vector<RemoteName> names;
  for (uint64_t key = 0; key < 100; key++) {
    names.push_back(Named(key));
    ASSERT_TRUE(Write(*tier, "goes", names.back(), Label(20'000), bytes).ok());
  }
  ASSERT_TRUE(Write(*tier, "stays", Named(1), Label(20'000), bytes).ok());
  ASSERT_TRUE(tier->Erase("goes", kLimit).ok());
  for (const auto& found : tier->Find("goes", names, kLimit)) EXPECT_FALSE(found.has_value());
  EXPECT_TRUE(Read(*tier, "stays", Named(1), Label(20'000), back).ok());
  EXPECT_TRUE(tier->Erase("goes", kLimit).ok()) << "nothing is there";
}

// A cache that writes on demotion: what it had no room for another one loads, to the bit.
TEST_P(RemoteConformance, KeepsWhatACacheIsAboutToDrop) {
  constexpr size_t kBlock = 65536;
  constexpr int kBlocks = 60;
  std::shared_ptr<void> store;
  const auto make = GetParam().make(&store);
  const auto tier_a = make(), tier_b = make();
  CacheNode a(tier_a.get(), 4 * kBlock, 20 * kBlock,
              [](CacheOptions& o) { o.remote_writes = RemoteWrites::kOnDemote; });
  CacheNode b(tier_b.get(), 4 * kBlock, 80 * kBlock);
  NamespaceSpec spec;
  spec.model = "engine";
  spec.block_tokens = 16;
  spec.opaque = OpaqueContent{kBlock, "pages"};
  const NamespaceId at_a = a.cache->OpenNamespace(spec, Persistence::kNone)->id,
                    at_b = b.cache->OpenNamespace(spec, Persistence::kNone)->id;
  for (int i = 0; i < kBlocks; i++) {
    const std::string key = std::to_string(i);
    const std::string_view view = key;
    const Bytes payload(kBlock, static_cast<unsigned>(i));
    StoreCall call;
    call.name_space = at_a;
    call.keys = {&view, 1};
    call.form = BlockPayload::kBytes;
    call.payload = payload.bytes;
    ASSERT_EQ(a.cache->StoreBlocks(call)->stored, 1u);
    a.WriteAll();
    if (i == 10) {
      EXPECT_EQ(a.remote_stats().written_blocks, 0u) << "there is room";
    }
  }
  EXPECT_EQ(a.remote_stats().left_out_blocks, 0u);
  EXPECT_LT(a.remote_stats().written_blocks, uint64_t{kBlocks});
  int gone = 0;
  for (int i = 0; i < kBlocks; i++) {
    const std::string key = std::to_string(i);
    const std::string_view view = key;
    LookupCall lookup;
    lookup.name_space = at_a;
    lookup.keys = {&view, 1};
    lookup.peek = true;
    if (a.cache->LookupBlocks(lookup)->hits > 0) continue;
    gone++;
    lookup.name_space = at_b;
    lookup.peek = false;
    lookup.lease = absl::Seconds(5);
    const absl::StatusOr<LookupReport> found = b.cache->LookupBlocks(lookup);
    ASSERT_TRUE(found.ok()) << found.status();
    ASSERT_EQ(found->hits, 1u) << i;
    std::vector<std::byte> back(kBlock);
    LoadCall load;
    load.lease = found->lease;
    load.blocks = 1;
    load.form = BlockPayload::kBytes;
    load.payload = back;
    ASSERT_TRUE(b.cache->LoadBlocks(load).ok());
    EXPECT_EQ(back, Bytes(kBlock, static_cast<unsigned>(i)).bytes);
    EXPECT_TRUE(b.cache->ReleaseLease(found->lease));
  }
  EXPECT_GE(gone, kBlocks - 24);
}

}  // namespace
}  // namespace kvtide::testing
