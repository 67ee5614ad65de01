// The same as the fuzzer does: its corpus, which real writers have made, and what becomes of it when bytes
// change.
//
//   KVTIDE_WRITE_FUZZ_SEEDS=tests/fuzz/corpus/disk kvtide_test_disk --gtest_filter='HostileDisk.*'   writes
//   the corpus
#include "tests/daemon/disk/hostile_disk.h"

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "daemon/cache/persist/keyed_manifest.h"
#include "daemon/disk/extent_header.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

std::vector<std::pair<std::string, std::vector<uint8_t>>> Corpus() {
  std::vector<std::pair<std::string, std::vector<uint8_t>>> corpus;
  for (const auto& entry : std::filesystem::directory_iterator(KVTIDE_FUZZ_CORPUS "/disk")) {
    std::ifstream file(entry.path(), std::ios::binary);
    const std::vector<char> bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    corpus.emplace_back(entry.path().filename(), std::vector<uint8_t>(bytes.begin(), bytes.end()));
  }
  return corpus;
}

void WriteSeeds(const std::string& folder) {
  const auto write = [&](const char* name, char kind, const std::string& text) {
    std::ofstream(folder + "/" + name, std::ios::binary) << kind << text;
  };
  const auto golden = [](const char* name) {
    std::ifstream file(std::string(KVTIDE_GOLDEN) + name, std::ios::binary);
    return std::string(std::istreambuf_iterator<char>(file), {});
  };
  write("manifest.bin", 0, golden("/cache/manifest_v5.bin"));
  write("folder_key.bin", 3, golden("/disk/encryption_v1.bin"));
  write("encrypted_extent.bin", 4, golden("/disk/encrypted_extent_v1.bin"));
  KeyedManifest keyed;
  keyed.written_at = 99;
  keyed.spec.tenant = "acme";
  keyed.spec.model = "small";
  keyed.spec.block_tokens = 64;
  keyed.spec.opaque = OpaqueContent{4096, "zeros"};
  keyed.id = HashNamespaceSpec(keyed.spec);
  keyed.blocks = {{{1, 2}, 4096, 5, 6}, {{3, 4}, 12288, 7, 8}};
  write("keyed_manifest.bin", 1, EncodeKeyedManifest(keyed));
  keyed.spec.opaque.reset();
  keyed.spec.tensors = TensorContent{2, 1, 64, 64, *ParseCachePair("q8_0")};
  keyed.spec.degrade = {*ParseCachePair("turbo4"), *ParseCachePair("turbo3")};
  keyed.id = HashNamespaceSpec(keyed.spec);
  keyed.blocks[1].rung = 2;
  write("keyed_manifest_ladder.bin", 1, EncodeKeyedManifest(keyed));
  std::vector<std::byte> page(kDiskPage);
  BlockLabel label;
  label.write_id = 3;
  label.bytes = 4096;
  WriteExtentHeader(label, page);
  write("header.bin", 2, std::string(reinterpret_cast<const char*>(page.data()), 256));
}

TEST(HostileDisk, TheCorpusIsAccepted) {
  if (const char* to = std::getenv("KVTIDE_WRITE_FUZZ_SEEDS"); to != nullptr) WriteSeeds(to);
  int accepted = 0;
  for (const auto& [name, bytes] : Corpus()) {
    SCOPED_TRACE(name);
    accepted += PlayHostileDisk(bytes) ? 1 : 0;
  }
  EXPECT_GE(accepted, 5) << "of every kind at least one";
}

TEST(HostileDisk, ChangedBytesAreReadOrRefused) {
  std::mt19937 random(20261130);
  int refused = 0;
  for (const auto& [name, bytes] : Corpus()) {
    SCOPED_TRACE(name);
    for (int i = 0; i < 500; i++) {
      std::vector<uint8_t> changed = bytes;
      for (uint32_t changes = 1 + random() % 4; changes > 0 && changed.size() > 1; changes--) {
        const size_t at = 1 + random() % (changed.size() - 1);
        switch (random() % 4) {
          case 0:
            changed.resize(at);
            break;
          case 1:
            changed[at] = 0xff;
            break;
          default:
            changed[at] = static_cast<uint8_t>(random());
        }
      }
      refused += PlayHostileDisk(changed) ? 0 : 1;
    }
  }
  EXPECT_GT(refused, 100);
}

}  // namespace
}  // namespace kvtide
