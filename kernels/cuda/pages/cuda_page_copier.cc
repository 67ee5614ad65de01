#include "kernels/cuda/pages/cuda_page_copier.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "kernels/cuda/codec/codec_kernels.h"
#include "kernels/cuda/device/copy_to_device.h"
#include "kernels/cuda/device/device.h"
#include "kernels/cuda/device/device_image.h"
#include "kernels/cuda/device/settled.h"
#include "kernels/cuda/pages/move_pages.h"

namespace kvtide::cuda {
namespace {

constexpr size_t kMostRecords = 1024;  // that are coded by one launch: their rows take up to 64 KiB each

size_t Size(int64_t n) { return static_cast<size_t>(n); }

class PagesOnGpu final : public PageCopier {
 public:
  absl::Status Create(const PageCopyOptions& options, std::span<std::byte* const> layers) {
    KVTIDE_RETURN_IF_ERROR(CheckPageCopy(options, layers));
    options_ = options;
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaGetDevice(&device_));
    KVTIDE_RETURN_IF_ERROR(FindDeviceImage(device_).status());
    chunk_bytes_ = ChunkBytes(options, layers.size());
    most_chunks_ = options.piece_bytes / chunk_bytes_;
    KVTIDE_RETURN_IF_ERROR(stream_.Create());
    KVTIDE_RETURN_IF_ERROR(bus_.Create());
    KVTIDE_ASSIGN_OR_RETURN(std::byte* const copied, Allocate(layers.size_bytes()));
    KVTIDE_RETURN_IF_ERROR(CopyToDevice(copied, layers.data(), layers.size_bytes()));
    pages_.layers = reinterpret_cast<std::byte* const*>(copied);
    pages_.stride = options.page_stride;
    pages_.layer_count = static_cast<int>(layers.size());
    pages_.chunk_pages = options.chunk_pages;
    aligned_ = options.page_stride % 16 == 0 &&
               std::all_of(layers.begin(), layers.end(),
                           [](const std::byte* at) { return reinterpret_cast<uintptr_t>(at) % 16 == 0; });
    const size_t ids = most_chunks_ * Size(options.chunk_pages) * sizeof(int32_t);
    for (Slot& slot : slots_) {
      KVTIDE_ASSIGN_OR_RETURN(slot.payload, Allocate(most_chunks_ * chunk_bytes_));
      KVTIDE_ASSIGN_OR_RETURN(std::byte* const on_device, Allocate(ids));
      slot.ids = reinterpret_cast<int32_t*>(on_device);
      KVTIDE_ASSIGN_OR_RETURN(std::byte* const bad, Allocate(most_chunks_ * sizeof(int32_t)));
      slot.bad = reinterpret_cast<int32_t*>(bad);
      KVTIDE_RETURN_IF_ERROR(slot.ids_host.Reserve(ids, ids));
      KVTIDE_RETURN_IF_ERROR(slot.bad_host.Reserve(most_chunks_ * sizeof(int32_t)));
      KVTIDE_RETURN_IF_ERROR(slot.there.Create());
      KVTIDE_RETURN_IF_ERROR(slot.done.Create());
    }
    return options.page_bytes > 0 ? absl::OkStatus() : CreateRows();
  }

  ~PagesOnGpu() override {
    const DeviceGuard guard(device_);
    Drain();
  }

  size_t chunk_bytes() const override { return chunk_bytes_; }
  size_t bytes() const override { return bytes_; }

  absl::Status After(void* event) override {
    if (event == nullptr) return absl::OkStatus();
    const DeviceGuard guard(device_);
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(stream_.get(), static_cast<cudaEvent_t>(event), 0));
    return absl::OkStatus();
  }

  absl::Status Read(int slot, std::span<const int32_t> pages, std::byte* payload) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagePiece(options_, chunk_bytes_, slot, 0, pages));
    if (pages.size() % Size(options_.chunk_pages) != 0)
      return absl::InvalidArgumentError(
          absl::StrCat(pages.size(), " pages are no whole chunks of ", options_.chunk_pages));
    const DeviceGuard guard(device_);
    return Drained(QueueRead(slots_[slot], pages, payload));
  }

  absl::Status Write(int slot, const std::byte* payload, int skip, std::span<const int32_t> pages) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagePiece(options_, chunk_bytes_, slot, skip, pages));
    const Run run{payload, ChunksOf(options_, skip, pages.size()) * chunk_bytes_};
    const DeviceGuard guard(device_);
    return Drained(QueueWrite(slots_[slot], {&run, 1}, skip, pages));
  }

  absl::Status WriteChunks(int slot, std::span<const std::byte* const> chunks, int skip,
                           std::span<const int32_t> pages) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagePiece(options_, chunk_bytes_, slot, skip, pages));
    KVTIDE_RETURN_IF_ERROR(CheckChunks(options_, chunks, skip, pages));
    std::vector<Run> runs;
    for (const std::byte* const chunk : chunks) {
      if (!runs.empty() && runs.back().from + runs.back().bytes == chunk) {
        runs.back().bytes += chunk_bytes_;
      } else {
        runs.push_back({chunk, chunk_bytes_});
      }
    }
    const DeviceGuard guard(device_);
    return Drained(QueueWrite(slots_[slot], runs, skip, pages));
  }

  absl::Status Wait(int index) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagePiece(options_, chunk_bytes_, index, 0, {}));
    const DeviceGuard guard(device_);
    Slot& slot = slots_[index];
    if (!slot.busy) return absl::OkStatus();
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(slot.done.get()));
    slot.busy = false;
    const auto* const bad = reinterpret_cast<const int32_t*>(slot.bad_host.data());
    const size_t checked = std::exchange(slot.checked, 0);
    for (size_t chunk = 0; chunk < checked; chunk++)
      if (bad[chunk] != 0)
        return absl::InvalidArgumentError(
            absl::StrCat("chunk ", chunk, ": a value is no number, infinite or beyond f16"));
    return absl::OkStatus();
  }

  absl::Status Pin(std::byte* memory, size_t bytes) override {
    const DeviceGuard guard(device_);
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaHostRegister(memory, bytes, cudaHostRegisterPortable));
    return absl::OkStatus();
  }
  absl::Status PinReadOnly(const std::byte* memory, size_t bytes) override {
    const DeviceGuard guard(device_);
    int supported = 0;
    KVTIDE_CUDA_RETURN_IF_ERROR(
        cudaDeviceGetAttribute(&supported, cudaDevAttrHostRegisterReadOnlySupported, device_));
    if (supported == 0)
      return absl::UnimplementedError("this driver cannot register memory that is mapped read-only");
    const size_t page = static_cast<size_t>(::sysconf(_SC_PAGESIZE));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaHostRegister(const_cast<std::byte*>(memory),
                                                 (bytes + page - 1) / page * page,
                                                 cudaHostRegisterPortable | cudaHostRegisterReadOnly));
    return absl::OkStatus();
  }
  void Unpin(const std::byte* memory) override {
    const DeviceGuard guard(device_);
    Drain();
    (void)cudaHostUnregister(const_cast<std::byte*>(memory));
    (void)cudaGetLastError();
  }

 private:
  // Host memory that one copy takes to the device.
  struct Run {
    const std::byte* from = nullptr;
    size_t bytes = 0;
  };
  struct Slot {
    std::byte* payload = nullptr;  // on the device, as what follows
    int32_t *ids = nullptr, *bad = nullptr;
    PinnedBuffer ids_host, bad_host;
    Event there, done;  // the payload on the device, the slot's work
    bool busy = false;
    size_t checked = 0;  // chunks whose values are looked at
    // Of every record that may lie in the payload: rows of the scratch memory into it, and out of it.
    const CodecJob *encode_k = nullptr, *encode_v = nullptr, *decode_k = nullptr, *decode_v = nullptr;
  };

  absl::Status CreateRows() {
    coded_ = ChunkLayout(options_, Size(pages_.layer_count), options_.pair);
    exact_ = ChunkLayout(options_, Size(pages_.layer_count), ExactPair());
    chunk_records_ = Size(coded_.shape().layers) * Size(options_.kv_heads);
    const size_t records = most_chunks_ * chunk_records_;
    batch_ = std::min(kMostRecords, records);
    record_floats_ = Size(kBlockTokens) * Size(options_.head_dim_k + options_.head_dim_v);
    KVTIDE_ASSIGN_OR_RETURN(
        scratch_, Allocate(batch_ * std::max(exact_.record_bytes(), record_floats_ * sizeof(float))));
    for (Slot& slot : slots_) KVTIDE_RETURN_IF_ERROR(MakeJobs(records, slot));
    move_.type = options_.type;
    move_.tokens = options_.tokens;
    move_.chunk_tokens = options_.tokens * options_.chunk_pages;
    move_.heads = options_.kv_heads;
    move_.k = SideOf(options_.k, coded_.k());
    move_.v = SideOf(options_.v, coded_.v());
    return absl::OkStatus();
  }

  RowsOnDevice SideOf(const PageRows& rows, const HalfLayout& half) const {
    RowsOnDevice side{rows.first, rows.token, rows.head, rows.dim, half.head_dim, half.stored_dim};
    const auto element = static_cast<int64_t>(DataTypeBytes(options_.type));
    side.wide = aligned_ && rows.dim == 1 && rows.first * element % 16 == 0 &&
                rows.token * element % 16 == 0 && rows.head * element % 16 == 0;
    return side;
  }

  absl::Status MakeJobs(size_t records, Slot& slot) {
    std::vector<CodecJob> jobs(4 * records);
    for (size_t r = 0; r < records; r++) {
      std::byte* const record = slot.payload + r * coded_.record_bytes();
      std::byte* const half = scratch_ + r % batch_ * exact_.record_bytes();
      std::byte* const rows = scratch_ + r % batch_ * record_floats_ * sizeof(float);
      CodecJob& encode_k = jobs[r];
      encode_k.source = half;
      encode_k.target = record;
      encode_k.row_stride = options_.head_dim_k;
      CodecJob& encode_v = jobs[records + r];
      encode_v.source = half + exact_.v_codes();
      encode_v.target = record + coded_.v_codes();
      encode_v.row_stride = options_.head_dim_v;
      CodecJob& decode_k = jobs[2 * records + r];
      decode_k.source = record;
      decode_k.target = rows;
      decode_k.row_stride = options_.head_dim_k;
      CodecJob& decode_v = jobs[3 * records + r];
      decode_v.source = record + coded_.v_codes();
      decode_v.target = rows + Size(kBlockTokens) * Size(options_.head_dim_k) * sizeof(float);
      decode_v.row_stride = options_.head_dim_v;
    }
    const size_t bytes = jobs.size() * sizeof(CodecJob);
    KVTIDE_ASSIGN_OR_RETURN(std::byte* const copied, Allocate(bytes));
    KVTIDE_RETURN_IF_ERROR(CopyToDevice(copied, jobs.data(), bytes));
    const auto* const all = reinterpret_cast<const CodecJob*>(copied);
    slot.encode_k = all;
    slot.encode_v = all + records;
    slot.decode_k = all + 2 * records;
    slot.decode_v = all + 3 * records;
    return absl::OkStatus();
  }

  // The ids on their way to the device.
  absl::StatusOr<PagesOnDevice> Send(Slot& slot, int skip, std::span<const int32_t> ids) {
    // What was put on before may still read them.
    if (slot.busy) KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(slot.done.get()));
    slot.busy = false;
    slot.checked = 0;
    std::memcpy(slot.ids_host.data(), ids.data(), ids.size_bytes());
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(slot.ids, slot.ids_host.data(), ids.size_bytes(),
                                                cudaMemcpyHostToDevice, stream_.get()));
    PagesOnDevice pages = pages_;
    pages.ids = slot.ids;
    pages.skip = skip;
    pages.end = skip + static_cast<int>(ids.size());
    return pages;
  }

  absl::Status Finish(Slot& slot, const Stream& last) {
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(slot.done.get(), last.get()));
    slot.busy = true;
    return absl::OkStatus();
  }
  // What is put on `second` from now on begins when what was put on `first` is done.
  static absl::Status Follow(const Stream& first, const Event& event, const Stream& second) {
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(event.get(), first.get()));
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaStreamWaitEvent(second.get(), event.get(), 0));
    return absl::OkStatus();
  }
  void Drain() const {
    for (const Stream* stream : {&stream_, &bus_})
      if (stream->get() != nullptr) (void)cudaStreamSynchronize(stream->get());
  }
  // A call that failed leaves nothing behind that still runs.
  absl::Status Drained(const absl::Status& status) const {
    if (!status.ok()) (void)Settled(status, bus_.get());
    return Settled(status, stream_.get());
  }

  bool wide_bytes() const { return aligned_ && options_.page_bytes % 16 == 0; }

  absl::Status QueueRead(Slot& slot, std::span<const int32_t> ids, std::byte* payload) {
    if (ids.empty()) return absl::OkStatus();
    KVTIDE_ASSIGN_OR_RETURN(const PagesOnDevice pages, Send(slot, 0, ids));
    const size_t chunks = ids.size() / Size(options_.chunk_pages);
    const cudaStream_t stream = stream_.get();
    if (options_.page_bytes > 0) {
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchMoveBytes(pages, slot.payload, options_.page_bytes,
                                                  static_cast<int>(chunks), wide_bytes(), false, stream));
    } else {
      KVTIDE_RETURN_IF_ERROR(Encode(slot, pages, chunks));
    }
    KVTIDE_RETURN_IF_ERROR(Follow(stream_, slot.there, bus_));
    if (options_.page_bytes == 0) {
      KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(slot.bad_host.data(), slot.bad, chunks * sizeof(int32_t),
                                                  cudaMemcpyDeviceToHost, bus_.get()));
      slot.checked = chunks;
    }
    KVTIDE_CUDA_RETURN_IF_ERROR(
        cudaMemcpyAsync(payload, slot.payload, chunks * chunk_bytes_, cudaMemcpyDeviceToHost, bus_.get()));
    return Finish(slot, bus_);
  }

  absl::Status QueueWrite(Slot& slot, std::span<const Run> runs, int skip, std::span<const int32_t> ids) {
    if (ids.empty()) return absl::OkStatus();
    KVTIDE_ASSIGN_OR_RETURN(const PagesOnDevice pages, Send(slot, skip, ids));
    const size_t chunks = ChunksOf(options_, skip, ids.size());
    const cudaStream_t stream = stream_.get();
    std::byte* to = slot.payload;
    for (const Run& run : runs) {
      KVTIDE_CUDA_RETURN_IF_ERROR(
          cudaMemcpyAsync(to, run.from, run.bytes, cudaMemcpyHostToDevice, bus_.get()));
      to += run.bytes;
    }
    KVTIDE_RETURN_IF_ERROR(Follow(bus_, slot.there, stream_));
    if (options_.page_bytes > 0) {
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchMoveBytes(pages, slot.payload, options_.page_bytes,
                                                  static_cast<int>(chunks), wide_bytes(), true, stream));
    } else {
      KVTIDE_RETURN_IF_ERROR(Decode(slot, pages, chunks));
    }
    return Finish(slot, stream_);
  }

  absl::Status Encode(const Slot& slot, const PagesOnDevice& pages, size_t chunks) {
    const cudaStream_t stream = stream_.get();
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemsetAsync(slot.bad, 0, chunks * sizeof(int32_t), stream));
    const size_t records = chunks * chunk_records_;
    for (size_t first = 0; first < records; first += batch_) {
      const int count = static_cast<int>(std::min(batch_, records - first));
      RowMove move = move_;
      move.pages = pages;
      move.first_record = static_cast<int64_t>(first);
      KVTIDE_CUDA_RETURN_IF_ERROR(
          LaunchGatherRows(move, scratch_, exact_.record_bytes(), exact_.v_codes(), slot.bad, count, stream));
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchEncode(options_.pair.k, Side::kKey, coded_.k(), RowSource::kF16Page,
                                               slot.encode_k + first, count, stream));
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchEncode(options_.pair.v, Side::kValue, coded_.v(), RowSource::kF16Page,
                                               slot.encode_v + first, count, stream));
    }
    return absl::OkStatus();
  }

  absl::Status Decode(const Slot& slot, const PagesOnDevice& pages, size_t chunks) {
    const cudaStream_t stream = stream_.get();
    const size_t records = chunks * chunk_records_;
    for (size_t first = 0; first < records; first += batch_) {
      const int count = static_cast<int>(std::min(batch_, records - first));
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchDecode(options_.pair.k, Side::kKey, coded_.k(), RowTarget::kF32Rows,
                                               0, slot.decode_k + first, count, stream));
      KVTIDE_CUDA_RETURN_IF_ERROR(LaunchDecode(options_.pair.v, Side::kValue, coded_.v(), RowTarget::kF32Rows,
                                               0, slot.decode_v + first, count, stream));
      RowMove move = move_;
      move.pages = pages;
      move.first_record = static_cast<int64_t>(first);
      KVTIDE_CUDA_RETURN_IF_ERROR(
          LaunchScatterRows(move, reinterpret_cast<const float*>(scratch_), record_floats_, count, stream));
    }
    return absl::OkStatus();
  }

  absl::StatusOr<std::byte*> Allocate(size_t bytes) {
    buffers_.emplace_back();
    KVTIDE_RETURN_IF_ERROR(buffers_.back().Reserve(bytes, bytes));
    bytes_ += bytes;
    return buffers_.back().data();
  }

  PageCopyOptions options_;
  int device_ = 0;
  size_t chunk_bytes_ = 0, most_chunks_ = 0, bytes_ = 0;
  bool aligned_ = false;  // pages begin at multiples of 16 bytes
  std::vector<DeviceBuffer> buffers_;
  PagesOnDevice pages_;
  Slot slots_[kSlots];
  Stream stream_, bus_;  // kernels; payloads between device and host, beside the kernels of the other slot
  // Rows.
  BlockLayout coded_, exact_;
  RowMove move_;
  size_t chunk_records_ = 0, batch_ = 0, record_floats_ = 0;
  std::byte* scratch_ = nullptr;  // f16 pages, or rows in f32, of a launch
};

}  // namespace
}  // namespace kvtide::cuda

namespace kvtide {

absl::StatusOr<std::unique_ptr<PageCopier>> MakeCudaPageCopier(const PageCopyOptions& options,
                                                               std::span<std::byte* const> layers) {
  auto copier = std::make_unique<cuda::PagesOnGpu>();
  KVTIDE_RETURN_IF_ERROR(copier->Create(options, layers));
  return copier;
}

}  // namespace kvtide
