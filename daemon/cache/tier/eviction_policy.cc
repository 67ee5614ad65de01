#include "daemon/cache/tier/eviction_policy.h"

#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace kvtide {
namespace {

// A doubly linked list through a vector that is indexed by record; node 0 is the ring's head, record r is
// node r + 1.
class LruPolicy : public EvictionPolicy {
 public:
  LruPolicy() : nodes_{{0, 0}} {}

  void Insert(RecordSlot record, Standing) override {
    if (record + size_t{2} > nodes_.size()) nodes_.resize(record + size_t{2}, {kOut, kOut});
    KVTIDE_CHECK(nodes_[record + 1].next == kOut, "inserted twice: record ", record);
    Link(record + 1);
  }
  void Touch(RecordSlot record) override {
    Unlink(record + 1);
    Link(record + 1);
  }
  void Peek(absl::FunctionRef<bool(RecordSlot)> visit) const override {
    for (uint32_t node = nodes_[0].next; node != 0; node = nodes_[node].next)
      if (!visit(node - 1)) return;
  }
  void Remove(RecordSlot record) override {
    Unlink(record + 1);
    nodes_[record + 1] = {kOut, kOut};
  }

 private:
  static constexpr uint32_t kOut = 0xffffffffu;
  struct Node {
    uint32_t previous, next;
  };

  void Link(uint32_t node) {
    const uint32_t last = nodes_[0].previous;
    nodes_[node] = {last, 0};
    nodes_[last].next = node;
    nodes_[0].previous = node;
  }
  void Unlink(uint32_t node) {
    KVTIDE_CHECK(node < nodes_.size() && nodes_[node].next != kOut, "not in the policy: record ", node - 1);
    nodes_[nodes_[node].previous].next = nodes_[node].next;
    nodes_[nodes_[node].next].previous = nodes_[node].previous;
  }

  std::vector<Node> nodes_;
};

}  // namespace

std::string NameOf(EvictionKind kind) { return kind == EvictionKind::kLru ? "lru" : "s3-fifo"; }

absl::StatusOr<EvictionKind> ParseEvictionKind(const std::string& name) {
  std::string known;
  for (const EvictionKind kind : AllEvictionKinds()) {
    if (NameOf(kind) == name) return kind;
    absl::StrAppend(&known, known.empty() ? "" : " or ", NameOf(kind));
  }
  return absl::InvalidArgumentError(absl::StrCat("eviction \"", name, "\" is unknown; use ", known));
}

std::span<const EvictionKind> AllEvictionKinds() {
  static constexpr EvictionKind kKinds[] = {EvictionKind::kLru, EvictionKind::kS3Fifo};
  return kKinds;
}

std::unique_ptr<EvictionPolicy> MakeLruPolicy() { return std::make_unique<LruPolicy>(); }

}  // namespace kvtide
