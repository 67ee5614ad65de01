#include "clients/cpp/embedded_carrier.h"

#include <utility>

#include "daemon/config.h"
#include "daemon/service/handlers.h"
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
    made->handlers_ = std::make_unique<service::Handlers>(made->tiers_->cache.get(), options.service);
    return std::unique_ptr<Carrier>(std::move(made));
  }
  ~EmbeddedCarrier() override {
    handlers_.reset();
    if (tiers_ != nullptr) tiers_->cache->PersistChanged();
  }

  absl::Status Call(v1::SessionRequest* request, v1::SessionResponse* response) override {
    service::Call call;
    call.tensors = &places_;
    SequenceId sequence = 0;
    return service::ServeMessage(handlers_.get(), *request, call, response, &sequence);
  }
  SharedMemory* memory() override { return memory_.get(); }

 private:
  EmbeddedCarrier() = default;

  const service::TensorMemory places_ = service::TensorMemory::OfProcess();
  const std::unique_ptr<SharedMemory> memory_ = MakeProcessMemory();
  std::unique_ptr<TieredCache> tiers_;
  std::unique_ptr<service::Handlers> handlers_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Carrier>> MakeEmbeddedCarrier(const std::string& config_json) {
  KVTIDE_ASSIGN_OR_RETURN(const v1::KvtidedConfig config,
                          ParseConfig(config_json.empty() ? "{}" : config_json, "(embedded pool)"));
  KVTIDE_ASSIGN_OR_RETURN(const DaemonOptions options, ResolveConfig(config));
  return EmbeddedCarrier::Create(options);
}

}  // namespace kvtide::client
