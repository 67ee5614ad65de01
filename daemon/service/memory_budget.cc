#include "daemon/service/memory_budget.h"

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/refusal.h"

namespace kvtide::service {

absl::Status MemoryBudget::Hold::Add(int64_t bytes) {
  const int64_t of_caller = account_->held_.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  if (of_caller > budget_->limit_of_a_caller_) {
    account_->held_.fetch_sub(bytes, std::memory_order_relaxed);
    return Refused(Refusal::kCallMemory,
                   absl::ResourceExhaustedError(absl::StrCat(
                       "the calls of this connection would hold ", of_caller,
                       " bytes of requests and answers, allowed are ", budget_->limit_of_a_caller_,
                       "; read the answers that are there, or send less at once")));
  }
  const int64_t of_all = budget_->held_.fetch_add(bytes, std::memory_order_relaxed) + bytes;
  if (of_all > budget_->limit_) {
    budget_->held_.fetch_sub(bytes, std::memory_order_relaxed);
    account_->held_.fetch_sub(bytes, std::memory_order_relaxed);
    return Refused(Refusal::kCallMemory, absl::ResourceExhaustedError(absl::StrCat(
                                             "the calls of all clients would hold ", of_all,
                                             " bytes of requests and answers, call_memory allows ",
                                             budget_->limit_, "; try again later, or raise it")));
  }
  bytes_ += bytes;
  return absl::OkStatus();
}

void MemoryBudget::Hold::Drop(int64_t bytes) {
  bytes_ -= bytes;
  budget_->held_.fetch_sub(bytes, std::memory_order_relaxed);
  account_->held_.fetch_sub(bytes, std::memory_order_relaxed);
}

}  // namespace kvtide::service
