#include "daemon/cache/eviction_policy.h"

#include "kernels/base/check.h"

namespace kvtide {
namespace {

// A doubly linked list through a vector that is indexed by block; node 0 is the ring's head, block b is node
// b + 1.
class LruPolicy : public EvictionPolicy {
 public:
  LruPolicy() : nodes_{{0, 0}} {}

  void Insert(BlockSlot block) override {
    if (block + size_t{2} > nodes_.size()) nodes_.resize(block + size_t{2}, {kOut, kOut});
    KVTIDE_CHECK(nodes_[block + 1].next == kOut, "inserted twice: block ", block);
    Link(block + 1);
  }
  void Touch(BlockSlot block) override {
    Unlink(block + 1);
    Link(block + 1);
  }
  void Peek(absl::FunctionRef<bool(BlockSlot)> visit) const override {
    for (uint32_t node = nodes_[0].next; node != 0; node = nodes_[node].next)
      if (!visit(node - 1)) return;
  }
  void Remove(BlockSlot block) override {
    Unlink(block + 1);
    nodes_[block + 1] = {kOut, kOut};
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
    KVTIDE_CHECK(node < nodes_.size() && nodes_[node].next != kOut, "not in the policy: block ", node - 1);
    nodes_[nodes_[node].previous].next = nodes_[node].next;
    nodes_[nodes_[node].next].previous = nodes_[node].previous;
  }

  std::vector<Node> nodes_;
};

}  // namespace

std::unique_ptr<EvictionPolicy> MakeLruPolicy() { return std::make_unique<LruPolicy>(); }

}  // namespace kvtide
