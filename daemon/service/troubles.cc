#include "daemon/service/troubles.h"

#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace kvtide::service {
namespace {

constexpr absl::Duration kBetweenLines = absl::Seconds(10);

}  // namespace

void Troubles::Set(Trouble what, const std::string& text, bool ends_service, absl::Time now) {
  const std::string name = kTroubleNames[static_cast<size_t>(what)];
  std::string line;
  {
    const MutexLock lock(mutex_);
    Known& known = known_[static_cast<size_t>(what)];
    known.ends_service = ends_service;
    if (known.text == text && known.told_text == text) return;
    const bool begins = known.text.empty(), ends = text.empty();
    if (ends) {
      line = absl::StrCat("trouble=", name, " is over after=",
                          absl::FormatDuration(absl::Trunc(now - known.since, absl::Seconds(1))));
    } else if (begins || now - known.told >= kBetweenLines) {
      line = absl::StrCat("trouble=", name, " problem=\"", absl::Utf8SafeCHexEscape(text), "\"");
      known.told = now;
    }
    if (!line.empty()) known.told_text = text;
    if (begins) known.since = now;
    known.text = text;
  }
  if (write_ && !line.empty()) write_(text.empty() ? "info" : ends_service ? "error" : "warning", line);
}

uint32_t Troubles::Bits() const {
  const MutexLock lock(mutex_);
  uint32_t bits = 0;
  for (size_t i = 0; i < known_.size(); i++) bits |= known_[i].text.empty() ? 0 : uint32_t{1} << i;
  return bits;
}

bool Troubles::EndService() const {
  const MutexLock lock(mutex_);
  for (const Known& known : known_)
    if (!known.text.empty() && known.ends_service) return true;
  return false;
}

std::string Troubles::TextOf(Trouble what) const {
  const MutexLock lock(mutex_);
  return known_[static_cast<size_t>(what)].text;
}

void Troubles::ToProto(const Identity& caller, absl::Time now, v1::GetStatsResponse* proto) const {
  const MutexLock lock(mutex_);
  for (size_t i = 0; i < known_.size(); i++) {
    const Known& known = known_[i];
    if (known.text.empty()) continue;
    v1::Trouble* const out = proto->add_troubles();
    out->set_what(kTroubleNames[i]);
    if (caller.admin) out->set_text(known.text);
    out->set_seconds(absl::ToDoubleSeconds(now - known.since));
    out->set_ends_service(known.ends_service);
  }
}

}  // namespace kvtide::service
