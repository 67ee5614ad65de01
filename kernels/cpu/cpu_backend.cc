#include "kernels/cpu/cpu_backend.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/attend_args.h"
#include "kernels/base/status.h"
#include "kernels/base/thread_pool.h"
#include "kernels/check_pieces.h"
#include "kernels/cpu/attend.h"
#include "kernels/cpu/copy_queue.h"
#include "kernels/cpu/file_slab.h"
#include "kernels/cpu/half_rows.h"
#include "kernels/cpu/stream_copy.h"

namespace kvtide {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;

class HostSlab : public Slab {
 public:
  HostSlab(std::byte* mapping, size_t mapped, size_t bytes)
      : mapping_(mapping), mapped_(mapped), bytes_(bytes) {
    const uintptr_t start = reinterpret_cast<uintptr_t>(mapping);
    data_ = mapping + ((start + kHugePage - 1) / kHugePage * kHugePage - start);
  }
  ~HostSlab() override { munmap(mapping_, mapped_); }
  std::byte* data() const override { return data_; }
  size_t bytes() const override { return bytes_; }

 private:
  std::byte* const mapping_;
  const size_t mapped_, bytes_;
  std::byte* data_;  // aligned to 2 MiB
};

class CpuBackend : public Backend {
 public:
  explicit CpuBackend(const CpuBackendOptions& options)
      : options_(options), pool_(options.threads), copies_(options.max_copies) {
    kernels_ = FindPageKernels(options.simd);
    if (kernels_ == nullptr) kernels_ = FindPageKernels(SimdLevel::kBest);
  }

  std::string name() const override { return options_.name; }

  absl::Status CheckSupport(const BlockLayout& layout) const override {
    KVTIDE_RETURN_IF_ERROR(CheckGroupShape(layout.shape()));
    if (Info(layout.pair().v).calibrated)
      return absl::InvalidArgumentError(absl::StrCat(Name(layout.pair().v), " codes keys only"));
    return absl::OkStatus();
  }

  absl::StatusOr<std::unique_ptr<Slab>> AllocateSlab(size_t bytes) override {
    if (bytes == 0) return absl::InvalidArgumentError("a slab of 0 bytes");
    using Sharing = CpuBackendOptions::Sharing;
    if (options_.sharing != Sharing::kNone) {
      KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<Slab> slab, options_.sharing == Sharing::kRead
                                                              ? MakeReadableSlab(bytes)
                                                              : MakeFileSlab(bytes));
      if (options_.huge_pages) (void)madvise(slab->data(), bytes, MADV_HUGEPAGE);
      return slab;
    }
    const size_t mapped = bytes + kHugePage;
    void* mapping = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapping == MAP_FAILED)
      return absl::ResourceExhaustedError(
          absl::StrCat(options_.name, ": no ", bytes, " bytes of host memory: ", strerror(errno)));
    auto slab = std::make_unique<HostSlab>(static_cast<std::byte*>(mapping), mapped, bytes);
    // Page-sized strides of small pages defeat the hardware prefetcher; without huge pages reads take twice
    // as long.
    if (options_.huge_pages) (void)madvise(slab->data(), bytes, MADV_HUGEPAGE);
    return std::unique_ptr<Slab>(std::move(slab));
  }

  absl::Status Append(const AppendArgs& args) override {
    for (const AppendPiece& piece : args.pieces) KVTIDE_RETURN_IF_ERROR(CheckPiece(piece));
    ForEachPiece(args.pieces.size(), [&](size_t i) {
      const AppendPiece& piece = args.pieces[i];
      const BlockLayout& layout = *piece.layout;
      const GroupShape& shape = layout.shape();
      const auto store = [&](CacheType type, const HalfLayout& half, TensorView rows, size_t offset) {
        const auto dim = static_cast<size_t>(half.head_dim);
        const size_t stride = static_cast<size_t>(shape.kv_heads) * dim;
        const size_t first = piece.source_row * stride;
        std::byte* const target = piece.block + layout.RecordOffset(piece.layer, 0) + offset;
        if (SameBits(type, rows.type))
          return MoveRowsIn(half, static_cast<const uint16_t*>(rows.data) + first, stride, piece.first_token,
                            piece.tokens, {target, layout.record_bytes(), shape.kv_heads});
        for (size_t head = 0; head < static_cast<size_t>(shape.kv_heads); head++)
          kernels_->store_rows(type, half, rows, first + head * dim, stride, piece.first_token, piece.tokens,
                               target + head * layout.record_bytes());
      };
      store(layout.pair().k, layout.k(), KeysOf(args, piece), layout.k_codes());
      store(layout.pair().v, layout.v(), ValuesOf(args, piece), layout.v_codes());
    });
    return absl::OkStatus();
  }

  absl::Status Recode(std::span<const RecodePiece> pieces) override {
    std::vector<std::pair<const RecodePiece*, int>> records;  // with the index of the record inside the block
    for (const RecodePiece& piece : pieces) {
      KVTIDE_RETURN_IF_ERROR(CheckPiece(piece));
      const int heads = piece.from->shape().kv_heads;
      for (int r = piece.first_layer * heads; r < (piece.first_layer + piece.layers) * heads; r++)
        records.emplace_back(&piece, r);
    }
    pool_.ParallelFor(static_cast<int64_t>(records.size()), [&](int64_t i) {
      const auto& [piece, record] = records[static_cast<size_t>(i)];
      RecodeRecord(*piece, record);
    });
    return absl::OkStatus();
  }

  absl::Status Attend(const AttendArgs& args) override {
    return Annotate(AttendOnCpu(args, *kernels_, pool_), options_.name);
  }

  absl::StatusOr<std::unique_ptr<AttendPlan>> PlanAttend(const AttendPlanArgs& args,
                                                         std::unique_ptr<AttendPlan> previous) override {
    absl::StatusOr<std::unique_ptr<AttendPlan>> plan = PlanAttendOnCpu(args, std::move(previous));
    if (!plan.ok()) return Annotate(plan.status(), options_.name);
    return plan;
  }

  absl::Status AttendLayer(AttendPlan& plan, const AttendLayerArgs& args) override {
    KVTIDE_RETURN_IF_ERROR(RunMeanwhile(args));
    KVTIDE_RETURN_IF_ERROR(AppendFirst(*this, args));
    return Annotate(AttendLayerOnCpu(plan, args, *kernels_, pool_), options_.name);
  }

  absl::Status Decode(const DecodeArgs& args) override {
    if (args.layout == nullptr || args.block == nullptr)
      return absl::InvalidArgumentError("decode: no layout or no block");
    const GroupShape& shape = args.layout->shape();
    if (args.layer < 0 || args.layer >= shape.layers)
      return absl::InvalidArgumentError(absl::StrCat("decode: layer ", args.layer, " of ", shape.layers));
    std::byte* const block = const_cast<std::byte*>(args.block);  // a run is of blocks that may be written
    BlockRun run;
    run.layout = args.layout;
    run.profile = args.profile;
    run.blocks = {&block, 1};
    run.first_position = args.position;
    DecodePiece piece;
    piece.run = &run;
    piece.layer = args.layer;
    piece.tokens = kBlockTokens;
    piece.k = {args.k, DataType::kF32};
    piece.v = {args.v, DataType::kF32};
    KVTIDE_RETURN_IF_ERROR(CheckPiece(piece));
    DecodeBlock(piece, 0, kBlockTokens);
    return absl::OkStatus();
  }

  absl::Status DecodeTokens(std::span<const DecodePiece> pieces, const Cancellation* cancellation) override {
    struct Part {
      const DecodePiece* piece;
      int64_t begin, end;  // tokens of the run, inside one block
    };
    std::vector<Part> parts;
    for (const DecodePiece& piece : pieces) {
      KVTIDE_RETURN_IF_ERROR(Annotate(CheckPiece(piece), options_.name));
      const int64_t end = piece.first_token + piece.tokens;
      for (int64_t begin = piece.first_token; begin < end;) {
        const int64_t next = std::min(end, (begin / kBlockTokens + 1) * kBlockTokens);
        parts.push_back({&piece, begin, next});
        begin = next;
      }
    }
    std::atomic<bool> stopped{false};
    pool_.ParallelFor(static_cast<int64_t>(parts.size()), [&](int64_t i) {
      const Part& part = parts[static_cast<size_t>(i)];
      if (IsCancelled(cancellation)) {
        stopped.store(true, std::memory_order_relaxed);
      } else {
        DecodeBlock(*part.piece, part.begin, part.end);
      }
    });
    if (stopped.load(std::memory_order_relaxed)) return absl::CancelledError("decoding was cancelled");
    return absl::OkStatus();
  }

  absl::StatusOr<CopyTicket> StartCopy(std::span<const CopyPiece> pieces, CopyDirection) override {
    return copies_.Submit(pieces);
  }
  absl::StatusOr<bool> Poll(CopyTicket ticket) override { return copies_.Poll(ticket); }
  absl::Status CopyNow(const CopyPiece& piece, CopyDirection direction) override {
    KVTIDE_RETURN_IF_ERROR(CheckPiece(piece));
    // What is less, or leaves the tier, is read soon, from a cache.
    constexpr size_t kFarBytes = size_t{64} << 10;
    if (piece.bytes >= kFarBytes && direction != CopyDirection::kToHost) {
      StreamCopy(piece.target, piece.source, piece.bytes);
    } else if (piece.bytes != 0) {
      std::memcpy(piece.target, piece.source, piece.bytes);
    }
    return absl::OkStatus();
  }

 private:
  template <class F>
  void ForEachPiece(size_t count, F body) {
    if (count <= 4) {  // a few rows are copied faster than a thread wakes up
      for (size_t i = 0; i < count; i++) body(i);
    } else {
      pool_.ParallelFor(static_cast<int64_t>(count), [&](int64_t i) { body(static_cast<size_t>(i)); });
    }
  }

  // Tokens [begin, end) of the piece's run, which lie in one block.
  void DecodeBlock(const DecodePiece& piece, int64_t begin, int64_t end) const {
    const BlockRun& run = *piece.run;
    const BlockLayout& layout = *run.layout;
    const std::byte* block = run.blocks[static_cast<size_t>(begin / kBlockTokens)];
    const auto heads = static_cast<size_t>(layout.shape().kv_heads);
    std::vector<float> rows;
    const std::byte* const records = block + layout.RecordOffset(piece.layer, 0);
    const auto decode = [&](CacheType type, Side side, const HalfLayout& half, size_t offset,
                            MutableTensorView target, size_t stride) {
      if (target.data == nullptr) return;
      const auto dim = static_cast<size_t>(half.head_dim);
      if (stride == 0) stride = heads * dim;
      if (SameBits(type, target.type))
        return MoveRowsOut(
            half, {records + offset, layout.record_bytes(), static_cast<int>(heads)},
            static_cast<int>(begin % kBlockTokens), static_cast<int>(end - begin),
            static_cast<uint16_t*>(target.data) + static_cast<size_t>(begin - piece.first_token) * stride,
            stride);
      rows.resize(kBlockTokens * dim);
      for (size_t head = 0; head < heads; head++) {
        const HeadProfile* profile = side == Side::kValue || run.profile == nullptr
                                         ? nullptr
                                         : &run.profile->key(piece.layer, static_cast<int>(head));
        kernels_->decode(type, side, half, profile, run.first_position + begin / kBlockTokens * kBlockTokens,
                         records + head * layout.record_bytes() + offset, rows.data());
        for (int64_t t = begin; t < end; t++)
          kernels_->narrow(rows.data() + static_cast<size_t>(t % kBlockTokens) * dim, dim, target,
                           static_cast<size_t>(t - piece.first_token) * stride + head * dim);
      }
    };
    decode(layout.pair().k, Side::kKey, layout.k(), layout.k_codes(), piece.k, piece.k_stride);
    decode(layout.pair().v, Side::kValue, layout.v(), layout.v_codes(), piece.v, piece.v_stride);
  }

  void RecodeRecord(const RecodePiece& piece, int record) const {
    const size_t index = static_cast<size_t>(record);
    const std::byte* source = piece.source + piece.from->record_bytes() * index;
    std::byte* target = piece.target + piece.to->record_bytes() * index;
    const HeadProfile* from = piece.from_profile == nullptr ? nullptr : &piece.from_profile->k[index];
    const HeadProfile* to = piece.to_profile == nullptr ? nullptr : &piece.to_profile->k[index];
    RecodeHalf(Side::kKey, piece.from->pair().k, piece.from->k(), from, source, piece.to->pair().k,
               piece.to->k(), to, piece.position, piece.tokens, target);
    RecodeHalf(Side::kValue, piece.from->pair().v, piece.from->v(), nullptr, source + piece.from->v_codes(),
               piece.to->pair().v, piece.to->v(), nullptr, piece.position, piece.tokens,
               target + piece.to->v_codes());
  }

  static bool SameProfile(const HeadProfile* a, const HeadProfile* b) {
    return a == b || (a != nullptr && b != nullptr && *a == *b);
  }

  void RecodeHalf(Side side, CacheType from, const HalfLayout& from_layout, const HeadProfile* from_profile,
                  const std::byte* source, CacheType to, const HalfLayout& to_layout,
                  const HeadProfile* to_profile, int64_t position, int tokens, std::byte* target) const {
    const bool same_frame = SameProfile(from_profile, to_profile) || Info(from).storage == Storage::kHalf;
    if (from == to && same_frame && tokens == kBlockTokens) {
      std::memcpy(target, source, to_layout.bytes);
      return;
    }
    std::vector<float> rows(static_cast<size_t>(kBlockTokens * from_layout.head_dim));
    kernels_->decode(from, side, from_layout, from_profile, position, source, rows.data());
    kernels_->encode(to, side, to_layout, to_profile, position, rows.data(), tokens, target);
  }

  const CpuBackendOptions options_;
  const PageKernels* kernels_;
  ThreadPool pool_;
  CopyQueue copies_;
};

}  // namespace

std::unique_ptr<Backend> MakeCpuBackend(const CpuBackendOptions& options) {
  return std::make_unique<CpuBackend>(options);
}

}  // namespace kvtide
