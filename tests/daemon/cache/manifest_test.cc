// What manifests of other builds hold is read or refused by name: golden bytes of version 5, a daemon that
// finds what such a build has made durable, and versions that nobody reads any more.
#include "daemon/cache/persist/manifest.h"

#include <fstream>
#include <sstream>

#include "tests/daemon/cache/cache_fixture.h"
#include "tests/source_path.h"

namespace kvtide::testing {
namespace {

std::string Golden() {
  const std::ifstream file(SourcePath("tests/golden/cache/manifest_v5.bin"), std::ios::binary);
  std::ostringstream text;
  text << file.rdbuf();
  return text.str();
}

template <class T>
std::string BytesOf(T value) {
  return {reinterpret_cast<const char*>(&value), sizeof value};
}

// The form of version 7, which ended before what blocks may be recoded as.
std::string AsVersion7(const Manifest& manifest) {
  EXPECT_TRUE(manifest.options.degrade.empty());
  std::string bytes = EncodeManifest(manifest);
  bytes.resize(bytes.size() - (1 + manifest.groups.size()) * sizeof(uint64_t));
  bytes.replace(0, sizeof(uint32_t), BytesOf(uint32_t{7}));
  return bytes;
}

// What a build of version 5 would have written of a manifest without tokens whose tenant's name occurs once
// in it.
std::string AsVersion5(Manifest manifest) {
  EXPECT_TRUE(manifest.chain_keys.empty() && manifest.chain_rest.empty() && !manifest.closed);
  EXPECT_TRUE(manifest.options.salt.empty() && manifest.model_revision == 0);
  std::string bytes = AsVersion7(manifest);
  bytes.resize(bytes.size() - 4 * sizeof(uint64_t));   // seed, no keys, no ids, no revision
  bytes.erase(sizeof(uint32_t), 1 + sizeof(int64_t));  // not closed
  bytes.replace(0, sizeof(uint32_t), BytesOf(uint32_t{5}));
  const std::string tenant =
      BytesOf(uint64_t{manifest.options.name_space.size()}) + manifest.options.name_space;
  const size_t at = bytes.find(tenant);
  EXPECT_NE(at, std::string::npos);
  bytes.erase(at + tenant.size(), sizeof(uint64_t));  // no salt
  return bytes;
}

TEST(ManifestTest, WhatVersion5HoldsIsRead) {
  const std::string golden = Golden();
  ASSERT_EQ(golden.size(), 2638u);
  int64_t written = 1;
  EXPECT_FALSE(IsClosedManifest(golden, &written));
  EXPECT_EQ(written, 0);
  const absl::StatusOr<Manifest> read = DecodeManifest(golden);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->id, 0x0123456789abcdefu);
  EXPECT_EQ(read->forked_from, 42u);
  EXPECT_EQ(read->created_unix_nanos, 1764460800000000007);
  EXPECT_EQ(read->device, "cuda:0");
  EXPECT_EQ(read->model.name, "golden");
  ASSERT_EQ(read->model.groups.size(), 2u);
  EXPECT_EQ(read->model.groups[0].shape, (GroupShape{2, 1, 64, 64}));
  EXPECT_EQ(read->model.groups[0].key_means.size(), 128u);
  EXPECT_EQ(read->model.groups[1].window, 200);
  EXPECT_EQ(read->model.groups[1].softcap, 30);
  EXPECT_EQ(read->model.layers, (std::vector<LayerSpec>{{0, 0}, {0, 1}, {1, 0}}));
  EXPECT_EQ(read->model_tenant, "operator");
  const SequenceOptions& options = read->options;
  EXPECT_EQ(PairName(options.pair), "q8_0/turbo4");
  ASSERT_EQ(options.group_pairs.size(), 2u);
  EXPECT_EQ(PairName(options.group_pairs[1]), "turbo3/turbo3");
  EXPECT_EQ(options.exact_window.first_blocks, 1);
  EXPECT_EQ(options.exact_window.last_blocks, 2);
  EXPECT_EQ(options.centre, Centre::kFirstBlock);
  EXPECT_EQ(options.equalise, Equalise::kRoot);
  EXPECT_EQ(options.rope_pairs, RopePairs::kNeighbours);
  EXPECT_EQ(options.name_space, "acme");
  EXPECT_EQ(options.salt, "");
  EXPECT_EQ(options.device, "cuda:0");
  EXPECT_EQ(options.persistence, Persistence::kAll);
  EXPECT_TRUE(options.allow_drop);
  ASSERT_EQ(read->groups.size(), 2u);
  EXPECT_EQ(read->groups[1].first_block, 2);
  ASSERT_EQ(read->groups[1].blocks.size(), 3u);
  EXPECT_EQ(read->groups[1].blocks[0].offset, 12u * 4096);
  EXPECT_EQ(read->groups[1].blocks[0].profile, 0);
  EXPECT_EQ(read->groups[1].blocks[0].form, ManifestBlock::kCoded);
  EXPECT_EQ(read->groups[1].blocks[1].form, ManifestBlock::kExact);
  EXPECT_EQ(read->groups[0].blocks[1].writer, 42u);
  EXPECT_EQ(read->groups[0].layers[1].tokens, 301);
  EXPECT_EQ(read->groups[0].layers[1].last_hash, 78u);
  EXPECT_FALSE(read->closed);
  EXPECT_TRUE(read->chain_keys.empty());
  EXPECT_TRUE(read->chain_rest.empty());
  // Nothing of it is lost in the version that is written now.
  EXPECT_EQ(AsVersion5(*read), golden);
  for (size_t cut = 0; cut < golden.size(); cut++)
    EXPECT_FALSE(DecodeManifest(golden.substr(0, cut)).ok()) << cut;
  EXPECT_FALSE(DecodeManifest(golden + "x").ok());
}

TEST(ManifestTest, OtherVersionsAreRefusedByName) {
  const std::string golden = Golden();
  for (const uint32_t version : {0u, 1u, 4u, 9u, 1000u}) {
    const std::string bytes = BytesOf(version) + golden.substr(sizeof version);
    EXPECT_TRUE(IsError(DecodeManifest(bytes).status(), absl::StatusCode::kFailedPrecondition,
                        absl::StrCat("has version ", version, ", this build reads 5 to 8")));
  }
}

// Version 6 has all but revisions of models.
TEST(ManifestTest, WhatVersion6HoldsIsRead) {
  Manifest manifest = DecodeManifest(Golden()).value();
  manifest.options.salt = "adapter 7";
  manifest.model_revision = 3;
  const std::string bytes = AsVersion7(manifest);
  EXPECT_EQ(DecodeManifest(bytes).value().model_revision, 3u);
  const std::string older =
      BytesOf(uint32_t{6}) +
      bytes.substr(sizeof(uint32_t), bytes.size() - sizeof(uint32_t) - sizeof(uint64_t));
  const absl::StatusOr<Manifest> read = DecodeManifest(older);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->model_revision, 0u);
  EXPECT_EQ(read->options.salt, "adapter 7");
}

TEST(ManifestTest, WhatBlocksWereRecodedAsIsKept) {
  Manifest manifest = DecodeManifest(Golden()).value();
  EXPECT_TRUE(DecodeManifest(AsVersion7(manifest)).value().groups[0].rungs.empty());
  manifest.options.degrade = {Pair("turbo3"), Pair("turbo2")};
  manifest.groups[0].rungs = {{"turbo3/turbo3", 1, 2, 3}, {"turbo2/turbo2", 4, 5, 6}};
  manifest.groups[0].blocks[1].form = ManifestBlock::kRungs + 1;
  const std::string bytes = EncodeManifest(manifest);
  const absl::StatusOr<Manifest> read = DecodeManifest(bytes);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->options.degrade, manifest.options.degrade);
  EXPECT_EQ(read->groups[0].rungs, manifest.groups[0].rungs);
  EXPECT_EQ(read->groups[0].blocks[1].form, ManifestBlock::kRungs + 1);
  EXPECT_EQ(EncodeManifest(*read), bytes);
  for (size_t cut = 0; cut < bytes.size(); cut++)
    EXPECT_FALSE(DecodeManifest(bytes.substr(0, cut)).ok()) << cut;
  // A rung that is not there.
  manifest.groups[0].blocks[1].form++;
  EXPECT_TRUE(
      IsError(DecodeManifest(EncodeManifest(manifest)).status(), absl::StatusCode::kDataLoss, "forms"));
}

TEST(ManifestTest, TokensAndWhatClosedSequencesLeaveAreKept) {
  Manifest manifest = DecodeManifest(Golden()).value();
  manifest.options.salt = "adapter 7";
  manifest.chain_seed = 99;
  manifest.chain_keys = {{1, 2}, {3, 4}, {5, 6}, {7, 8}, {9, 10}};
  manifest.chain_rest = {11, 12, 13};
  manifest.closed = true;
  manifest.written_unix_nanos = 123;
  const std::string bytes = EncodeManifest(manifest);
  int64_t written = 0;
  EXPECT_TRUE(IsClosedManifest(bytes, &written));
  EXPECT_EQ(written, 123);
  const absl::StatusOr<Manifest> read = DecodeManifest(bytes);
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->options.salt, "adapter 7");
  EXPECT_EQ(read->chain_seed, 99u);
  EXPECT_EQ(read->chain_keys, manifest.chain_keys);
  EXPECT_EQ(read->chain_rest, manifest.chain_rest);
  EXPECT_TRUE(read->closed);
  EXPECT_EQ(EncodeManifest(*read), bytes);
  // A closed one is of blocks whose tokens are known, all of them.
  manifest.chain_keys.pop_back();
  EXPECT_TRUE(
      IsError(DecodeManifest(EncodeManifest(manifest)).status(), absl::StatusCode::kDataLoss, "tokens"));
}

class ManifestUpgradeTest : public CacheTest {};

TEST_F(ManifestUpgradeTest, ADaemonFindsTheSequencesOfABuildOfVersion5) {
  for (const char* pair : {"f16", "q8_0/turbo4", "turbo3"}) {
    StartWithDisk(kMiB * 2, kMiB * 2, kMiB * 8);
    SequenceOptions options = WithPair(pair, {1, 1});
    options.name_space = "a tenant of its own";
    Client client(*cache_, SmallModel(), options, random_);
    ASSERT_TRUE(client.Append(64 * 5 + 30).ok());
    ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
    cache_.reset();
    std::vector<std::string> lost;
    for (const auto& [key, bytes] : disk_->Load(&lost))
      ASSERT_TRUE(disk_->Put(key, AsVersion5(DecodeManifest(bytes).value())).ok());
    Restart(true);
    EXPECT_EQ(cache_->restored().sequences, 1u);
    EXPECT_TRUE(cache_->restored().lost.empty());
    client.Move(*cache_);
    client.CheckAllLayers();
    ASSERT_TRUE(client.Step(100).ok());
    client.CheckAllLayers();
    // And what it becomes is durable as ever.
    ASSERT_TRUE(cache_->Persist({{client.id()}}).ok());
    Restart(true);
    client.Move(*cache_);
    client.CheckAllLayers();
    ASSERT_TRUE(client.Close().ok());
    cache_.reset();
    disk_.reset();
    files_ = std::make_unique<FaultFileSystem>();
  }
}

}  // namespace
}  // namespace kvtide::testing
