#include "clients/cpp/ways.h"

#include <unistd.h>

#include "absl/strings/str_cat.h"
#include "clients/cpp/ring_carrier.h"

namespace kvtide::client {
namespace {

// Maps nothing; notes what could be.
class Onlooker : public DirectDevice {
 public:
  explicit Onlooker(std::vector<std::string>* devices) : devices_(devices) {}
  std::string id() const override { return "nowhere"; }
  absl::StatusOr<std::unique_ptr<Slab>> Map(const SlabHandle& handle) override {
    devices_->emplace_back(handle.device.data());
    if (handle.fd >= 0) ::close(handle.fd);
    return Nothing();
  }
  absl::StatusOr<std::unique_ptr<PagedAttention>> MakeAttention(const PagedOptions&,
                                                                std::span<const PagedLayer>) override {
    return Nothing();
  }
  absl::StatusOr<std::unique_ptr<StepArrays>> MakeArrays(size_t) override { return Nothing(); }
  absl::StatusOr<std::unique_ptr<StreamMark>> MakeMark() override { return Nothing(); }

 private:
  static absl::Status Nothing() { return absl::UnimplementedError("only looks"); }
  std::vector<std::string>* const devices_;
};

}  // namespace

DaemonWays ProbeWays(const std::string& address) {
  DaemonWays ways;
  const absl::StatusOr<std::string> path = SocketPathOf(address);
  if (!path.ok()) {
    ways.shared_memory = ways.direct = path.status();
    return ways;
  }
  RingOptions options;
  options.arena_bytes = 4096;
  ways.shared_memory = RingCarrier::Connect(*path, options).status();
  Onlooker onlooker(&ways.devices);
  options.direct = &onlooker;
  const absl::Status status = RingCarrier::Connect(*path, options).status();
  if (ways.devices.empty()) ways.direct = status;
  return ways;
}

}  // namespace kvtide::client
