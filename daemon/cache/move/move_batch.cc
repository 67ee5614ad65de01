#include "daemon/cache/move/move_batch.h"

#ifdef KVTIDE_XXH_DISPATCH
#include <xxh_x86dispatch.h>  // the vector instructions of this processor; the same hash
#else
#include <xxhash.h>
#endif

#include <algorithm>
#include <deque>
#include <map>

#include "kernels/base/backoff.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

std::vector<CopyPiece> CutIntoPieces(const CopyJob& job, size_t piece_bytes) {
  std::vector<CopyPiece> pieces;
  for (size_t begin = 0; begin < job.bytes; begin += piece_bytes)
    pieces.push_back({job.target + begin, job.source + begin, std::min(piece_bytes, job.bytes - begin)});
  return pieces;
}

}  // namespace

CopyJob::CopyJob(const BlockStore& store, const Block& block, const Place& source_place,
                 const Place& target_place)
    : from(source_place.tier),
      to(target_place.tier),
      source(store.Data(source_place)),
      target(store.Data(target_place)),
      source_offset(source_place.offset),
      target_offset(target_place.offset),
      bytes(block.bytes()) {
  if (source == nullptr) source_label = LabelOf(block, source_place);
  if (target == nullptr) target_label = LabelOf(block, target_place);
}

void NameWrite(const CacheCore& core, const Block& block, Place* target) {
  if (core.attends(target->tier)) return;
  target->Written().write_id = core.io(target->tier).NextWriteId();
  target->Written().profile_hash = block.profile() != nullptr ? block.profile()->hash : 0;
}

namespace {

// Copies between memories.
void CopyInMemory(const CacheCore& core, std::span<CopyJob* const> jobs, const CopyWatch& watch) {
  struct Copying {
    CopyJob* job;
    Backend* backend;
    CopyTicket ticket;
  };
  std::vector<Copying> running;
  running.reserve(jobs.size());  // nothing fails between a started copy and its ticket
  for (CopyJob* job : jobs) {
    // The faster tier's backend copies: it is the one that may not be host memory.
    Backend* backend = &core.backend(std::min(job->from, job->to));
    const CopyDirection direction = job->from == job->to  ? CopyDirection::kInside
                                    : job->from < job->to ? CopyDirection::kToHost
                                                          : CopyDirection::kFromHost;
    const absl::StatusOr<CopyTicket> ticket =
        backend->StartCopy(CutIntoPieces(*job, core.options().move_piece_bytes), direction);
    if (ticket.ok()) {
      running.push_back({job, backend, *ticket});
    } else {
      job->status = ticket.status();
    }
  }
  // A copy that failed does not end the others: their bytes are in use until their own ticket says otherwise.
  // One thing at a time between two looks: what others copy meanwhile costs this thread nothing.
  std::deque<const CopyJob*> begun, ended;
  if (watch.begun)
    for (const Copying& copy : running) begun.push_back(copy.job);
  Backoff backoff;
  while (!running.empty() || !begun.empty() || !ended.empty()) {
    std::erase_if(running, [&](const Copying& copy) {
      const absl::StatusOr<bool> polled = copy.backend->Poll(copy.ticket);
      if (!polled.ok()) copy.job->status = polled.status();
      if (polled.ok() && *polled && watch.ended) ended.push_back(copy.job);
      return !polled.ok() || *polled;
    });
    if (!begun.empty()) {
      watch.begun(*begun.front());
      begun.pop_front();
    } else if (!ended.empty()) {
      watch.ended(*ended.front());
      ended.pop_front();
    } else if (!running.empty()) {
      backoff.Wait();
    }
  }
}

}  // namespace

namespace {

// To or from a tier of I/O. `buffer`: the other side is one, too, and its bytes are here.
IoJob MakeIoJob(const CacheCore& core, CopyJob& job, bool write, std::vector<std::byte>* buffer,
                const Cancellation* cancellation) {
  IoJob io;
  io.write = write;
  io.offset = write ? job.target_offset : job.source_offset;
  io.label = write ? job.target_label : job.source_label;
  io.cancellation = cancellation;
  if (buffer != nullptr) {
    buffer->resize(job.bytes);
    io.copy = [buffer, write](size_t at, std::span<std::byte> piece) {
      std::byte* const bytes = buffer->data() + at;
      std::copy_n(write ? bytes : piece.data(), piece.size(), write ? piece.data() : bytes);
      return absl::OkStatus();
    };
    return io;
  }
  Backend* const backend = &core.backend(write ? job.from : job.to);
  io.copy = [backend, write, &job](size_t at, std::span<std::byte> piece) {
    return write ? backend->CopyNow({piece.data(), job.source + at, piece.size()}, CopyDirection::kToHost)
                 : backend->CopyNow({job.target + at, piece.data(), piece.size()}, CopyDirection::kFromHost);
  };
  return io;
}

void RunIo(const CacheCore& core, std::span<CopyJob* const> jobs, bool write,
           std::span<std::vector<std::byte>> buffers, const Cancellation* cancellation) {
  std::map<int, std::vector<CopyJob*>> by_tier;
  for (CopyJob* job : jobs) by_tier[write ? job->to : job->from].push_back(job);
  size_t buffer = 0;
  for (const auto& [tier, of_tier] : by_tier) {
    std::vector<IoJob> ios;
    for (CopyJob* job : of_tier)
      ios.push_back(
          MakeIoJob(core, *job, write, buffers.empty() ? nullptr : &buffers[buffer++], cancellation));
    core.io(tier).Run(ios);
    for (size_t i = 0; i < ios.size(); i++) {
      of_tier[i]->status = ios[i].status;
      if (write) of_tier[i]->target_label.checksum = ios[i].label.checksum;
    }
  }
}

}  // namespace

void CopyAll(const CacheCore& core, std::span<CopyJob> jobs, const Cancellation* cancellation,
             const CopyWatch* watch) {
  std::vector<CopyJob*> memory, writes, reads, both;
  for (CopyJob& job : jobs) {
    const bool from = core.attends(job.from), to = core.attends(job.to);
    (from && to ? memory : from ? writes : to ? reads : both).push_back(&job);
  }
  CopyInMemory(core, memory, watch != nullptr ? *watch : CopyWatch{});
  RunIo(core, writes, true, {}, cancellation);
  RunIo(core, reads, false, {}, cancellation);
  for (CopyJob* job : both) {
    std::vector<std::byte> bytes;
    RunIo(core, {&job, 1}, false, {&bytes, 1}, cancellation);
    if (job->status.ok()) RunIo(core, {&job, 1}, true, {&bytes, 1}, cancellation);
  }
}

MoveBatch::~MoveBatch() {
  for (Running& move : running_) {
    move.block->moving = false;
    lock_->store.Retire(move.target);
  }
}

void MoveBatch::Start(Block* block, Place* target) {
  KVTIDE_CHECK(!block->writing && !block->moving && block->place != nullptr);
  Running& move = running_.emplace_back();
  move.block = HeldBlock(lock_->store, block);
  move.target = target;
  move.verify = block->has_checksum;
  move.checksum = block->checksum;
  move.compute = lock_->store.tier(target->tier).checksum;
  NameWrite(lock_.core(), *block, target);
  block->moving = true;
}

void MoveBatch::StartRecode(Block* block, Place* target, const BlockLayout* rung) {
  KVTIDE_CHECK(!block->has_backup && block->place->tier == target->tier && rung == block->kind->NextRung());
  Start(block, target);
  Running& move = running_.back();
  move.rung = rung;
  move.from = block->layout();
  move.profile = block->profile();
  move.position = int64_t{block->index} * kBlockTokens;
}

void MoveBatch::Finish() {
  if (running_.empty()) return;
  const auto copied = std::stable_partition(running_.begin(), running_.end(),
                                            [](const Running& move) { return move.rung != nullptr; });
  const auto recodes = static_cast<size_t>(copied - running_.begin());
  std::vector<CopyJob> jobs;
  for (const Running& move : running_)
    jobs.emplace_back(lock_->store, *move.block.get(), *move.block->place, *move.target);
  lock_->moves_running++;
  const CacheCore& core = lock_.core();
  size_t bytes = 0;
  for (const CopyJob& job : jobs) bytes += job.bytes;
  const bool up = std::all_of(jobs.begin(), jobs.end(), [&](const CopyJob& job) {
    return job.from == jobs.front().from && job.to < core.homes() && job.from >= core.homes() &&
           core.attends(job.from);
  });
  {
    const Unlocked unlocked(lock_);
    const absl::Time start = core.options().clock();
    // I/O checks and makes checksums itself. A block that is recoded is checked before, as what comes of it
    // has other bytes; one that is copied beside its copy, which is thrown away if it was not what it should
    // be.
    const auto check = [&](size_t i) {
      Running& move = running_[i];
      move.corrupt = move.verify && XXH3_64bits(jobs[i].source, jobs[i].bytes) != move.checksum;
    };
    const auto compute = [&](size_t i) {
      Running& move = running_[i];
      if (move.compute)
        move.checksum =
            XXH3_64bits(jobs[i].target, move.rung != nullptr ? move.rung->block_bytes() : jobs[i].bytes);
    };
    for (size_t i = 0; i < recodes; i++) check(i);
    RecodeAll(std::span(jobs).first(recodes));
    const auto index = [&](const CopyJob& job) { return static_cast<size_t>(&job - jobs.data()); };
    const CopyWatch watch{[&](const CopyJob& job) { check(index(job)); },
                          [&](const CopyJob& job) {
                            // Checked by now: all have begun before one has ended.
                            if (!running_[index(job)].corrupt) compute(index(job));
                          }};
    CopyAll(core, std::span(jobs).subspan(recodes), cancellation_, &watch);
    for (size_t i = 0; i < jobs.size(); i++) {
      Running& move = running_[i];
      const CopyJob& job = jobs[i];
      if (!job.status.ok()) continue;
      if (i < recodes) {
        compute(i);
      } else if (job.target == nullptr) {
        if (job.source != nullptr && move.verify) move.corrupt = job.target_label.checksum != move.checksum;
        move.checksum = job.target_label.checksum;
        move.compute = true;
      }
    }
    if (up)
      core.rates().AddCopyUp(jobs.front().from, static_cast<double>(bytes), core.options().clock() - start);
  }
  lock_->moves_running--;
  for (size_t i = 0; i < jobs.size(); i++) Settle(running_[i], jobs[i]);
  running_.clear();
  lock_->changed.NotifyAll();
}

// Without the mutex. Those whose source is not what it was are left as they are.
void MoveBatch::RecodeAll(std::span<CopyJob> jobs) {
  std::map<int, std::vector<size_t>> by_tier;
  for (size_t i = 0; i < jobs.size(); i++)
    if (!running_[i].corrupt) by_tier[jobs[i].from].push_back(i);
  for (const auto& [tier, indices] : by_tier) {
    std::vector<RecodePiece> pieces;
    for (const size_t i : indices) {
      const Running& move = running_[i];
      RecodePiece& piece = pieces.emplace_back();
      piece.from = move.from;
      piece.source = jobs[i].source;
      piece.to = move.rung;
      piece.target = jobs[i].target;
      piece.from_profile = piece.to_profile = move.profile.get();
      piece.position = move.position;
      piece.layers = move.rung->shape().layers;
    }
    const absl::Status status = lock_.core().backend(tier).Recode(pieces);
    for (const size_t i : indices) jobs[i].status = status;
  }
}

void MoveBatch::Settle(Running& move, const CopyJob& job) {
  BlockStore& store = lock_->store;
  Counters& counters = lock_->counters;
  Block* block = move.block.get();
  block->moving = false;
  // A read of I/O that finds other bytes, or none: they are nowhere else.
  const bool lost = move.corrupt || (job.source == nullptr && absl::IsDataLoss(job.status));
  if (lost || !job.status.ok()) {
    store.Retire(move.target);
    report_->left_blocks++;
    if (!lost) {
      if (!absl::IsCancelled(job.status)) counters.failed_moves++;
      return;
    }
    if (move.corrupt) counters.checksum_failures++;
    if (block->has_backup) {  // the same bytes, on the disk
      store.MoveToBackup(block);
      return;
    }
    counters.lost_blocks++;
    store.tier(job.from).lost++;
    store.Drop(block);
    return;
  }
  if (job.target == nullptr) move.target->Written().checksum = move.checksum;
  if (move.rung != nullptr && block->leases > 0) {
    // Somebody was told meanwhile what it is.
    store.Retire(move.target);
    report_->left_blocks++;
    return;
  }
  if (move.rung != nullptr) {
    Tier& tier = store.tier(job.from);
    tier.degraded++;
    tier.degraded_bytes += block->bytes() - move.rung->block_bytes();
    report_->degraded_blocks++;
    store.SwapForm(block, move.target, move.rung);
    block->has_checksum = move.compute;
    block->checksum = move.checksum;
    return;
  }
  store.SwapPlace(block, move.target);
  block->has_checksum = move.compute;
  block->checksum = move.checksum;
  report_->moved_blocks++;
  report_->moved_bytes += job.bytes;
  if (job.to == job.from) {
    counters.compacted_blocks++;
    counters.compacted_bytes += job.bytes;
    return;
  }
  if (job.to > job.from) {
    store.tier(job.from).demoted++;
  } else {
    store.tier(job.to).promoted++;
  }
  counters.moves++;
  counters.moved_bytes += job.bytes;
}

}  // namespace kvtide
