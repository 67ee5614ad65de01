#include "kernels/cuda/copy/copy_engine.h"

#include <algorithm>
#include <cstring>

namespace kvtide::cuda {
namespace {

constexpr size_t kPinnedPieceBytes = size_t{16} << 20;

bool IsPinned(const void* p) {
  cudaPointerAttributes attributes{};
  if (cudaPointerGetAttributes(&attributes, p) != cudaSuccess) {
    (void)cudaGetLastError();
    return false;
  }
  return attributes.type == cudaMemoryTypeHost;
}

}  // namespace

CopyEngine::~CopyEngine() {
  std::thread threads[kDirections];
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    for (int d = 0; d < kDirections; d++) threads[d] = std::move(threads_[d]);
  }
  wake_.NotifyAll();
  for (std::thread& thread : threads)
    if (thread.joinable()) thread.join();
}

absl::StatusOr<CopyTicket> CopyEngine::Submit(std::span<const CopyPiece> pieces, CopyDirection direction) {
  Job job{0, direction, {}};
  for (const CopyPiece& piece :
       pieces) {  // neighbours travel together: each copy costs microseconds of its own
    CopyPiece* last = job.pieces.empty() ? nullptr : &job.pieces.back();
    if (last != nullptr && last->target + last->bytes == piece.target &&
        last->source + last->bytes == piece.source) {
      last->bytes += piece.bytes;
    } else {
      job.pieces.push_back(piece);
    }
  }
  const Direction lane = direction == CopyDirection::kToHost ? kOut : kIn;
  CopyTicket ticket = 0;
  {
    const MutexLock lock(mutex_);
    if (state_.size() >= static_cast<size_t>(max_copies_))
      return absl::ResourceExhaustedError(
          absl::StrCat(max_copies_, " copies are under way or not yet polled"));
    if (!threads_[lane].joinable()) threads_[lane] = std::thread([this, lane] { Work(lane); });
    ticket = job.ticket = next_++;
    state_[ticket] = {false, absl::OkStatus()};
    jobs_[lane].push_back(std::move(job));
  }
  wake_.NotifyAll();
  return ticket;
}

absl::StatusOr<bool> CopyEngine::Poll(CopyTicket ticket) {
  const MutexLock lock(mutex_);
  const auto it = state_.find(ticket);
  if (it == state_.end()) return absl::NotFoundError(absl::StrCat("no copy has ticket ", ticket));
  if (!it->second.first) return false;
  const absl::Status result = it->second.second;
  state_.erase(it);
  if (!result.ok()) return result;
  return true;
}

void CopyEngine::Work(Direction direction) {
  (void)cudaSetDevice(device_);
  std::optional<Lane> lane;
  for (;;) {
    Job job;
    {
      const MutexLock lock(mutex_);
      while (!stopping_ && jobs_[direction].empty()) wake_.Wait(mutex_);
      if (jobs_[direction].empty()) return;  // what was submitted is finished first
      job = std::move(jobs_[direction].front());
      jobs_[direction].pop_front();
    }
    absl::Status result;
    if (!lane.has_value()) result = Open(&lane);  // again with each job until it succeeds
    if (result.ok()) result = Run(job, *lane);
    const MutexLock lock(mutex_);
    state_[job.ticket] = {true, result};
  }
}

absl::Status CopyEngine::Open(std::optional<Lane>* lane) {
  Lane made;
  if (absl::Status status = made.stream.Create(); !status.ok()) return status;
  for (Event& event : made.events)
    if (absl::Status status = event.Create(); !status.ok()) return status;
  *lane = std::move(made);
  return absl::OkStatus();
}

absl::Status CopyEngine::Run(const Job& job, Lane& lane) {
  absl::Status status = Queue(job, lane);
  if (!status.ok())
    (void)StatusOf(cudaStreamSynchronize(lane.stream.get()), "the copies of a job that failed");
  return status;
}

absl::Status CopyEngine::Queue(const Job& job, Lane& lane) {
  const cudaStream_t s = lane.stream.get();
  PinnedBuffer(&staging)[2] = lane.staging;
  Event(&events)[2] = lane.events;
  int turn = 0;
  // To the host: what lies in a staging buffer and where it goes.
  struct Pending {
    std::byte* target = nullptr;
    size_t bytes = 0;
  } pending[2];
  const auto drain = [&](int i) -> absl::Status {
    if (pending[i].bytes == 0) return absl::OkStatus();
    KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(events[i].get()));
    std::memcpy(pending[i].target, staging[i].data(), pending[i].bytes);
    pending[i].bytes = 0;
    return absl::OkStatus();
  };
  for (const CopyPiece& piece : job.pieces) {
    if (job.direction == CopyDirection::kInside) {
      KVTIDE_CUDA_RETURN_IF_ERROR(
          cudaMemcpyAsync(piece.target, piece.source, piece.bytes, cudaMemcpyDeviceToDevice, s));
      continue;
    }
    const bool to_host = job.direction == CopyDirection::kToHost;
    const bool pinned = IsPinned(to_host ? piece.target : piece.source);
    for (size_t at = 0; at < piece.bytes;) {
      const size_t bytes = std::min(pinned ? kPinnedPieceBytes : piece_bytes_, piece.bytes - at);
      if (pinned) {
        KVTIDE_CUDA_RETURN_IF_ERROR(cudaMemcpyAsync(piece.target + at, piece.source + at, bytes,
                                                    to_host ? cudaMemcpyDeviceToHost : cudaMemcpyHostToDevice,
                                                    s));
      } else {
        const absl::Status reserved = staging[turn].Reserve(piece_bytes_);
        if (!reserved.ok()) return reserved;
        if (to_host) {
          const absl::Status drained = drain(turn);
          if (!drained.ok()) return drained;
          KVTIDE_CUDA_RETURN_IF_ERROR(
              cudaMemcpyAsync(staging[turn].data(), piece.source + at, bytes, cudaMemcpyDeviceToHost, s));
          pending[turn] = {piece.target + at, bytes};
        } else {
          KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventSynchronize(events[turn].get()));  // the buffer's last journey
          std::memcpy(staging[turn].data(), piece.source + at, bytes);
          KVTIDE_CUDA_RETURN_IF_ERROR(
              cudaMemcpyAsync(piece.target + at, staging[turn].data(), bytes, cudaMemcpyHostToDevice, s));
        }
        KVTIDE_CUDA_RETURN_IF_ERROR(cudaEventRecord(events[turn].get(), s));
        turn ^= 1;
      }
      at += bytes;
    }
  }
  for (int i = 0; i < 2; i++) {
    const absl::Status drained = drain(turn ^ i);
    if (!drained.ok()) return drained;
  }
  KVTIDE_CUDA_RETURN_IF_ERROR(cudaStreamSynchronize(s));
  return absl::OkStatus();
}

}  // namespace kvtide::cuda
