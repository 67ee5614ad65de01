#include "daemon/service/clients.h"

#include <algorithm>
#include <utility>

#include "absl/strings/string_view.h"
#include "absl/time/clock.h"

namespace kvtide::service {
namespace {

bool EndsStep(const CallReport& call) {
  return call.code == 0 && absl::string_view(call.method) == absl::string_view("EndStep");
}

// A stream as long as its client; its calls are told by themselves.
bool IsSession(const CallReport& call) {
  return absl::string_view(call.method) == absl::string_view("Session");
}

template <class Proto>
void Fill(const Traffic& traffic, Proto* proto) {
  proto->set_calls(traffic.calls);
  proto->set_steps(traffic.steps);
  proto->set_received_bytes(traffic.received_bytes);
  proto->set_sent_bytes(traffic.sent_bytes);
}

}  // namespace

Client::Client(Way way, std::string name, std::string tenant)
    : way_(way), name_(std::move(name)), since_(absl::Now()), tenant_(std::move(tenant)), last_(since_) {}

std::string Client::tenant() const {
  const MutexLock lock(mutex_);
  return tenant_;
}

int64_t Client::calls() const {
  const MutexLock lock(mutex_);
  return traffic_.calls;
}

void Client::Count(const CallReport& call) {
  const absl::Time now = absl::Now();
  const MutexLock lock(mutex_);
  if (tenant_ != call.tenant) tenant_ = std::string(call.tenant);
  last_ = now;
  traffic_.calls++;
  if (EndsStep(call)) traffic_.steps++;
  traffic_.received_bytes += call.request_bytes;
  traffic_.sent_bytes += call.response_bytes;
}

void Client::ToProto(absl::Time now, v1::ClientStats* proto) const {
  const MutexLock lock(mutex_);
  proto->set_name(name_);
  proto->set_way(NameOf(way_));
  proto->set_tenant(tenant_);
  Fill(traffic_, proto);
  proto->set_connected_seconds(std::max(0.0, absl::ToDoubleSeconds(now - since_)));
  proto->set_idle_seconds(std::max(0.0, absl::ToDoubleSeconds(now - last_)));
}

std::shared_ptr<Client> Clients::Add(Way way, std::string name, std::string tenant) {
  auto client = std::make_shared<Client>(way, std::move(name), std::move(tenant));
  const MutexLock lock(mutex_);
  constexpr size_t kFew = 64;
  if (clients_.size() >= kFew + 2 * swept_) {
    std::erase_if(clients_, [](const std::weak_ptr<Client>& one) { return one.expired(); });
    swept_ = clients_.size();
  }
  clients_.push_back(client);
  return client;
}

void Clients::Count(const CallReport& call, Client* client) {
  if (IsSession(call)) return;
  Totals& totals = totals_[static_cast<size_t>(call.way)];
  totals.calls.fetch_add(1, std::memory_order_relaxed);
  if (EndsStep(call)) totals.steps.fetch_add(1, std::memory_order_relaxed);
  totals.received_bytes.fetch_add(call.request_bytes, std::memory_order_relaxed);
  totals.sent_bytes.fetch_add(call.response_bytes, std::memory_order_relaxed);
  if (client != nullptr) client->Count(call);
}

std::vector<std::shared_ptr<Client>> Clients::Connected() const {
  std::vector<std::shared_ptr<Client>> connected;
  const MutexLock lock(mutex_);
  std::erase_if(clients_, [&](const std::weak_ptr<Client>& one) {
    std::shared_ptr<Client> held = one.lock();
    if (held == nullptr) return true;
    connected.push_back(std::move(held));
    return false;
  });
  return connected;
}

std::array<Clients::OfWay, kWays> Clients::Ways() const {
  std::array<OfWay, kWays> ways;
  for (const auto& client : Connected()) ways[static_cast<size_t>(client->way())].connected++;
  for (size_t i = 0; i < ways.size(); i++) {
    const Totals& totals = totals_[i];
    ways[i].traffic = {totals.calls.load(std::memory_order_relaxed),
                       totals.steps.load(std::memory_order_relaxed),
                       totals.received_bytes.load(std::memory_order_relaxed),
                       totals.sent_bytes.load(std::memory_order_relaxed)};
  }
  return ways;
}

void Clients::ToProto(const Identity& caller, v1::GetStatsResponse* proto) const {
  const std::array<OfWay, kWays> ways = Ways();
  for (size_t i = 0; i < ways.size(); i++) {
    v1::WayStats* const out = proto->add_ways();
    out->set_way(kWayNames[i]);
    out->set_clients(ways[i].connected);
    Fill(ways[i].traffic, out);
  }
  std::vector<std::pair<int64_t, std::shared_ptr<Client>>> seen;  // by calls
  for (std::shared_ptr<Client>& client : Connected())
    if (caller.MaySee(client->tenant())) seen.emplace_back(client->calls(), std::move(client));
  std::stable_sort(seen.begin(), seen.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  const absl::Time now = absl::Now();
  for (size_t i = 0; i < std::min(seen.size(), kMostShown); i++)
    seen[i].second->ToProto(now, proto->add_clients());
}

}  // namespace kvtide::service
