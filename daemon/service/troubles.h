// What is wrong with the daemon and stays so until somebody mends it. Whoever notices says so here; the log
// hears when it begins, what becomes of it, every ten seconds at most, and when it ends; GetStats (kvtide
// status, top, doctor) and the metric kvtide_trouble tell it meanwhile. Thread-safe.
#pragma once

#include <array>
#include <cstdint>
#include <functional>
#include <iterator>
#include <string>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "daemon/cache/call/identity.h"
#include "kernels/base/mutex.h"
#include "kvtide/v1/server.pb.h"

namespace kvtide::service {

// "config", "tokens": read again, and not good. "certificate": the server's, not good or about to end.
// "socket": its file is gone. "device": a GPU is lost to this process. "disk", "remote": tiers that take no
// blocks or are away. "persist": sequences do not become durable.
enum class Trouble : uint8_t { kConfig, kTokens, kCertificate, kSocket, kDevice, kDisk, kRemote, kPersist };
constexpr const char* kTroubleNames[] = {"config", "tokens", "certificate", "socket",
                                         "device", "disk",   "remote",      "persist"};

class Troubles {
 public:
  // Gets "error", "warning" or "info" and a line.
  using Write = std::function<void(const char* level, const std::string& line)>;
  explicit Troubles(Write write = {}) : write_(std::move(write)) {}

  // `text`: what is wrong; empty = nothing (any more). `ends_service`: nothing can be served until a restart.
  void Set(Trouble what, const std::string& text, bool ends_service = false, absl::Time now = absl::Now());

  // Bit i: kTroubleNames[i] is in trouble.
  uint32_t Bits() const;
  bool EndService() const;
  // For GetStats. Texts, which have paths and addresses in them, are for admins.
  void ToProto(const Identity& caller, absl::Time now, v1::GetStatsResponse* proto) const;
  // What is wrong with it now; empty: nothing.
  std::string TextOf(Trouble what) const;

 private:
  struct Known {
    std::string text, told_text;  // empty: all is well; what the log has heard
    absl::Time since, told;
    bool ends_service = false;
  };
  const Write write_;
  mutable Mutex mutex_;
  std::array<Known, std::size(kTroubleNames)> known_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::service
