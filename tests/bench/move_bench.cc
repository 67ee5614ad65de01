// Moves of blocks between tiers in memory and on a disk, beside what this machine does with as many bytes in
// the same run: a plain copy by one thread, and one file written and read past the page cache in pieces of 1
// MiB, eight under way (what fio does with iodepth=8, bs=1M). Both from memory in huge pages, as the tiers
// have, and the file is the tier's own, where the moved blocks lie: disks of virtual machines differ by half
// from one place to another. And attention over a sequence that stays where
// it is, alone and while another thread moves or copies.
//     KVTIDE_BENCH_FOLDER=/nvme kvtide_bench_move [--json FILE] [--rounds N]
// A sequence of 64 MiB in f16 blocks of 2 MiB (8 layers of 8 KV heads of 128) goes down and comes back;
// attention is of one layer over 2,048 tokens, on one thread. Medians of rounds that take turns.
#include <fcntl.h>
#include <stdlib.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "daemon/cache/kv_cache.h"
#include "daemon/disk/disk_tier.h"
#include "kernels/base/check.h"
#include "kernels/base/float16.h"
#include "kernels/cpu/cpu_backend.h"
#include "tests/bench/must.h"
#include "tests/bench/result_file.h"
#include "tests/bench/rounds.h"
#include "tests/bench/samples.h"

namespace kvtide::bench {
namespace {

using Clock = std::chrono::steady_clock;
constexpr int kLayers = 8, kKvHeads = 8, kHeads = 32, kDim = 128;
constexpr int64_t kTokens = 2048;
constexpr size_t kPiece = size_t{1} << 20, kPieces = 64, kBytes = kPieces * kPiece;
constexpr double kAttendSeconds = 0.4;

std::string MakeFolder() {
  const char* const asked = std::getenv("KVTIDE_BENCH_FOLDER");
  std::string folder = std::string(asked != nullptr ? asked : "/tmp") + "/kvtide_bench_move_XXXXXX";
  KVTIDE_CHECK(mkdtemp(folder.data()) != nullptr, "no folder in ", folder);
  return folder;
}

IoKind Kind() { return CheckUring().ok() ? IoKind::kUring : IoKind::kThreads; }

// A cache of two tiers in memory, and perhaps one on disk, with one sequence that moves and one that stays.
class Pool {
 public:
  Pool(bool checksum, const std::string& folder) {
    CpuBackendOptions cpu;
    cpu.threads = 1;
    device_ = MakeCpuBackend(cpu);
    host_ = MakeCpuBackend(cpu);
    CacheOptions options;
    options.background_moves = false;
    options.tiers.push_back({"device", device_.get(), 3 * kBytes, false});
    options.tiers.push_back({"host", host_.get(), 2 * kBytes, checksum});
    if (!folder.empty()) {
      DiskTierOptions disk;
      disk.folder = folder;
      disk.capacity_bytes = 2 * kBytes;
      disk.io = Kind();
      disk_ = Must(DiskTier::Open(disk));
      options.tiers.push_back(
          {"disk", nullptr, disk_->capacity_bytes(), true, "disk", disk_.get(), disk_.get()});
    }
    cache_ = Must(KvCache::Create(options));
    model_ = Must(cache_->RegisterModel(UniformModel("m", {kLayers, kKvHeads, kDim, kDim}, kHeads)));
    moving_ = Fill();
    resident_ = Fill();
  }

  double Down(int tier) {
    return Timed([&] { return cache_->Evict({&moving_, 1}, tier); });
  }
  double Up() {
    return Timed([&] { return cache_->Prefetch({&moving_, 1}); });
  }
  void Attend() {
    AttendRequest item;
    item.sequence = resident_;
    item.q = {q_.data(), DataType::kF32};
    item.queries = 1;
    item.first_query_position = kTokens - 1;
    item.out = out_.data();
    AttendCall call;
    call.items = {&item, 1};
    Must(cache_->Attend(call));
  }

 private:
  SequenceId Fill() {
    SequenceOptions options;
    options.pair = ExactPair();
    const SequenceId id = Must(cache_->CreateSequence(model_, options));
    constexpr int64_t kChunk = 1024;
    const std::vector<uint16_t> rows(kChunk * kKvHeads * kDim, F32ToF16(0.5f));
    for (int64_t at = 0; at < kTokens; at += kChunk) {
      std::vector<LayerKv> layers;
      for (int l = 0; l < kLayers; l++)
        layers.push_back({l, {rows.data(), DataType::kF16}, {rows.data(), DataType::kF16}, 0, 0});
      AppendCall call;
      call.sequence = id;
      call.start_position = at;
      call.tokens = kChunk;
      call.layers = layers;
      Must(cache_->Append(call));
    }
    return id;
  }
  template <class Call>
  double Timed(const Call& call) {
    const auto start = Clock::now();
    const MoveReport report = Must(call());
    const double seconds = SecondsSince(start);
    KVTIDE_CHECK(report.moved_bytes == kBytes && report.left_blocks == 0, report.moved_bytes, " bytes moved");
    return seconds;
  }

  std::unique_ptr<Backend> device_, host_;
  std::unique_ptr<DiskTier> disk_;
  std::unique_ptr<KvCache> cache_;
  ModelId model_{};
  SequenceId moving_ = 0, resident_ = 0;
  const std::vector<float> q_ = std::vector<float>(kHeads * kDim, 0.1f);
  std::vector<float> out_ = std::vector<float>(kHeads * kDim);
};

// As many bytes of the same kinds of memory and file, without blocks, labels and checksums. Its writes spoil
// what lies on the disk: nothing may.
class Plain {
 public:
  explicit Plain(const std::string& tier_folder) : queues_(Kind(), 4) {
    constexpr size_t kHugePage = size_t{2} << 20;
    for (AlignedMemory* memory : {&from_, &to_}) {
      memory->reset(static_cast<std::byte*>(std::aligned_alloc(kHugePage, kBytes)));
      (void)madvise(memory->get(), kBytes, MADV_HUGEPAGE);
      std::memset(memory->get(), 1, kBytes);
    }
    file_ = Must(SystemFiles().Open(tier_folder + "/segment-0", false, true));
    // Exact blocks lie at the end of a tier.
    const uint64_t size = Must(file_->Size());
    KVTIDE_CHECK(size >= kBytes, "a segment of ", size, " bytes");
    begin_ = (size - kBytes) / kDiskPage * kDiskPage;
    queue_ = Must(queues_.Make(8));
    queue_->Register({from_.get(), kBytes});
  }
  double Copy() {
    const auto start = Clock::now();
    for (size_t at = 0; at < kBytes; at += kPiece) std::memcpy(to_.get() + at, from_.get() + at, kPiece);
    return SecondsSince(start);
  }
  double File(bool write) {
    const auto start = Clock::now();
    std::vector<IoQueue::Op> ops;
    for (size_t i = 0; i < kPieces; i++) {
      if (i >= 8) Must(queue_->Wait(ops[i - 8]));
      const std::span<std::byte> piece(from_.get() + i * kPiece, kPiece);
      ops.push_back(write ? queue_->Write(*file_, begin_ + i * kPiece, piece)
                          : queue_->Read(*file_, begin_ + i * kPiece, piece));
    }
    for (size_t i = kPieces - 8; i < kPieces; i++) Must(queue_->Wait(ops[i]));
    return SecondsSince(start);
  }

 private:
  struct Freed {
    void operator()(std::byte* memory) const { std::free(memory); }
  };
  using AlignedMemory = std::unique_ptr<std::byte, Freed>;
  AlignedMemory from_, to_;
  std::unique_ptr<kvtide::File> file_;
  uint64_t begin_ = 0;
  IoQueues queues_;
  std::unique_ptr<IoQueue> queue_;
};

// Attentions a second while another thread does `work` again and again; none: alone.
double AttendRate(Pool& pool, const std::function<void()>& work) {
  std::atomic<bool> stop{false};
  std::thread other;
  if (work)
    other = std::thread([&] {
      while (!stop) work();
    });
  int calls = 0;
  const auto start = Clock::now();
  while (SecondsSince(start) < kAttendSeconds) {
    pool.Attend();
    calls++;
  }
  const double rate = calls / SecondsSince(start);
  stop = true;
  if (other.joinable()) other.join();
  return rate;
}

struct Row {
  std::string what, bound;  // the row that it is a share of; empty: a bound itself
  std::vector<double> values;
};

int Run(int rounds, const std::string& json) {
  const std::string folder = MakeFolder();
  {
    Pool pool(false, folder + "/tier"), checked(true, "");
    Plain plain(folder + "/tier");
    const auto gigabytes = [](double seconds) { return 1e-9 * static_cast<double>(kBytes) / seconds; };
    std::vector<Row> rows = {{"copy", "", {}},
                             {"device to host", "copy", {}},
                             {"host to device", "copy", {}},
                             {"device to host, with checksums", "copy", {}},
                             {"host to device, with checksums", "copy", {}},
                             {"file write", "", {}},
                             {"device to disk", "file write", {}},
                             {"file read", "", {}},
                             {"disk to device", "file read", {}}};
    std::vector<Row> rates = {{"attention alone", "", {}},
                              {"beside plain copies", "attention alone", {}},
                              {"beside moves to and from the host tier", "attention alone", {}},
                              {"beside moves to and from the disk", "attention alone", {}}};
    for (int round = -1; round < rounds; round++) {  // the first one warms up
      std::vector<double> seconds;
      const double copy = plain.Copy();
      const double down = pool.Down(1), up = pool.Up();
      const double checked_down = checked.Down(1), checked_up = checked.Up();
      const double write = plain.File(true), disk_down = pool.Down(2);
      const double read = plain.File(false), disk_up = pool.Up();
      const double alone = AttendRate(pool, nullptr);
      const double copies = AttendRate(pool, [&] { plain.Copy(); });
      const auto moves = [&](int tier) {
        return [&pool, tier] {
          pool.Down(tier);
          pool.Up();
        };
      };
      const double host = AttendRate(pool, moves(1)), disk = AttendRate(pool, moves(2));
      if (round < 0) continue;
      size_t i = 0;
      for (const double value : {copy, down, up, checked_down, checked_up, write, disk_down, read, disk_up})
        rows[i++].values.push_back(gigabytes(value));
      i = 0;
      for (const double value : {alone, copies, host, disk}) rates[i++].values.push_back(value);
    }
    Result result;
    result["rounds"] = rounds;
    result["io"] = Kind() == IoKind::kUring ? "io_uring" : "threads";
    const auto write_rows = [&](const std::vector<Row>& list, const char* unit) {
      for (const Row& row : list) {
        const double value = At(row.values, .5);
        // Of the same round, so that other load of the machine meets both.
        std::vector<double> shares;
        for (const Row& bound : list)
          for (size_t i = 0; i < row.values.size() && bound.what == row.bound; i++)
            shares.push_back(100 * row.values[i] / bound.values[i]);
        const double share = At(shares, .5);
        std::printf("%-40s %9.2f %s", row.what.c_str(), value, unit);
        if (!shares.empty()) std::printf("  %5.1f %% of %s", share, row.bound.c_str());
        std::printf("\n");
        Result entry;
        entry["what"] = row.what;
        entry[unit] = std::round(100 * value) / 100;
        if (!shares.empty()) {
          entry["of"] = row.bound;
          entry["percent"] = Tenth(share);
        }
        result["rows"].push_back(std::move(entry));
      }
    };
    write_rows(rows, "GB/s");
    write_rows(rates, "calls/s");
    std::filesystem::remove_all(folder);
    return WriteResult(result, json);
  }
}

}  // namespace
}  // namespace kvtide::bench

int main(int argc, char** argv) {
  return kvtide::bench::RunRounds(argc, argv, "kvtide_bench_move", 15, kvtide::bench::Run);
}
