#include "clients/cpp/embedded_carrier.h"

#include <utility>

#include "daemon/config.h"
#include "daemon/service/handlers.h"
#include "daemon/service/open_steps.h"
#include "daemon/service/places_in_use.h"
#include "daemon/service/verbs.h"
#include "daemon/tiered_cache.h"
#include "kernels/base/status.h"

namespace kvtide::client {
namespace {

class EmbeddedCarrier : public Carrier {
 public:
  static absl::StatusOr<std::unique_ptr<Carrier>> Create(const DaemonOptions& options) {
    std::unique_ptr<EmbeddedCarrier> made(new EmbeddedCarrier());
    KVTIDE_ASSIGN_OR_RETURN(made->tiers_, MakeTieredCache(options));
    const KvCache& cache = *made->tiers_->cache;
    const std::vector<TierOptions>& tiers = cache.options().tiers;
    const int homes = CountHomes(tiers);
    if (static_cast<size_t>(homes) < tiers.size() && tiers[static_cast<size_t>(homes)].attends()) {
      const Slab* const host = cache.SlabOf(homes);
      made->host_tier_.bytes = {host->data(), host->bytes()};
      made->in_use_ = std::make_unique<service::PlacesInUse>(homes);
    }
    for (int t = 0; t < homes; t++) {
      const Slab* const slab = cache.SlabOf(t);
      const TierOptions& tier = tiers[static_cast<size_t>(t)];
      made->pool_.push_back({tier.name, tier.Device(), slab->data(), slab->bytes()});
    }
    service::ServiceOptions service = options.service;
    service.calibrator = made->tiers_->calibrator.get();
    made->handlers_ = std::make_unique<service::Handlers>(made->tiers_->cache.get(), service);
    return std::unique_ptr<Carrier>(std::move(made));
  }
  ~EmbeddedCarrier() override {
    steps_.RollBackAll();
    handlers_.reset();
    if (tiers_ != nullptr) tiers_->cache->PersistChanged();
  }

  absl::Status Call(v1::SessionRequest* request, v1::SessionResponse* response) override {
    service::Call call;
    call.tensors = &places_;
    call.steps = &steps_;
    call.places = in_use_.get();
    call.maps_pool = true;
    SequenceId sequence = 0;
    return service::ServeMessage(handlers_.get(), *request, call, response, &sequence);
  }
  SharedMemory* memory() override { return memory_.get(); }
  std::span<const PoolSlab> pool() const override { return pool_; }
  HostTier host_tier() const override { return host_tier_; }

 private:
  EmbeddedCarrier() = default;

  const service::TensorMemory places_ = service::TensorMemory::OfProcess();
  const std::unique_ptr<SharedMemory> memory_ = MakeProcessMemory();
  std::unique_ptr<TieredCache> tiers_;
  std::unique_ptr<service::Handlers> handlers_;
  service::OpenSteps steps_;
  std::vector<PoolSlab> pool_;
  HostTier host_tier_;
  std::unique_ptr<service::PlacesInUse> in_use_;  // null: there is no host tier
};

}  // namespace

absl::StatusOr<std::unique_ptr<Carrier>> MakeEmbeddedCarrier(const std::string& config_json) {
  KVTIDE_ASSIGN_OR_RETURN(const v1::KvtidedConfig config,
                          ParseConfig(config_json.empty() ? "{}" : config_json, "(embedded pool)"));
  KVTIDE_ASSIGN_OR_RETURN(const DaemonOptions options, ResolveConfig(config));
  return EmbeddedCarrier::Create(options);
}

}  // namespace kvtide::client
