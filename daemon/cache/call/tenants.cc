#include "daemon/cache/call/tenants.h"

#include <algorithm>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "daemon/cache/call/refusal.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

// "2GiB", "512MiB", "4096".
absl::StatusOr<uint64_t> ParseSize(absl::string_view text) {
  int shift = 0;
  for (const auto& [unit, bits] : {std::pair("KiB", 10), {"MiB", 20}, {"GiB", 30}, {"TiB", 40}})
    if (absl::ConsumeSuffix(&text, unit)) shift = bits;
  uint64_t number = 0;
  if (!absl::SimpleAtoi(text, &number) || number > TenantLimits::kNone >> shift)
    return absl::InvalidArgumentError("a size is a number, perhaps with KiB, MiB, GiB or TiB");
  return number << shift;
}

bool IsEmpty(const TenantAccount& account) {
  return account.sequences == 0 && account.models == 0 && account.places == 0;
}

}  // namespace

absl::StatusOr<TenantQuotas> TenantQuotas::Parse(std::span<const std::string> texts,
                                                 std::span<const std::string> tiers) {
  TenantQuotas quotas;
  for (const std::string& text : texts) {
    const auto wrong = [&](absl::string_view what) {
      return absl::InvalidArgumentError(absl::StrCat(
          "quota \"", text, "\": ", what,
          "; write TENANT:KEY=VALUE,... with the keys sequences, models, pins, calls, ",
          "connections and the tiers ", absl::StrJoin(tiers, ", "), ", and * for all other tenants"));
    };
    const size_t colon = text.find(':');
    if (colon == std::string::npos || colon == 0) return wrong("there is no tenant");
    const std::string tenant = text.substr(0, colon);
    TenantLimits limits;
    std::vector<std::string> seen;
    for (const absl::string_view part : absl::StrSplit(absl::string_view(text).substr(colon + 1), ',')) {
      const std::pair<std::string, std::string> pair = absl::StrSplit(part, absl::MaxSplits('=', 1));
      const auto& [key, value] = pair;
      if (std::find(seen.begin(), seen.end(), key) != seen.end())
        return wrong(absl::StrCat(key, " is there twice"));
      seen.push_back(key);
      uint64_t* count = nullptr;
      if (key == "sequences") count = &limits.sequences;
      if (key == "models") count = &limits.models;
      if (key == "pins") count = &limits.pins;
      if (key == "calls") count = &limits.calls;
      if (key == "connections") count = &limits.connections;
      if (count == nullptr && std::find(tiers.begin(), tiers.end(), key) == tiers.end())
        return wrong(absl::StrCat("unknown key \"", key, "\""));
      const absl::StatusOr<uint64_t> size = ParseSize(value);
      if (!size.ok()) return wrong(absl::StrCat(key, ": ", size.status().message()));
      (count != nullptr ? *count : limits.tier_bytes[key]) = *size;
    }
    if (tenant == "*") {
      quotas.others_ = limits;
    } else if (!quotas.tenants_.emplace(tenant, limits).second) {
      return wrong("the tenant has another text already");
    }
  }
  return quotas;
}

const TenantLimits& TenantQuotas::Of(const std::string& tenant) const {
  const auto found = tenants_.find(tenant);
  return found == tenants_.end() ? others_ : found->second;
}

absl::Status TenantAccount::CheckOneMore(uint64_t TenantAccount::*count, uint64_t limit, const char* what,
                                         const char* advice) const {
  if (this->*count < limit) return absl::OkStatus();
  return Refused(Refusal::kQuota, absl::ResourceExhaustedError(
                                      absl::StrCat("tenant '", tenant, "' has ", this->*count, " ", what,
                                                   ", and its quota is ", limit, "; ", advice)));
}

bool LeavesRoomForOthers(uint64_t own, uint64_t all, uint64_t limit) {
  const uint64_t kept = limit / 16;
  return all < limit - kept || (own < kept && all < limit);
}

std::shared_ptr<TenantAccount> TenantTable::Get(const std::string& tenant) {
  if (const auto found = accounts_.find(tenant); found != accounts_.end()) return found->second;
  if (accounts_.size() >= sweep_at_) {
    absl::erase_if(accounts_,
                   [](const auto& entry) { return IsEmpty(*entry.second) && entry.second.use_count() == 1; });
    sweep_at_ = std::max<size_t>(64, 2 * accounts_.size());
  }
  auto account = std::make_shared<TenantAccount>();
  account->tenant = tenant;
  account->limits = quotas_->Of(tenant);
  account->tier_bytes.resize(tiers_);
  accounts_.emplace(tenant, account);
  return account;
}

void TenantTable::TakeQuotas() {
  for (const auto& [tenant, account] : accounts_) account->limits = quotas_->Of(tenant);
}

std::vector<const TenantAccount*> TenantTable::All() const {
  std::vector<const TenantAccount*> all;
  for (const auto& [tenant, account] : accounts_)
    if (!IsEmpty(*account)) all.push_back(account.get());
  std::sort(all.begin(), all.end(),
            [](const TenantAccount* a, const TenantAccount* b) { return a->tenant < b->tenant; });
  return all;
}

}  // namespace kvtide
