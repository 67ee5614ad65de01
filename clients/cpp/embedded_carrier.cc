#include "clients/cpp/embedded_carrier.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "daemon/backends.h"
#include "daemon/cache/kv_cache.h"
#include "daemon/config.h"
#include "daemon/host_memory.h"
#include "daemon/service/handlers.h"
#include "daemon/service/verbs.h"
#include "kernels/base/status.h"

namespace kvtide::client {
namespace {

class EmbeddedCarrier : public Carrier {
 public:
  static absl::StatusOr<std::unique_ptr<Carrier>> Create(DaemonOptions options) {
    std::unique_ptr<EmbeddedCarrier> made(new EmbeddedCarrier());
    KVTIDE_ASSIGN_OR_RETURN(made->backends_, MakeBackends(options.devices, options.compute_threads));
    KVTIDE_RETURN_IF_ERROR(CheckHostMemory(
        options.host_bytes + made->backends_.cpu_devices * options.device_bytes, ReadHostMemory()));
    for (const auto& device : made->backends_.devices) {
      options.cache.tiers.push_back(
          {"device", device.get(), static_cast<size_t>(options.device_bytes), false, device->name()});
    }
    if (options.host_bytes > 0) {
      options.cache.tiers.push_back(
          {"host", made->backends_.Host(), static_cast<size_t>(options.host_bytes), false, "cpu"});
    }
    KVTIDE_ASSIGN_OR_RETURN(made->cache_, KvCache::Create(options.cache));
    made->handlers_ = std::make_unique<service::Handlers>(made->cache_.get(), options.service);
    return std::unique_ptr<Carrier>(std::move(made));
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
  Backends backends_;
  std::unique_ptr<KvCache> cache_;
  std::unique_ptr<service::Handlers> handlers_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Carrier>> MakeEmbeddedCarrier(const std::string& config_json) {
  KVTIDE_ASSIGN_OR_RETURN(const v1::KvtidedConfig config,
                          ParseConfig(config_json.empty() ? "{}" : config_json, "(embedded pool)"));
  KVTIDE_ASSIGN_OR_RETURN(DaemonOptions options, ResolveConfig(config));
  return EmbeddedCarrier::Create(std::move(options));
}

}  // namespace kvtide::client
