#include "tests/kernels/test_sequence.h"

#include <algorithm>
#include <cmath>
#include <thread>

#include "kernels/base/check.h"
#include "kernels/format/page_codec.h"

namespace kvtide::testing {

void CopyAndWait(Backend& backend, std::byte* target, const std::byte* source, size_t bytes,
                 CopyDirection direction) {
  const CopyPiece piece{target, source, bytes};
  const absl::StatusOr<CopyTicket> ticket = backend.StartCopy({&piece, 1}, direction);
  KVTIDE_CHECK(ticket.ok(), ticket.status().ToString());
  for (;;) {
    const absl::StatusOr<bool> done = backend.Poll(*ticket);
    KVTIDE_CHECK(done.ok(), done.status().ToString());
    if (*done) return;
    std::this_thread::yield();
  }
}

BackendBlocks::BackendBlocks(Backend& backend, const BlockLayout& layout, int count)
    : backend_(backend), layout_(layout) {
  auto slab = backend.AllocateSlab(std::max<size_t>(1, layout.block_bytes() * static_cast<size_t>(count)));
  KVTIDE_CHECK(slab.ok(), slab.status().ToString());
  slab_ = *std::move(slab);
}

void BackendBlocks::Write(int i, const std::vector<std::byte>& bytes) {
  CopyAndWait(backend_, block(i), bytes.data(), bytes.size(), CopyDirection::kFromHost);
}

std::vector<std::byte> BackendBlocks::Read(int i) const {
  std::vector<std::byte> bytes(layout_.block_bytes());
  CopyAndWait(backend_, bytes.data(), block(i), bytes.size(), CopyDirection::kToHost);
  return bytes;
}

RowFill GaussianRows(uint32_t seed) {
  return [random = std::mt19937(seed)](Side side, int64_t, int, std::vector<float>& row) mutable {
    std::normal_distribution<float> normal;
    for (size_t d = 0; d < row.size(); d++)
      row[d] = normal(random) * (side == Side::kKey && d % 23 == 5 ? 4.0f : 1.0f) +
               (side == Side::kKey && d % 31 == 7 ? 2.0f : 0.0f);
  };
}

void TestSequence::AddRun(const std::string& pair, int64_t tokens, const RowFill& fill,
                          const Profile* profile) {
  runs_.emplace_back();
  Run& run = runs_.back();
  run.layout = BlockLayout(shape_, *ParseCachePair(pair));
  run.profile = profile;
  run.first_position = tokens_;
  run.tokens = tokens;
  tokens_ += tokens;
  const BlockLayout& layout = run.layout;
  const int blocks = static_cast<int>((tokens + kBlockTokens - 1) / kBlockTokens);
  run.blocks = std::make_unique<BackendBlocks>(backend_, layout, blocks);
  std::vector<float> row;
  for (int b = 0; b < blocks; b++) {
    // What lies behind the last token of a block is never read: poison, where the format lets it stand.
    run.bytes.emplace_back(layout.block_bytes(), std::byte{0xff});
    std::vector<std::byte>& bytes = run.bytes.back();
    const int count = static_cast<int>(std::min<int64_t>(kBlockTokens, tokens - b * kBlockTokens));
    for (int layer = 0; layer < shape_.layers; layer++)
      for (int head = 0; head < shape_.kv_heads; head++)
        for (Side side : {Side::kKey, Side::kValue}) {
          const HalfLayout& half = side == Side::kKey ? layout.k() : layout.v();
          const CacheType type = side == Side::kKey ? layout.pair().k : layout.pair().v;
          std::vector<float> rows;
          for (int t = 0; t < count; t++) {
            row.assign(static_cast<size_t>(half.head_dim), 0.0f);
            fill(side, run.first_position + b * kBlockTokens + t, head, row);
            rows.insert(rows.end(), row.begin(), row.end());
          }
          const HeadProfile* head_profile =
              profile == nullptr || side == Side::kValue ? nullptr : &profile->key(layer, head);
          std::byte* target =
              bytes.data() + layout.RecordOffset(layer, head) + (side == Side::kKey ? 0 : layout.v_codes());
          std::vector<std::byte> encoded(half.bytes);
          EncodeHalf(type, side, half, head_profile, run.first_position + b * kBlockTokens, rows.data(),
                     count, encoded.data());
          if (Info(type).storage == Storage::kHalf) {  // append writes only the rows that exist
            for (int t = 0; t < count; t++)
              for (int d = 0; d < half.stored_dim; d++) {
                const size_t at = static_cast<size_t>(HalfPrecisionIndex(t, d, half.stored_dim)) * 2;
                std::copy_n(encoded.data() + at, 2, target + at);
              }
          } else {
            std::copy(encoded.begin(), encoded.end(), target);
          }
        }
    run.host.push_back(bytes.data());
    run.blocks->Write(b, bytes);
    run.device.push_back(run.blocks->block(b));
  }
}

std::vector<BlockRun> TestSequence::Runs(bool host) const {
  std::vector<BlockRun> runs;
  for (const Run& run : runs_) {
    BlockRun out;
    out.layout = &run.layout;
    out.profile = run.profile;
    out.blocks = host ? run.host : run.device;
    out.first_position = run.first_position;
    out.tokens = run.tokens;
    runs.push_back(out);
  }
  return runs;
}

Profile RandomProfile(const GroupShape& shape, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Profile profile;
  profile.shape = shape;
  for (int i = 0; i < shape.layers * shape.kv_heads; i++) {
    HeadProfile head;
    for (int d = 0; d < shape.head_dim_k; d++) {
      head.mean.push_back(normal(random));
      head.gain.push_back(std::exp(0.3f * normal(random)));
    }
    profile.k.push_back(head);
    profile.v.emplace_back();
  }
  profile.hash = HashProfile(profile);
  return profile;
}

}  // namespace kvtide::testing
