// Rows that nobody has checked: an engine in another process may write or change rows of the pool's blocks at
// any time, NaN and infinity among them. Seals, reads and attention over such rows may give any values, and
// touch nothing but their targets.
#include <cstdint>
#include <memory>
#include <random>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"
#include "kernels/format/catalogue.h"
#include "kernels/format/profile_maker.h"

namespace kvtide {
namespace {

constexpr size_t kFence = 4096;
constexpr std::byte kFenceByte{0x5a};

// Memory between fences, aligned as blocks of slabs are, and of its own, so that AddressSanitizer sees a step
// aside too.
class Fenced {
 public:
  explicit Fenced(size_t bytes)
      : bytes_(bytes),
        all_(bytes + 2 * kFence + kAlignment, kFenceByte),
        data_(all_.data() + kFence + kAlignment - reinterpret_cast<uintptr_t>(all_.data()) % kAlignment) {}
  std::byte* data() { return data_; }
  size_t bytes() const { return bytes_; }
  bool Intact() const {
    for (size_t i = 0; i < kFence; i++)
      if (data_[i - kFence] != kFenceByte || data_[bytes_ + i] != kFenceByte) return false;
    return true;
  }

 private:
  static constexpr size_t kAlignment = 64;
  size_t bytes_;
  std::vector<std::byte> all_;
  std::byte* data_;
};

class WildRows : public ::testing::TestWithParam<int> {};

TEST_P(WildRows, LeaveNoTargetWhateverTheyAre) {
  const int dim = GetParam();
  const GroupShape shape{2, 2, dim, dim};
  const BlockLayout exact(shape, ExactPair());
  CpuBackendOptions options;
  options.threads = 1;
  const std::unique_ptr<Backend> backend = MakeCpuBackend(options);
  std::mt19937 random(20260101);
  // Every bit pattern; whole rows of one kind.
  Fenced rows(exact.block_bytes());
  auto* const values = reinterpret_cast<uint16_t*>(rows.data());
  const uint16_t kKinds[] = {0x7e00, 0xfc00, 0x7c00, 0x7bff, 0x0001, 0x0000, 0xffff};
  for (size_t i = 0; i < rows.bytes() / 2; i++) {
    const size_t row = i / static_cast<size_t>(dim);
    values[i] = row % 4 != 0 ? static_cast<uint16_t>(random()) : kKinds[row / 4 % 7];
  }
  Profile profile;
  profile.shape = shape;
  profile.k.resize(4);
  profile.v.resize(4);
  for (HeadProfile& head : profile.k) {
    head.mean.assign(static_cast<size_t>(dim), 0.5f);
    head.gain.assign(static_cast<size_t>(dim), 2.0f);
  }
  profile.hash = HashProfile(profile);
  for (const CacheType type : AllCacheTypes()) {
    const BlockLayout coded(shape, {type, type});
    if (!backend->CheckSupport(coded).ok()) continue;
    for (const Profile* with :
         {static_cast<const Profile*>(nullptr), static_cast<const Profile*>(&profile)}) {
      if (with != nullptr && type == ExactPair().k) continue;
      Fenced target(coded.block_bytes());
      RecodePiece piece;
      piece.from = &exact;
      piece.source = rows.data();
      piece.to = &coded;
      piece.target = target.data();
      piece.to_profile = with;
      piece.layers = 2;
      piece.tokens = 63;
      const absl::Status sealed = backend->Recode({&piece, 1});
      ASSERT_TRUE(sealed.ok()) << Info(type).name << ": " << sealed;
      ASSERT_TRUE(target.Intact() && rows.Intact()) << Info(type).name;
      // What is in a block that was never sealed, too: any bytes.
      for (int any = 0; any < 2; any++) {
        if (any == 1) {
          for (size_t i = 0; i < target.bytes(); i++) target.data()[i] = static_cast<std::byte>(random());
        }
        std::vector<float> k(64 * 2 * static_cast<size_t>(dim)), v(k.size());
        DecodeArgs decode{&coded, with, target.data(), 1, k.data(), v.data()};
        ASSERT_TRUE(backend->Decode(decode).ok()) << Info(type).name;
        const std::vector<float> q(4 * static_cast<size_t>(dim), 0.25f);
        Fenced out(q.size() * sizeof(float)), lse(4 * sizeof(float));
        std::byte* const block = target.data();
        const BlockRun run{&coded, with, {&block, 1}, 0, 64};
        AttendItem item;
        item.runs = {&run, 1};
        item.q = q.data();
        item.queries = 1;
        item.first_query_position = 63;
        item.out = reinterpret_cast<float*>(out.data());
        item.lse = reinterpret_cast<float*>(lse.data());
        AttendArgs args;
        args.heads = 4;
        args.scale = 1;
        args.items = {&item, 1};
        backend->Attend(args).IgnoreError();  // logits beyond f32 are said so
        ASSERT_TRUE(target.Intact() && out.Intact() && lse.Intact()) << Info(type).name;
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(HeadDims, WildRows, ::testing::Values(64, 80, 128, 256));

}  // namespace
}  // namespace kvtide
