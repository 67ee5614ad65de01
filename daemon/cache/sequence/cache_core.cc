#include "daemon/cache/sequence/cache_core.h"

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide {

CacheCore::CacheCore(CacheOptions options) : options_(std::move(options)), state_(options_) {}

absl::Status CacheCore::Start() {
  CacheLock lock(*this);
  KVTIDE_RETURN_IF_ERROR(lock->store.Init(options_));
  homes_ = lock->store.homes();
  std::vector<MeasuredRates::Medium> media;
  for (const TierOptions& tier : options_.tiers) {
    media_.push_back({tier.backend, tier.io});
    media.push_back({tier.attends() ? tier.backend->name() : "", tier.attend_rate, tier.promote_rate});
  }
  rates_ = std::make_unique<MeasuredRates>(media);
  return absl::OkStatus();
}

std::string TierText(const CacheOptions& options, size_t tier) {
  return absl::StrCat("tier '", options.tiers[tier].name, "'",
                      CountHomes(options.tiers) > 1 ? " on " + options.tiers[tier].Device() : "");
}

}  // namespace kvtide
