// How fast the tiers are, from what the cache's own calls to backends take. Thread-safe, with a mutex of its
// own.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "daemon/cache/tier/attend_cost.h"
#include "kernels/base/mutex.h"

namespace kvtide {

// A running average over about the last second of work. A clock that stands still leaves it as it began.
class RunningRate {
 public:
  // The start counts as 10 ms of work.
  explicit RunningRate(double start_bytes_per_second);
  void Add(double bytes, absl::Duration time);
  double BytesPerSecond() const { return bytes_ / seconds_; }

 private:
  double bytes_, seconds_;
};

// Until something was measured, by kind of backend; not measurements, but of the order of a GPU's memory, a
// server processor's attention over coded blocks, PCIe 4 with 16 lanes, and one thread's copies.
struct StartRates {
  static double OfAttention(const std::string& backend);
  static double OfCopyUp(const std::string& home, const std::string& lower);
};

class MeasuredRates {
 public:
  struct Medium {
    std::string backend;             // empty: a tier of I/O
    double attend = 0, copy_up = 0;  // where it begins; 0 = as backends of its kind do
  };
  // By tier. Tiers on one backend are one memory: they share a rate of attention.
  explicit MeasuredRates(const std::vector<Medium>& media);

  // A layer of blocks that lie there was read, so many bytes in all passes. Little says more of the call than
  // of the memory, and does not count.
  void AddAttention(int tier, double bytes, absl::Duration time);
  // Blocks were copied up from this tier to one of the homes, checksums included.
  void AddCopyUp(int tier, double bytes, absl::Duration time);

  AttendRates Of(int tier, int home) const;
  double attend(int tier) const;
  double copy_up(int tier) const;

 private:
  mutable Mutex mu_;
  std::vector<size_t> attend_of_;  // by tier, into attend_
  std::vector<RunningRate> attend_ ABSL_GUARDED_BY(mu_);
  std::vector<RunningRate> copy_up_ ABSL_GUARDED_BY(mu_);  // by tier
};

}  // namespace kvtide
