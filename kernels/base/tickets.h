// Tickets for work that goes on elsewhere (copies): issued when it is handed over, finished with its status,
// forgotten when whoever holds one has heard of the end. Not thread-safe: the owner's mutex guards it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <unordered_map>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"

namespace kvtide {

class TicketBook {
 public:
  using Ticket = uint64_t;  // never 0, never used again

  // `most` tickets may be open, which is issued and not yet polled to the end.
  explicit TicketBook(size_t most) : most_(most) {}

  // ResourceExhausted if as many are open as may be.
  absl::StatusOr<Ticket> Issue() {
    if (open_.size() >= most_)
      return absl::ResourceExhaustedError(absl::StrCat(
          open_.size(), " copies are under way or not yet polled to their end, the limit is ", most_));
    open_.emplace(next_, std::nullopt);
    return next_++;
  }

  // The work of an open ticket is done, or has failed.
  void Finish(Ticket ticket, absl::Status status) {
    if (const auto found = open_.find(ticket); found != open_.end()) found->second = std::move(status);
  }

  // False while the work goes on; true, or its error, once when it has ended; InvalidArgument afterwards.
  absl::StatusOr<bool> Poll(Ticket ticket) {
    const auto found = open_.find(ticket);
    if (found == open_.end())
      return absl::InvalidArgumentError(
          absl::StrCat("copy ticket ", ticket, " is unknown or was polled to its end"));
    if (!found->second.has_value()) return false;
    const absl::Status status = *std::move(found->second);
    open_.erase(found);
    if (!status.ok()) return status;
    return true;
  }

  size_t open() const { return open_.size(); }

 private:
  const size_t most_;
  std::unordered_map<Ticket, std::optional<absl::Status>> open_;
  Ticket next_ = 1;
};

}  // namespace kvtide
