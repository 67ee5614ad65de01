#include "daemon/cache/move_batch.h"

#include <xxhash.h>

#include <algorithm>
#include <chrono>
#include <thread>

#include "kernels/base/check.h"

namespace kvtide {
namespace {

// Waits for copies: short at first, for small blocks; then without burning a core.
class Backoff {
 public:
  void Wait() {
    if (rounds_++ < 16) {
      std::this_thread::yield();
    } else {
      std::this_thread::sleep_for(std::chrono::microseconds(std::min(rounds_, 200)));
    }
  }

 private:
  int rounds_ = 0;
};

std::vector<CopyPiece> CutIntoPieces(const CopyJob& job, size_t piece_bytes) {
  std::vector<CopyPiece> pieces;
  for (size_t begin = 0; begin < job.bytes; begin += piece_bytes)
    pieces.push_back({job.target + begin, job.source + begin, std::min(piece_bytes, job.bytes - begin)});
  return pieces;
}

}  // namespace

void CopyAll(const CacheCore& core, std::span<CopyJob> jobs) {
  struct Copying {
    CopyJob* job;
    Backend* backend;
    CopyTicket ticket;
  };
  std::vector<Copying> running;
  running.reserve(jobs.size());  // nothing fails between a started copy and its ticket
  for (CopyJob& job : jobs) {
    // The faster tier's backend copies: it is the one that may not be host memory.
    Backend* backend = &core.backend(std::min(job.from, job.to));
    const CopyDirection direction = job.from == job.to  ? CopyDirection::kInside
                                    : job.from < job.to ? CopyDirection::kToHost
                                                        : CopyDirection::kFromHost;
    const absl::StatusOr<CopyTicket> ticket =
        backend->StartCopy(CutIntoPieces(job, core.options().move_piece_bytes), direction);
    if (ticket.ok()) {
      running.push_back({&job, backend, *ticket});
    } else {
      job.status = ticket.status();
    }
  }
  // A copy that failed does not end the others: their bytes are in use until their own ticket says otherwise.
  Backoff backoff;
  while (!running.empty()) {
    std::erase_if(running, [](const Copying& copy) {
      const absl::StatusOr<bool> polled = copy.backend->Poll(copy.ticket);
      if (!polled.ok()) copy.job->status = polled.status();
      return !polled.ok() || *polled;
    });
    if (!running.empty()) backoff.Wait();
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
  block->moving = true;
}

void MoveBatch::Finish() {
  if (running_.empty()) return;
  std::vector<CopyJob> jobs;
  for (const Running& move : running_) {
    const Place& from = *move.block->place;
    jobs.push_back({from.tier, move.target->tier, from.data, move.target->data, from.bytes, {}});
  }
  lock_->moves_running++;
  {
    const Unlocked unlocked(lock_);
    for (size_t i = 0; i < jobs.size(); i++)
      running_[i].corrupt =
          running_[i].verify && XXH3_64bits(jobs[i].source, jobs[i].bytes) != running_[i].checksum;
    CopyAll(lock_.core(), jobs);
    for (size_t i = 0; i < jobs.size(); i++)
      if (running_[i].compute && jobs[i].status.ok())
        running_[i].checksum = XXH3_64bits(jobs[i].target, jobs[i].bytes);
  }
  lock_->moves_running--;
  for (size_t i = 0; i < jobs.size(); i++) Settle(running_[i], jobs[i]);
  running_.clear();
  lock_->changed.NotifyAll();
}

void MoveBatch::Settle(Running& move, const CopyJob& job) {
  BlockStore& store = lock_->store;
  Counters& counters = lock_->counters;
  Block* block = move.block.get();
  block->moving = false;
  if (move.corrupt || !job.status.ok()) {
    store.Retire(move.target);
    report_->left_blocks++;
    if (!move.corrupt) {
      counters.failed_moves++;
      return;
    }
    counters.checksum_failures++;
    store.Drop(block);
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
