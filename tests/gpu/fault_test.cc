// Every call of the CUDA runtime that a verb makes fails once: the verb says so and leaves no error behind
// for the next call, no work under way and no memory lost; what is computed afterwards is right.
#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kernels/base/check.h"
#include "kernels/cuda/cuda_backend.h"
#include "kernels/cuda/device/cuda_error.h"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/step/cuda_paged_attention.h"
#include "kernels/cuda/step/device_decode.h"
#include "tests/kernels/test_sequence.h"

namespace kvtide::testing {
namespace {

using Bytes = std::vector<std::byte>;

std::unique_ptr<Backend> Make(const CudaBackendOptions& options = {}) {
  auto backend = MakeCudaBackend(options);
  KVTIDE_CHECK(backend.ok(), std::string(backend.status().message()));
  return std::move(backend).value();
}

template <class T>
Bytes BytesOf(const std::vector<T>& values) {
  const auto* const first = reinterpret_cast<const std::byte*>(values.data());
  return Bytes(first, first + values.size() * sizeof(T));
}

// One call of the backend. Prepare and Result work by way of another backend.
class Verb {
 public:
  virtual ~Verb() = default;
  virtual void Prepare() {}
  virtual void Forget() {}  // what the backend has made: another one comes
  virtual absl::Status Call(Backend& backend) = 0;
  virtual Bytes Result() = 0;  // the same after every call that succeeds
};

// Fails call n = 1, 2, ... of the verb until it makes no more, and returns their number. fresh: of a backend
// that has done nothing before, so that it takes memory; else of one that goes on after each failure.
int FailEveryCall(const CudaBackendOptions& options, Verb& verb, bool fresh) {
  auto backend = Make(options);
  verb.Forget();
  verb.Prepare();
  EXPECT_TRUE(verb.Call(*backend).ok());
  const Bytes wanted = verb.Result();
  EXPECT_FALSE(wanted.empty());
  for (int n = 1; n < 1000; n++) {
    if (fresh) {
      verb.Forget();
      backend = Make(options);
    }
    verb.Prepare();
    cuda::calls_until_fault = n;
    const absl::Status status = verb.Call(*backend);
    const bool failed = cuda::calls_until_fault.exchange(0) <= 0;
    EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess) << "call " << n << " left an error behind";
    if (!failed) {
      EXPECT_TRUE(status.ok()) << status;
      EXPECT_TRUE(verb.Result() == wanted);
      verb.Forget();
      return n - 1;
    }
    EXPECT_EQ(status.code(), absl::StatusCode::kInternal) << "call " << n << ": " << status;
    verb.Prepare();
    const absl::Status next = verb.Call(*backend);
    EXPECT_TRUE(next.ok()) << "after call " << n << ": " << next;
    EXPECT_TRUE(verb.Result() == wanted) << "after call " << n;
  }
  ADD_FAILURE() << "a verb of 1000 calls";
  return 0;
}

void Walk(Verb& verb) {
  verb.Prepare();  // what the helper takes for its copies is no loss
  (void)verb.Result();
  const int64_t before = cuda::held_bytes;
  for (const size_t in_place : {size_t{0}, size_t{1} << 20})
    for (const bool fresh : {true, false}) {
      SCOPED_TRACE("in place " + std::to_string(in_place) + ", fresh " + std::to_string(fresh));
      CudaBackendOptions options;
      options.scratch_bytes = 1u << 20;
      options.in_place_bytes = in_place;
      options.copy_piece_bytes = 1u << 14;
      EXPECT_GT(FailEveryCall(options, verb, fresh), 0);
      EXPECT_EQ(cuda::held_bytes, before) << "memory is lost";
    }
}

struct Setup {
  std::unique_ptr<Backend> helper = Make();
};

class AppendVerb : public Verb, Setup {
 public:
  AppendVerb() {
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    for (float& x : rows_) x = normal(random);
  }
  void Prepare() override {
    for (int i = 0; i < 2; i++) blocks_.Write(i, Bytes(layout_.block_bytes()));
  }
  absl::Status Call(Backend& backend) override {
    std::vector<AppendPiece> pieces;
    for (int i = 0; i < 2; i++) pieces.push_back({&layout_, blocks_.block(i), i, 5, 7, 3});
    AppendArgs args;
    args.k = {rows_.data(), DataType::kF32};
    args.v = {rows_.data() + 64, DataType::kF32};
    args.pieces = pieces;
    return backend.Append(args);
  }
  Bytes Result() override { return blocks_.Read(0); }

 private:
  const BlockLayout layout_{{2, 2, 96, 64}, ExactPair()};
  BackendBlocks blocks_{*helper, layout_, 2};
  std::vector<float> rows_ = std::vector<float>(64 + 16 * 2 * 96);
};

class RecodeVerb : public Verb, Setup {
 public:
  RecodeVerb(const char* from, const char* to) : to_(shape_, *ParseCachePair(to)) {
    sequence_.AddRun(from, kBlockTokens, GaussianRows(4));
  }
  void Prepare() override { target_.Write(0, Bytes(to_.block_bytes())); }
  absl::Status Call(Backend& backend) override {
    const std::vector<BlockRun> runs = sequence_.device_runs();
    RecodePiece piece;
    piece.from = runs[0].layout;
    piece.source = runs[0].blocks[0];
    piece.to = &to_;
    piece.target = target_.block(0);
    piece.layers = 2;
    return backend.Recode({&piece, 1});
  }
  Bytes Result() override { return target_.Read(0); }

 private:
  const GroupShape shape_{2, 2, 128, 128};
  TestSequence sequence_{*helper, shape_};
  const BlockLayout to_;
  BackendBlocks target_{*helper, to_, 1};
};

class DecodeVerb : public Verb, Setup {
 public:
  DecodeVerb() : profile_(RandomProfile(shape_, 5)) {
    sequence_.AddRun("turbo4", kBlockTokens, GaussianRows(6), &profile_);
  }
  absl::Status Call(Backend& backend) override {
    const std::vector<BlockRun> runs = sequence_.device_runs();
    return backend.Decode({runs[0].layout, &profile_, runs[0].blocks[0], 1, k_.data(), v_.data()});
  }
  Bytes Result() override {
    Bytes bytes = BytesOf(k_);
    const Bytes more = BytesOf(v_);
    bytes.insert(bytes.end(), more.begin(), more.end());
    return bytes;
  }

 private:
  const GroupShape shape_{2, 2, 64, 64};
  const Profile profile_;
  TestSequence sequence_{*helper, shape_};
  std::vector<float> k_ = std::vector<float>(64 * 2 * 64), v_ = k_;
};

// kept: over a plan that survives failures, layer by layer; else each call plans.
class AttendVerb : public Verb, Setup {
 public:
  AttendVerb(const std::vector<std::string>& pairs, int queries, DataType type, bool kept)
      : queries_(queries), type_(type), kept_(kept), profile_(RandomProfile(shape_, 7)) {
    for (const std::string& pair : pairs) sequence_.AddRun(pair, 192, GaussianRows(8), &profile_);
    std::mt19937 random(9);
    std::normal_distribution<float> normal;
    const size_t values = static_cast<size_t>(queries) * 4 * 128;
    q_.resize(values * DataTypeBytes(type));
    out_.resize(values * DataTypeBytes(type));
    for (size_t i = 0; i < values; i++) MutableTensorView{q_.data(), type}.Set(i, normal(random));
  }
  absl::Status Call(Backend& backend) override {
    out_.assign(out_.size(), std::byte{0xff});
    const std::vector<BlockRun> runs = sequence_.device_runs();
    const PlanItem item{runs, queries_, sequence_.tokens() - queries_};
    if (!kept_) plan_.reset();
    if (plan_ == nullptr) {
      auto plan = backend.PlanAttend({4, true, 0, {&item, 1}}, nullptr);
      if (!plan.ok()) return plan.status();
      plan_ = std::move(plan).value();
    }
    const std::vector<float> sinks{0.5f, 1.0f, -1.0f, 0.0f};
    const LayerItem tensors{{q_.data(), type_}, {out_.data(), type_}, nullptr};
    AttendLayerArgs args;
    args.layer = 1;
    args.scale = 0.1f;
    args.sinks = sinks.data();
    args.items = {&tensors, 1};
    return backend.AttendLayer(*plan_, args);
  }
  void Forget() override { plan_.reset(); }
  Bytes Result() override { return out_; }

 private:
  const int queries_;
  const DataType type_;
  const bool kept_;
  const GroupShape shape_{2, 2, 128, 128};
  const Profile profile_;
  TestSequence sequence_{*helper, shape_};
  Bytes q_, out_;
  std::unique_ptr<AttendPlan> plan_;
};

class CopyVerb : public Verb, Setup {
 public:
  CopyVerb(CopyDirection direction, bool pinned) : direction_(direction), host_(3 * kBytes) {
    for (size_t i = 0; i < kBytes; i++) host_[i] = static_cast<std::byte>(i * 7 + i / 256);
    if (pinned) range_ = PinnedRange::Make(host_.data(), host_.size()).value();
    slab_ = helper->AllocateSlab(2 * kBytes).value();
    CopyAndWait(*helper, slab_->data(), host_.data(), kBytes, CopyDirection::kFromHost);
  }
  absl::Status Call(Backend& backend) override {
    std::vector<CopyPiece> pieces;  // with gaps, so that they do not travel together
    for (size_t at = 0; at + 1 < kBytes; at += kBytes / 4) {
      const bool from_host = direction_ == CopyDirection::kFromHost,
                 to_host = direction_ == CopyDirection::kToHost;
      pieces.push_back({(to_host ? host_.data() : slab_->data()) + kBytes + at,
                        (from_host ? host_.data() : slab_->data()) + at, kBytes / 4 - 1});
    }
    const auto ticket = backend.StartCopy(pieces, direction_);
    if (!ticket.ok()) return ticket.status();
    for (;;) {
      const auto done = backend.Poll(*ticket);
      if (!done.ok()) return done.status();
      if (*done) return absl::OkStatus();
    }
  }
  Bytes Result() override {
    if (direction_ != CopyDirection::kToHost)
      CopyAndWait(*helper, host_.data() + kBytes, slab_->data() + kBytes, kBytes, CopyDirection::kToHost);
    return Bytes(host_.begin() + kBytes, host_.begin() + 2 * kBytes);
  }

 private:
  static constexpr size_t kBytes = 1u << 17;
  const CopyDirection direction_;
  Bytes host_;
  std::unique_ptr<PinnedRange> range_;
  std::unique_ptr<Slab> slab_;
};

class SlabVerb : public Verb {
 public:
  absl::Status Call(Backend& backend) override {
    auto slab = backend.AllocateSlab(1u << 20);
    if (!slab.ok()) return slab.status();
    bytes_.assign(1u << 20, std::byte{1});
    EXPECT_EQ(cudaMemcpy(bytes_.data(), (*slab)->data(), bytes_.size(), cudaMemcpyDeviceToHost), cudaSuccess);
    return absl::OkStatus();
  }
  Bytes Result() override { return bytes_; }

 private:
  Bytes bytes_;
};

// The backend itself, from nothing.
class MakeVerb : public Verb {
 public:
  absl::Status Call(Backend&) override { return MakeCudaBackend().status(); }
  Bytes Result() override { return Bytes(1); }
};

class DeviceDecodeVerb : public Verb, Setup {
 public:
  DeviceDecodeVerb() {
    sequence_.AddRun("turbo4", 128, GaussianRows(11));
    const std::vector<BlockRun> runs = sequence_.device_runs();
    memory_ = helper->AllocateSlab(1u << 16).value();
    std::vector<std::byte> host(1u << 16);
    std::copy_n(runs[0].blocks.data(), 2, reinterpret_cast<std::byte**>(host.data()));
    *reinterpret_cast<int32_t*>(host.data() + 64) = 128;
    for (size_t i = 0; i < 4 * 128; i++) reinterpret_cast<uint16_t*>(host.data() + 1024)[i] = 0x3400;
    CopyAndWait(*helper, memory_->data(), host.data(), host.size(), CopyDirection::kFromHost);
    EXPECT_EQ(cudaStreamCreate(&stream_), cudaSuccess);
  }
  ~DeviceDecodeVerb() override { (void)cudaStreamDestroy(stream_); }
  absl::Status Call(Backend&) override {
    DecodeOptions options;
    options.shape = {1, 2, 128, 128};
    options.pair = *ParseCachePair("turbo4");
    options.heads = 4;
    options.max_sequences = 1;
    options.scale = 0.1f;
    options.coded.blocks = reinterpret_cast<std::byte**>(memory_->data());
    options.coded.tokens = reinterpret_cast<int32_t*>(memory_->data() + 64);
    options.coded.max_blocks = 2;
    DecodeLayer layer;
    layer.q = memory_->data() + 1024;
    layer.out = memory_->data() + 8192;
    layer.lse = reinterpret_cast<float*>(memory_->data() + 16384);
    auto decode = DeviceDecode::Make(options, {layer});
    if (!decode.ok()) return decode.status();
    if (absl::Status status = (*decode)->Plan(stream_); !status.ok()) return status;
    if (absl::Status status = (*decode)->Attend(0, stream_); !status.ok()) {
      EXPECT_EQ(cudaStreamQuery(stream_), cudaSuccess) << "work is under way";
      return status;
    }
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    return absl::OkStatus();
  }
  Bytes Result() override {
    Bytes bytes(4 * 128 * 2);
    CopyAndWait(*helper, bytes.data(), memory_->data() + 8192, bytes.size(), CopyDirection::kToHost);
    return bytes;
  }

 private:
  TestSequence sequence_{*helper, {1, 2, 128, 128}};
  std::unique_ptr<Slab> memory_;
  cudaStream_t stream_ = nullptr;
};

// A prefill of 80 tokens beside a decoding sequence: every way of PagedAttention, from nothing.
class PagedVerb : public Verb, Setup {
 public:
  PagedVerb() {
    options_.shape = {1, 2, 128, 128};
    options_.pair = *ParseCachePair("turbo4");
    options_.heads = 16;
    options_.scale = 0.1f;
    options_.type = options_.output_type = DataType::kF16;
    options_.max_sequences = 2;
    options_.max_tokens = 81;
    options_.max_coded_blocks = options_.max_seals = 1;
    options_.max_exact_blocks = 2;
    options_.exact_pages = 3;
    options_.prefill_bytes = 4u << 20;
    memory_ = helper->AllocateSlab(2u << 20).value();
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::vector<uint16_t> rows(81 * kRow);
    for (uint16_t& x : rows) x = F32ToF16(normal(random));
    CopyAndWait(*helper, at(kRowsAt), reinterpret_cast<const std::byte*>(rows.data()), rows.size() * 2,
                CopyDirection::kFromHost);
    for (int32_t t = 0; t < 81; t++) numbers_[32 + t] = t < 80 ? t : 2 * 64;  // slots
    CopyAndWait(*helper, at(kNumbersAt), reinterpret_cast<const std::byte*>(numbers_), sizeof numbers_,
                CopyDirection::kFromHost);
    EXPECT_EQ(cudaStreamCreate(&stream_), cudaSuccess);
  }
  ~PagedVerb() override { (void)cudaStreamDestroy(stream_); }
  void Prepare() override {
    const Bytes nothing(kRowsAt);
    CopyAndWait(*helper, at(0), nothing.data(), nothing.size(), CopyDirection::kFromHost);
  }
  absl::Status Call(Backend&) override {
    PagedLayer layer;
    layer.exact = at(0);
    layer.coded = at(kCodedAt);
    auto made = MakeCudaPagedAttention(options_, {&layer, 1});
    if (!made.ok()) return made.status();
    const auto* const numbers = reinterpret_cast<const int32_t*>(at(kNumbersAt));
    PagedStep step;
    step.sequences = 2;
    step.tokens = 81;
    step.most_queries = 80;
    step.seals = 1;
    step.query_start = numbers;
    step.lengths = numbers + 4;
    step.coded_first = step.coded_count = numbers + 6;
    step.coded_table = numbers + 8;
    step.coded_row = 1;
    step.exact_table = numbers + 12;
    step.exact_row = 2;
    step.seal_pages = numbers + 16;
    step.write_slots = numbers + 32;
    step.host_query_start = numbers_;
    step.host_lengths = numbers_ + 4;
    step.host_coded_first = step.host_coded_count = numbers_ + 6;
    const absl::Status status = Step(**made, step);
    if (!status.ok()) {
      EXPECT_EQ(cudaStreamQuery(stream_), cudaSuccess) << "work is under way";
    }
    EXPECT_EQ(cudaStreamSynchronize(stream_), cudaSuccess);
    return status;
  }
  Bytes Result() override {
    Bytes bytes(kRowsAt - kCodedAt);
    CopyAndWait(*helper, bytes.data(), at(kCodedAt), bytes.size(), CopyDirection::kToHost);
    return bytes;
  }

 private:
  static constexpr int64_t kRow = (16 + 2 + 2) * 128;
  static constexpr size_t kCodedAt = 3 * 65536, kOutAt = kCodedAt + 65536,
                          kRowsAt = kOutAt + 81 * 16 * 128 * 2, kNumbersAt = 1u << 20;

  std::byte* at(size_t offset) const { return memory_->data() + offset; }
  absl::Status Step(PagedAttention& attention, const PagedStep& step) {
    const auto* const rows = reinterpret_cast<const uint16_t*>(at(kRowsAt));
    absl::Status status = attention.Plan(step, stream_);
    if (status.ok()) status = attention.Write(0, {rows + 16 * 128, kRow}, {rows + 18 * 128, kRow}, stream_);
    if (status.ok()) status = attention.Attend(0, {rows, kRow}, {at(kOutAt), 16 * 128}, nullptr, stream_);
    if (status.ok())
      status = attention.WriteAttend(0, {rows + 16 * 128, kRow}, {rows + 18 * 128, kRow}, {rows, kRow},
                                     {at(kOutAt), 16 * 128}, nullptr, stream_);
    if (status.ok()) status = attention.Seal(0, stream_);
    return status;
  }

  PagedOptions options_;
  std::unique_ptr<Slab> memory_;
  //                        query_start   lengths  no coded  no table  exact pages  seal
  int32_t numbers_[128] = {0, 80, 81, 0, 80, 1, 0, 0, 0, 0, 0, 0, 0, 1, 2, 0, 0, 0};
  cudaStream_t stream_ = nullptr;
};

template <class V, class... Arguments>
void WalkOf(Arguments... arguments) {
  V verb(arguments...);
  Walk(verb);
}

TEST(Faults, Append) { WalkOf<AppendVerb>(); }
TEST(Faults, RecodeByRows) { WalkOf<RecodeVerb>("f16", "turbo4"); }
TEST(Faults, RecodeByTables) { WalkOf<RecodeVerb>("iso3", "planar4"); }
TEST(Faults, RecodeThatCopies) { WalkOf<RecodeVerb>("turbo4/turbo3", "turbo4/turbo2"); }
TEST(Faults, Decode) { WalkOf<DecodeVerb>(); }
TEST(Faults, AttendOverOneForm) {
  WalkOf<AttendVerb>(std::vector<std::string>{"turbo4"}, 2, DataType::kF32, false);
}
TEST(Faults, AttendOverTwoForms) {
  WalkOf<AttendVerb>(std::vector<std::string>{"f16", "turbo4"}, 2, DataType::kF16, false);
}
TEST(Faults, AttendOverAKeptPlan) {
  WalkOf<AttendVerb>(std::vector<std::string>{"f16", "turbo4", "iso4"}, 2, DataType::kF16, true);
}
TEST(Faults, AttendWithConversions) {
  WalkOf<AttendVerb>(std::vector<std::string>{"turbo2/q4_0", "turbo4"}, 2, DataType::kF32, true);
}
TEST(Faults, AttendOfManyQueries) {
  WalkOf<AttendVerb>(std::vector<std::string>{"f16", "turbo4"}, 150, DataType::kBf16, true);
}
TEST(Faults, CopyFromHost) { WalkOf<CopyVerb>(CopyDirection::kFromHost, false); }
TEST(Faults, CopyFromPinnedHost) { WalkOf<CopyVerb>(CopyDirection::kFromHost, true); }
TEST(Faults, CopyToHost) { WalkOf<CopyVerb>(CopyDirection::kToHost, false); }
TEST(Faults, CopyInside) { WalkOf<CopyVerb>(CopyDirection::kInside, false); }
TEST(Faults, AllocateSlab) { WalkOf<SlabVerb>(); }
TEST(Faults, DeviceDecode) { WalkOf<DeviceDecodeVerb>(); }
TEST(Faults, PagedAttention) { WalkOf<PagedVerb>(); }
TEST(Faults, MakeBackend) {
  MakeVerb verb;
  EXPECT_GT(FailEveryCall({}, verb, false), 0);
}

// An error that an innocent user of the process left behind is not ours to report.
TEST(CudaErrors, OfOthersAreNotReported) {
  AppendVerb verb;
  const auto backend = Make();
  verb.Prepare();
  void* p = nullptr;
  ASSERT_NE(cudaMalloc(&p, size_t{1} << 60), cudaSuccess);  // stays behind
  EXPECT_TRUE(verb.Call(*backend).ok());
  (void)cudaGetLastError();
}

TEST(CudaErrors, AreConsumedWhereTheyHappen) {
  void* p = nullptr;
  const absl::Status short_of_memory = cuda::StatusOf(cudaMalloc(&p, size_t{1} << 60), "much");
  EXPECT_EQ(short_of_memory.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
  const absl::Status bad =
      cuda::StatusOf(cudaMemcpy(nullptr, nullptr, 8, static_cast<cudaMemcpyKind>(77)), "bad copy");
  EXPECT_EQ(bad.code(), absl::StatusCode::kInternal);
  EXPECT_EQ(cudaPeekAtLastError(), cudaSuccess);
}

// As after a kernel's bad access, which would end this process's use of the GPU for good: the errors are only
// said.
TEST(CudaErrors, ThatLastAreSaidByEveryLaterCall) {
  AppendVerb verb;
  const auto backend = Make();
  EXPECT_TRUE(cuda::CheckDevice(0).ok());
  const absl::Status lost = cuda::StatusOf(cudaErrorIllegalAddress, "kernels");
  EXPECT_EQ(lost.code(), absl::StatusCode::kUnavailable);
  const absl::Status later = verb.Call(*backend);
  EXPECT_EQ(later.code(), absl::StatusCode::kUnavailable);
  EXPECT_NE(std::string(later.message()).find("restart the process"), std::string::npos) << later;
  EXPECT_EQ(backend->AllocateSlab(1024).status().code(), absl::StatusCode::kUnavailable);
  cuda::ForgetLostDevice(0);
  verb.Prepare();
  EXPECT_TRUE(verb.Call(*backend).ok());
}

}  // namespace
}  // namespace kvtide::testing
