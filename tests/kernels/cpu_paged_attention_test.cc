// Paged attention in host memory against the CPU backend over whole blocks: the same rows in one sequence of
// f16 and coded runs. Pages, their numbers and the order of rows are random.
#include "kernels/cpu/cpu_paged_attention.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <deque>
#include <limits>
#include <memory>
#include <numeric>
#include <random>
#include <vector>

#include "kernels/cpu/cpu_backend.h"
#include "tests/format/test_tide.h"

namespace kvtide {
namespace {

using ::testing::HasSubstr;

size_t Size(int64_t n) { return static_cast<size_t>(n); }

struct alignas(64) Line {
  std::byte bytes[64];
};

// Memory for pages that begins at a multiple of 64, as engines give it.
struct Pages {
  Pages(int count, size_t bytes) : lines(Size(count) * bytes / 64 + 1) {}
  std::byte* data() { return lines.data()->bytes; }
  std::vector<Line> lines;
};

struct Sequence {
  int before = 0, queries = 0, coded_first = 0, coded_count = 0;
  int length() const { return before + queries; }
  int blocks() const { return (length() + kBlockTokens - 1) / kBlockTokens; }
};

struct Case {
  GroupShape shape{1, 2, 64, 64};
  const char* pair = "q8_0/turbo4";
  int heads = 4, layers = 2;
  int64_t window = 0;
  float softcap = 0;
  bool sinks = false, profile = false;
  int gap = 0;  // elements between the rows of tensors
  DataType type = DataType::kF32;
};

class Step {
 public:
  Step(const Case& c, std::vector<Sequence> sequences, uint32_t seed)
      : case_(c), sequences_(std::move(sequences)), random_(seed) {
    CpuBackendOptions backend_options;
    backend_options.threads = 1;
    backend_ = MakeCpuBackend(backend_options);
    options_.shape = c.shape;
    options_.pair = *ParseCachePair(c.pair);
    options_.heads = c.heads;
    options_.scale = 0.125f;
    options_.softcap = c.softcap;
    options_.window = c.window;
    options_.type = options_.output_type = c.type;
    options_.max_sequences = static_cast<int>(sequences_.size()) + 1;
    options_.max_tokens = 2048;
    options_.max_coded_blocks = options_.max_exact_blocks = 64;
    options_.max_seals = 64;
    options_.exact_pages = kSlots;
    coded_stride_ = CodedPage(options_).block_bytes() + 128;
    options_.coded_stride = coded_stride_;
    exact_bytes_ = ExactPage(options_).block_bytes();
    scratch_ = std::make_unique<Pages>(kScratch, exact_bytes_);
    options_.scratch = scratch_->data();
    for (int layer = 0; layer < c.layers; layer++) {
      coded_.push_back(std::make_unique<Pages>(kCoded, coded_stride_));
      exact_.push_back(std::make_unique<Pages>(kSlots, exact_bytes_));
      means_.push_back(Floats(c.shape.kv_heads * c.shape.head_dim_k));
      sinks_.push_back(Floats(c.heads));
      PagedLayer& paged = layers_.emplace_back();
      paged.coded = coded_.back()->data();
      paged.exact = exact_.back()->data();
      if (c.sinks) paged.sinks = sinks_.back().data();
      if (c.profile) paged.k_mean = means_.back().data();
      if (!Info(options_.pair.k).calibrated) continue;
      transforms_.push_back(
          test::AfterRope(test::TideProfile(c.shape, seed + 10 * static_cast<uint64_t>(layer))));
      paged.keys = transforms_.back().k.data();
    }
    attention_ = *MakeCpuPagedAttention(*backend_, options_, layers_);
    MakeTables();
  }

  // Writes, attends and seals; compares with the backend.
  void Check() {
    for (int layer = 0; layer < case_.layers; layer++) {
      FillBefore(layer);
      const std::vector<float> k = Floats(tokens_ * KRow()), v = Floats(tokens_ * VRow()),
                               q = Floats(tokens_ * QRow());
      std::vector<std::byte> k_rows = Rows(k, KRow()), v_rows = Rows(v, VRow()), q_rows = Rows(q, QRow());
      std::vector<std::byte> out(Size(tokens_ * (OutRow() + case_.gap)) * DataTypeBytes(case_.type),
                                 std::byte{0x11});
      std::vector<float> lse(Size(tokens_ * case_.heads));
      ASSERT_TRUE(attention_->Plan(step_, nullptr).ok());
      ASSERT_TRUE(attention_
                      ->Write(layer, {k_rows.data(), KRow() + case_.gap}, {v_rows.data(), VRow() + case_.gap},
                              nullptr)
                      .ok());
      ASSERT_TRUE(attention_
                      ->Attend(layer, {q_rows.data(), QRow() + case_.gap}, {out.data(), OutRow() + case_.gap},
                               lse.data(), nullptr)
                      .ok());
      ASSERT_TRUE(attention_->Seal(layer, nullptr).ok());
      CheckAttend(layer, q_rows, out, lse);
      CheckSeals(layer);
    }
  }

 private:
  static constexpr int kSlots = 24, kScratch = 40, kCoded = 90;

  std::vector<float> Floats(int64_t count) {
    std::normal_distribution<float> normal;
    std::vector<float> out(Size(count));
    for (float& x : out) x = normal(random_);
    return out;
  }
  int64_t KRow() const { return int64_t{case_.shape.kv_heads} * case_.shape.head_dim_k; }
  int64_t VRow() const { return int64_t{case_.shape.kv_heads} * case_.shape.head_dim_v; }
  int64_t QRow() const { return int64_t{case_.heads} * case_.shape.head_dim_k; }
  int64_t OutRow() const { return int64_t{case_.heads} * case_.shape.head_dim_v; }

  std::vector<std::byte> Rows(const std::vector<float>& values, int64_t row) const {
    std::vector<std::byte> out(Size(tokens_ * (row + case_.gap)) * DataTypeBytes(case_.type));
    const MutableTensorView view{out.data(), case_.type};
    for (int64_t t = 0; t < tokens_; t++)
      for (int64_t i = 0; i < row; i++) view.Set(Size(t * (row + case_.gap) + i), values[Size(t * row + i)]);
    return out;
  }

  std::byte* Exact(int layer, int page) {
    return page < kSlots ? exact_[Size(layer)]->data() + Size(page) * exact_bytes_
                         : scratch_->data() + Size(page - kSlots) * exact_bytes_;
  }
  std::byte* Coded(int layer, int page) { return coded_[Size(layer)]->data() + Size(page) * coded_stride_; }

  void MakeTables() {
    std::vector<int32_t> slots(kSlots + kScratch), pages(kCoded);
    std::iota(slots.begin(), slots.end(), 0);
    std::iota(pages.begin(), pages.end(), 0);
    std::shuffle(slots.begin(), slots.end(), random_);
    std::shuffle(pages.begin(), pages.end(), random_);
    const size_t rows = sequences_.size();
    coded_table_.assign(rows * 64, -1);
    exact_table_.assign(rows * 64, -1);
    query_start_ = {0};
    for (size_t s = 0; s < rows; s++) {
      const Sequence& sequence = sequences_[s];
      query_start_.push_back(query_start_.back() + sequence.queries);
      lengths_.push_back(sequence.queries == 0 ? 0 : sequence.length());
      coded_first_.push_back(sequence.coded_first);
      coded_count_.push_back(sequence.coded_count);
      if (sequence.queries == 0) continue;
      for (int b = 0, e = 0; b < sequence.blocks(); b++) {
        coded_table_[s * 64 + Size(b)] = pages.back();
        pages.pop_back();
        if (b >= sequence.coded_first && b < sequence.coded_first + sequence.coded_count) continue;
        exact_table_[s * 64 + Size(e++)] = slots.back();
        slots.pop_back();
      }
      for (int t = sequence.before; t < sequence.length(); t++) {
        const int b = t / kBlockTokens;
        const int page = ExactOf(s, b);
        write_slots_.push_back(page * kBlockTokens + t % kBlockTokens);
        if (t % kBlockTokens == kBlockTokens - 1) {
          seal_pages_.push_back(page);
          seal_pages_.push_back(coded_table_[s * 64 + Size(b)]);
        }
      }
    }
    tokens_ = query_start_.back();
    seals_ = static_cast<int32_t>(seal_pages_.size() / 2);
    seal_pages_.insert(seal_pages_.end(), {-1, 3, 5, 7});  // none, and one beyond the count
    step_.sequences = static_cast<int>(rows);
    step_.tokens = static_cast<int>(tokens_);
    step_.most_queries = static_cast<int>(tokens_);
    step_.seals = seals_ + 2;
    step_.query_start = query_start_.data();
    step_.lengths = lengths_.data();
    step_.coded_first = coded_first_.data();
    step_.coded_count = coded_count_.data();
    step_.coded_table = coded_table_.data();
    step_.exact_table = exact_table_.data();
    step_.coded_row = step_.exact_row = 64;
    step_.write_slots = write_slots_.data();
    step_.seal_pages = seal_pages_.data();
    seal_count_ = seals_ + 1;
    step_.seal_count = &seal_count_;
  }
  int ExactOf(size_t s, int b) const {
    const Sequence& sequence = sequences_[s];
    return exact_table_[s * 64 + Size(b < sequence.coded_first ? b : b - sequence.coded_count)];
  }

  // Random rows in all exact pages, their codes in the coded ones.
  void FillBefore(int layer) {
    const BlockLayout coded = CodedPage(options_), exact = ExactPage(options_);
    const std::unique_ptr<Profile> profile = MakeProfile(layer);
    for (int page = 0; page < kCoded; page++) {
      Pages temporary(1, exact_bytes_);
      const std::vector<float> k = Floats(kBlockTokens * KRow()), v = Floats(kBlockTokens * VRow());
      const AppendPiece piece{&exact, temporary.data(), 0, 0, kBlockTokens, 0, {}, {}};
      AppendArgs append;
      append.k = {k.data(), DataType::kF32};
      append.v = {v.data(), DataType::kF32};
      append.pieces = {&piece, 1};
      ASSERT_TRUE(backend_->Append(append).ok());
      if (page < kSlots + kScratch) std::copy_n(temporary.data(), exact_bytes_, Exact(layer, page));
      const RecodePiece recode{&exact,  temporary.data(), &coded, Coded(layer, page),
                               nullptr, profile.get(),    0,      1};
      ASSERT_TRUE(backend_->Recode({&recode, 1}).ok());
    }
  }
  std::unique_ptr<Profile> MakeProfile(int layer) const {
    if (!transforms_.empty()) return std::make_unique<Profile>(transforms_[Size(layer)]);
    if (!case_.profile) return nullptr;
    auto profile = std::make_unique<Profile>();
    profile->shape = case_.shape;
    for (int head = 0; head < case_.shape.kv_heads; head++) {
      const float* mean = means_[Size(layer)].data() + head * case_.shape.head_dim_k;
      profile->k.push_back({{mean, mean + case_.shape.head_dim_k}, {}, {}, {}});
    }
    profile->v.resize(profile->k.size());
    return profile;
  }

  void CheckAttend(int layer, const std::vector<std::byte>& q, const std::vector<std::byte>& out,
                   const std::vector<float>& lse) {
    const BlockLayout coded = CodedPage(options_), exact = ExactPage(options_);
    const std::unique_ptr<Profile> profile = MakeProfile(layer);
    for (size_t s = 0; s < sequences_.size(); s++) {
      const Sequence& sequence = sequences_[s];
      if (sequence.queries == 0) continue;
      // One run a block.
      std::vector<std::byte*> blocks(Size(sequence.blocks()));
      std::vector<BlockRun> runs;
      for (int b = 0; b < sequence.blocks(); b++) {
        const bool is_coded = b >= sequence.coded_first && b < sequence.coded_first + sequence.coded_count;
        blocks[Size(b)] =
            is_coded ? Coded(layer, coded_table_[s * 64 + Size(b)]) : Exact(layer, ExactOf(s, b));
        BlockRun& run = runs.emplace_back();
        run.layout = is_coded ? &coded : &exact;
        run.profile = is_coded ? profile.get() : nullptr;
        run.blocks = {&blocks[Size(b)], 1};
        run.first_position = int64_t{b} * kBlockTokens;
        run.tokens = std::min<int64_t>(kBlockTokens, sequence.length() - run.first_position);
      }
      const TensorView rows{q.data(), case_.type};
      const TensorView got{out.data(), case_.type};
      std::vector<float> dense(Size(sequence.queries * QRow())), wanted(Size(sequence.queries * OutRow())),
          wanted_lse(Size(sequence.queries * case_.heads));
      for (int64_t t = 0; t < sequence.queries; t++)
        for (int64_t i = 0; i < QRow(); i++)
          dense[Size(t * QRow() + i)] = rows.At(Size((query_start_[s] + t) * (QRow() + case_.gap) + i));
      AttendItem item;
      item.runs = runs;
      item.q = dense.data();
      item.queries = sequence.queries;
      item.first_query_position = sequence.before;
      item.out = wanted.data();
      item.lse = wanted_lse.data();
      AttendArgs args;
      args.heads = case_.heads;
      args.scale = options_.scale;
      args.window = case_.window;
      args.softcap = case_.softcap;
      args.sinks = case_.sinks ? sinks_[Size(layer)].data() : nullptr;
      args.items = {&item, 1};
      ASSERT_TRUE(backend_->Attend(args).ok());
      const double tolerance = case_.type == DataType::kF32   ? 1e-5
                               : case_.type == DataType::kF16 ? 1e-3
                                                              : 1e-2;
      for (int64_t t = 0; t < sequence.queries; t++) {
        const int64_t row = query_start_[s] + t;
        for (int64_t i = 0; i < OutRow(); i++)
          ASSERT_NEAR(got.At(Size(row * (OutRow() + case_.gap) + i)), wanted[Size(t * OutRow() + i)],
                      tolerance)
              << "layer " << layer << ", sequence " << s << ", query " << t << ", value " << i;
        for (int h = 0; h < case_.heads; h++)
          ASSERT_NEAR(lse[Size(row * case_.heads + h)], wanted_lse[Size(t * case_.heads + h)], 1e-4);
      }
    }
    // What stands between the rows is the caller's.
    for (int64_t t = 0; case_.gap > 0 && t < tokens_; t++) {
      const size_t behind = Size(t * (OutRow() + case_.gap) + OutRow()) * DataTypeBytes(case_.type);
      ASSERT_EQ(out[behind], std::byte{0x11});
    }
  }

  void CheckSeals(int layer) {
    const BlockLayout coded = CodedPage(options_), exact = ExactPage(options_);
    const std::unique_ptr<Profile> profile = MakeProfile(layer);
    Pages wanted(1, coded_stride_);
    for (int32_t i = 0; i < seals_; i++) {
      const RecodePiece piece{
          &exact, Exact(layer, seal_pages_[Size(2 * i)]), &coded, wanted.data(), nullptr, profile.get(), 0,
          1};
      ASSERT_TRUE(backend_->Recode({&piece, 1}).ok());
      EXPECT_TRUE(std::equal(wanted.data(), wanted.data() + coded.block_bytes(),
                             Coded(layer, seal_pages_[Size(2 * i + 1)])));
    }
  }

  const Case case_;
  const std::vector<Sequence> sequences_;
  std::mt19937 random_;
  std::unique_ptr<Backend> backend_;
  PagedOptions options_;
  size_t coded_stride_ = 0, exact_bytes_ = 0;
  std::unique_ptr<Pages> scratch_;
  std::vector<std::unique_ptr<Pages>> coded_, exact_;
  std::vector<std::vector<float>> means_, sinks_;
  std::vector<PagedLayer> layers_;
  std::deque<Profile> transforms_;  // of calibrated keys
  std::unique_ptr<PagedAttention> attention_;
  int64_t tokens_ = 0;
  int32_t seals_ = 0, seal_count_ = 0;
  std::vector<int32_t> query_start_, lengths_, coded_first_, coded_count_, coded_table_, exact_table_,
      write_slots_, seal_pages_;
  PagedStep step_;
};

// A decoding sequence, a short one, padding, a chunk of a prompt, speculation over a block's end.
std::vector<Sequence> Batch() {
  return {{500, 1, 1, 4}, {10, 1, 0, 0}, {0, 0, 0, 0}, {256, 200, 1, 3}, {124, 6, 0, 0}};
}

TEST(CpuPagedAttention, AttendsAsTheBackendDoes) { Step({}, Batch(), 1).Check(); }
TEST(CpuPagedAttention, GroupsOfQueriesAndHeadDims) {
  Step({.shape = {1, 1, 128, 128}, .pair = "turbo4/turbo3", .heads = 8}, Batch(), 2).Check();
}
TEST(CpuPagedAttention, SlidingWindow) {
  Step({.window = 100}, {{500, 1, 0, 5}, {10, 1, 0, 0}, {256, 100, 0, 3}}, 3).Check();
}
TEST(CpuPagedAttention, SoftcapSinksAndProfile) {
  Step({.pair = "turbo4/turbo4", .softcap = 20, .sinks = true, .profile = true}, Batch(), 4).Check();
}
TEST(CpuPagedAttention, CalibratedKeysAtAnyHeadDim) {
  for (const int dim : {64, 80, 128, 256})
    Step({.shape = {1, 2, dim, dim}, .pair = "tide3/turbo3", .heads = 6, .layers = 3}, Batch(), 8).Check();
  Step({.shape = {1, 1, 128, 64}, .pair = "tide1/q8_0", .heads = 16, .softcap = 20, .sinks = true}, Batch(),
       9)
      .Check();
}
TEST(CpuPagedAttention, RowsOfAFusedProjection) {
  for (const DataType type : {DataType::kF32, DataType::kF16, DataType::kBf16})
    Step({.gap = 64, .type = type}, Batch(), 5).Check();
}
TEST(CpuPagedAttention, PagesOfF16) { Step({.pair = "f16/f16"}, Batch(), 6).Check(); }
TEST(CpuPagedAttention, NothingButCodedAndItsOwnToken) {
  Step({}, {{64, 1, 0, 1}, {640, 3, 0, 10}}, 7).Check();
}

struct Small {
  std::unique_ptr<Backend> backend = MakeCpuBackend();
  Pages coded{2, 1 << 16}, exact{2, 1 << 16};
  PagedOptions options;
  PagedLayer layer;
  int32_t query_start[2] = {0, 1}, lengths[1] = {1}, zero[1] = {0}, slots[1] = {0};
  PagedStep step;

  Small() {
    options.shape = {1, 1, 64, 64};
    options.pair = *ParseCachePair("turbo4/turbo4");
    options.heads = 1;
    options.scale = 0.125f;
    options.type = options.output_type = DataType::kF32;
    options.max_sequences = options.max_tokens = options.max_coded_blocks = options.max_exact_blocks = 1;
    options.exact_pages = 2;
    layer.coded = coded.data();
    layer.exact = exact.data();
    step.sequences = step.tokens = step.most_queries = 1;
    step.query_start = query_start;
    step.lengths = lengths;
    step.coded_first = step.coded_count = step.coded_table = step.exact_table = zero;
    step.coded_row = step.exact_row = 1;
    step.write_slots = slots;
  }
};

TEST(CpuPagedAttention, StoresWhatF16Holds) {
  Small s;
  auto attention = *MakeCpuPagedAttention(*s.backend, s.options, {&s.layer, 1});
  std::vector<float> k(64, 1.0f), v(64, 2.0f), q(64, 0.0f), out(64);
  k[0] = std::numeric_limits<float>::quiet_NaN();
  v[1] = 1e9f;
  v[2] = -std::numeric_limits<float>::infinity();
  ASSERT_TRUE(attention->Plan(s.step, nullptr).ok());
  ASSERT_TRUE(attention->Write(0, {k.data(), 64}, {v.data(), 64}, nullptr).ok());
  ASSERT_TRUE(attention->Attend(0, {q.data(), 64}, {out.data(), 64}, nullptr, nullptr).ok());
  EXPECT_EQ(out[0], 2.0f);
  EXPECT_EQ(out[1], 65504.0f);
  EXPECT_EQ(out[2], -65504.0f);
  EXPECT_EQ(*attention->ChangedValues(nullptr), 3u);
}

TEST(CpuPagedAttention, ARowThatIsNoNumberHarmsNobodyElse) {
  Small s;
  auto attention = *MakeCpuPagedAttention(*s.backend, s.options, {&s.layer, 1});
  std::vector<float> k(64, 1.0f), v(64, 2.0f), q(64, std::numeric_limits<float>::quiet_NaN()), out(64);
  ASSERT_TRUE(attention->Plan(s.step, nullptr).ok());
  ASSERT_TRUE(attention->Write(0, {k.data(), 64}, {v.data(), 64}, nullptr).ok());
  EXPECT_TRUE(attention->Attend(0, {q.data(), 64}, {out.data(), 64}, nullptr, nullptr).ok());
}

TEST(CpuPagedAttention, SaysWhatDoesNotFit) {
  Small s;
  auto attention = *MakeCpuPagedAttention(*s.backend, s.options, {&s.layer, 1});
  std::vector<float> row(64);
  EXPECT_EQ(attention->Seal(0, nullptr).code(), absl::StatusCode::kFailedPrecondition);
  ASSERT_TRUE(attention->Plan(s.step, nullptr).ok());
  EXPECT_THAT(attention->Seal(1, nullptr).message(), HasSubstr("layer 1 of 1"));
  EXPECT_THAT(attention->Write(0, {row.data(), 32}, {row.data(), 64}, nullptr).message(),
              HasSubstr("k: a stride of 32"));
  EXPECT_THAT(attention->Attend(0, {row.data(), 64}, {nullptr, 64}, nullptr, nullptr).message(),
              HasSubstr("no out"));
  s.query_start[1] = 2;
  EXPECT_THAT(attention->Attend(0, {row.data(), 64}, {row.data(), 64}, nullptr, nullptr).message(),
              HasSubstr("query_start ends at 2"));
  s.layer.coded += 16;
  EXPECT_THAT(MakeCpuPagedAttention(*s.backend, s.options, {&s.layer, 1}).status().message(),
              HasSubstr("multiple of 64"));
}

}  // namespace
}  // namespace kvtide
