#include "daemon/cache/tier/measured_rates.h"

#include <algorithm>

#include "absl/strings/match.h"

namespace kvtide {
namespace {

constexpr double kStartSeconds = 0.01, kHorizonSeconds = 1;
constexpr double kLeastBytes = 1 << 20;

bool IsGpu(const std::string& backend) { return absl::StartsWith(backend, "cuda"); }

}  // namespace

RunningRate::RunningRate(double start_bytes_per_second)
    : bytes_(start_bytes_per_second * kStartSeconds), seconds_(kStartSeconds) {}

void RunningRate::Add(double bytes, absl::Duration time) {
  const double seconds = absl::ToDoubleSeconds(time);
  if (seconds <= 0) return;
  const double keep = std::max(0.0, 1 - seconds / kHorizonSeconds);
  bytes_ = bytes_ * keep + bytes;
  seconds_ = seconds_ * keep + seconds;
}

double StartRates::OfAttention(const std::string& backend) { return IsGpu(backend) ? 1e12 : 1e10; }

double StartRates::OfCopyUp(const std::string& home, const std::string& lower) {
  return IsGpu(home) || IsGpu(lower) ? 2e10 : 8e9;
}

MeasuredRates::MeasuredRates(const std::vector<Medium>& media) {
  const std::string home = media.empty() ? "" : media.front().backend;
  for (size_t t = 0; t < media.size(); t++) {
    const Medium& medium = media[t];
    size_t same = 0;
    while (same < t && (media[same].backend != medium.backend || media[same].attend != medium.attend)) same++;
    if (same < t) {
      attend_of_.push_back(attend_of_[same]);
    } else {
      attend_of_.push_back(attend_.size());
      attend_.emplace_back(medium.attend > 0 ? medium.attend : StartRates::OfAttention(medium.backend));
    }
    copy_up_.emplace_back(medium.copy_up > 0 ? medium.copy_up : StartRates::OfCopyUp(home, medium.backend));
  }
}

void MeasuredRates::AddAttention(int tier, double bytes, absl::Duration time) {
  if (bytes < kLeastBytes) return;
  const MutexLock lock(mu_);
  attend_[attend_of_[static_cast<size_t>(tier)]].Add(bytes, time);
}

void MeasuredRates::AddCopyUp(int tier, double bytes, absl::Duration time) {
  if (bytes < kLeastBytes) return;
  const MutexLock lock(mu_);
  copy_up_[static_cast<size_t>(tier)].Add(bytes, time);
}

AttendRates MeasuredRates::Of(int tier, int home) const {
  return {attend(tier), attend(home), copy_up(tier)};
}

double MeasuredRates::attend(int tier) const {
  const MutexLock lock(mu_);
  return attend_[attend_of_[static_cast<size_t>(tier)]].BytesPerSecond();
}

double MeasuredRates::copy_up(int tier) const {
  const MutexLock lock(mu_);
  return copy_up_[static_cast<size_t>(tier)].BytesPerSecond();
}

}  // namespace kvtide
