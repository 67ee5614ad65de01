#include "daemon/calibrate/calibrator.h"

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

void LowerPriority() {
  constexpr int kLowest = 19;
  // Of this thread; where it is not allowed, all else bounds what it takes.
  (void)setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), kLowest);
}

}  // namespace

Calibrator::~Calibrator() {
  std::thread worker;
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
    wake_.NotifyAll();
    worker = std::move(worker_);
  }
  if (worker.joinable()) worker.join();
}

int64_t Calibrator::Wants(ModelId family, int layer, absl::Duration took) {
  const MutexLock lock(mutex_);
  const auto found = gatherings_.find(family);
  return found == gatherings_.end() ? 0 : found->second->Wants(layer, took);
}

void Calibrator::See(ModelId family, int layer, std::span<const TrafficRows> rows, int64_t tokens) {
  const absl::StatusOr<GatheringPtr> gathering = Find(family);
  if (!gathering.ok() || !(*gathering)->See(layer, rows, tokens)) return;
  const MutexLock lock(mutex_);
  work_ = true;
  wake_.NotifyOne();
}

void Calibrator::NoteRopes(ModelId family, std::vector<Rope> ropes) {
  if (ropes.empty()) return;
  const MutexLock lock(mutex_);
  ropes_[family] = std::move(ropes);
}

std::vector<Rope> Calibrator::RopesOf(ModelId family) const {
  const MutexLock lock(mutex_);
  const auto found = ropes_.find(family);
  return found == ropes_.end() ? std::vector<Rope>() : found->second;
}

bool Calibrator::Has(ModelId family) const { return Find(family).ok(); }

absl::Status Calibrator::Start(CalibrationPlan plan) {
  if (options_.models == CalibratorOptions::Models::kNever)
    return absl::FailedPreconditionError(
        "this daemon calibrates no model: its setting calibrate is \"never\"");
  KVTIDE_RETURN_IF_ERROR(CompletePlan(&plan));
  const double bytes = Gathering::Bytes(plan);
  const ModelId family = plan.family;
  const MutexLock lock(mutex_);
  double taken = 0;
  for (const auto& [other, gathering] : gatherings_)
    if (other != family) taken += static_cast<double>(gathering->memory_bytes());
  if (taken + bytes > static_cast<double>(options_.memory_bytes))
    return Refused(Refusal::kLimit, absl::ResourceExhaustedError(
                                        absl::StrCat("the sums of model '", plan.model.name, "' take ", bytes,
                                                     " bytes, ", taken, " of the ", options_.memory_bytes,
                                                     " of calibrate_memory are taken: raise that, stop "
                                                     "another calibration, or hold fewer tokens back")));
  Remove(family);
  gatherings_.emplace(family, std::make_shared<Gathering>(std::move(plan)));
  active_ = true;
  if (!worker_.joinable()) worker_ = std::thread([this] { Work(); });
  return absl::OkStatus();
}

void Calibrator::Remove(ModelId family) {
  const auto found = gatherings_.find(family);
  if (found == gatherings_.end()) return;
  const CalibrationStatus status = found->second->Status();
  past_observed_ += status.observed;
  past_spent_ += status.spent;
  past_making_ += status.making;
  gatherings_.erase(found);
}

absl::Status Calibrator::Stop(ModelId family) {
  KVTIDE_RETURN_IF_ERROR(Find(family).status());
  const MutexLock lock(mutex_);
  Remove(family);
  return absl::OkStatus();
}

void Calibrator::Forget(ModelId family) {
  const MutexLock lock(mutex_);
  Remove(family);
  ropes_.erase(family);
}

absl::StatusOr<Calibrator::GatheringPtr> Calibrator::Find(ModelId family) const {
  const MutexLock lock(mutex_);
  const auto found = gatherings_.find(family);
  if (found == gatherings_.end())
    return absl::NotFoundError(
        "the model is not being calibrated; begin with StartCalibration (`kvtide "
        "calibrate --from-daemon`)");
  return found->second;
}

std::vector<CalibrationStatus> Calibrator::List() const {
  std::vector<GatheringPtr> all;
  {
    const MutexLock lock(mutex_);
    for (const auto& [family, gathering] : gatherings_) all.push_back(gathering);
  }
  std::vector<CalibrationStatus> list;
  for (const GatheringPtr& gathering : all) list.push_back(gathering->Status());
  return list;
}

absl::StatusOr<CalibrationStatus> Calibrator::StatusOf(ModelId family) const {
  KVTIDE_ASSIGN_OR_RETURN(const GatheringPtr gathering, Find(family));
  return gathering->Status();
}

absl::StatusOr<ModelSpec> Calibrator::Export(ModelId family) const {
  KVTIDE_ASSIGN_OR_RETURN(const GatheringPtr gathering, Find(family));
  return gathering->Export();
}

absl::StatusOr<std::vector<Rope>> Calibrator::PlannedRopes(ModelId family) const {
  KVTIDE_ASSIGN_OR_RETURN(const GatheringPtr gathering, Find(family));
  return gathering->plan().ropes;
}

void Calibrator::NoteInstalled(ModelId family) {
  if (const absl::StatusOr<GatheringPtr> gathering = Find(family); gathering.ok())
    (*gathering)->NoteInstalled();
}

CalibratorStats Calibrator::Stats() const {
  CalibratorStats stats;
  for (const CalibrationStatus& status : List()) {
    switch (status.state) {
      case CalibrationState::kGathering:
        stats.gathering++;
        break;
      case CalibrationState::kMaking:
        stats.making++;
        break;
      case CalibrationState::kReady:
        stats.ready++;
        break;
      case CalibrationState::kRefused:
        stats.refused++;
        break;
    }
    stats.memory_bytes += status.memory_bytes;
    stats.observed += status.observed;
    stats.spent += status.spent;
    stats.making_time += status.making;
  }
  const MutexLock lock(mutex_);
  stats.observed += past_observed_;
  stats.spent += past_spent_;
  stats.making_time += past_making_;
  return stats;
}

void Calibrator::Work() {
  LowerPriority();
  while (true) {
    std::vector<GatheringPtr> all;
    {
      const MutexLock lock(mutex_);
      while (!work_ && !stopping_) wake_.Wait(mutex_);
      if (stopping_) return;
      work_ = false;
      for (const auto& [family, gathering] : gatherings_) all.push_back(gathering);
    }
    for (const GatheringPtr& gathering : all) gathering->Work(stopping_);
    const MutexLock lock(mutex_);
    active_ = std::any_of(gatherings_.begin(), gatherings_.end(),
                          [](const auto& entry) { return entry.second->gathers(); });
  }
}

}  // namespace kvtide
