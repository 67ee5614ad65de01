#include "daemon/cache/tier/s3_fifo_policy.h"

#include <algorithm>
#include <array>
#include <vector>

#include "kernels/base/check.h"

namespace kvtide {
namespace {

constexpr uint8_t kMostUses = 3;

class S3FifoPolicy : public EvictionPolicy {
 public:
  explicit S3FifoPolicy(const S3FifoOptions& options) : options_(options) {
    for (const uint32_t ring : {kSmall, kMain}) nodes_.push_back({ring, ring, 0, 0, false});
  }

  void Insert(RecordSlot record, Standing standing) override {
    const uint32_t node = NodeOf(record);
    if (node >= nodes_.size()) nodes_.resize(node + size_t{1});
    KVTIDE_CHECK(nodes_[node].next == kOut, "inserted twice: record ", record);
    nodes_[node] = {kOut, kOut, 0, 0, standing == Standing::kNew};
    Link(node);
  }
  void Touch(RecordSlot record) override {
    Node& node = Get(record);
    if (node.uses < kMostUses) node.uses++;
  }
  void Stand(RecordSlot record, Standing standing) override {
    Node& node = Get(record);
    if (node.small == (standing == Standing::kNew)) return;
    Requeue(NodeOf(record), standing == Standing::kNew);
  }
  void Count(RecordSlot record, int64_t blocks) override {
    Node& node = Get(record);
    node.blocks = static_cast<uint32_t>(static_cast<int64_t>(node.blocks) + blocks);
    blocks_[RingOf(node)] += blocks;
  }
  void Remove(RecordSlot record) override {
    Node& node = Get(record);
    KVTIDE_CHECK(node.blocks == 0, "record ", record, " leaves with ", node.blocks, " blocks");
    Unlink(NodeOf(record));
    node = {};
  }

  void Peek(absl::FunctionRef<bool(RecordSlot)> visit) const override {
    // New ones beyond their share, without those that were used: they are about to get into the main queue.
    int64_t beyond = Beyond();
    uint32_t rest = nodes_[kSmall].next;
    for (; beyond > 0 && rest != kSmall; rest = nodes_[rest].next) {
      beyond -= std::max<int64_t>(1, nodes_[rest].blocks);
      if (nodes_[rest].uses == 0 && !visit(RecordOf(rest))) return;
    }
    // Each round takes a use of what it passes over; what comes from the small queue is new here.
    for (uint8_t uses = 0; uses <= kMostUses; uses++) {
      for (uint32_t node = nodes_[kMain].next; node != kMain; node = nodes_[node].next)
        if (nodes_[node].uses == uses && !visit(RecordOf(node))) return;
      if (uses > 0) continue;
      for (uint32_t node = nodes_[kSmall].next; node != rest; node = nodes_[node].next)
        if (nodes_[node].uses > 0 && !visit(RecordOf(node))) return;
    }
    for (const bool used : {false, true})
      for (uint32_t node = rest; node != kSmall; node = nodes_[node].next)
        if ((nodes_[node].uses > 0) == used && !visit(RecordOf(node))) return;
  }

  // What came before it was passed over: because it was used, or because it cannot leave now.
  void Evict(RecordSlot record) override {
    const uint32_t evicted = NodeOf(record);
    const bool small = Get(record).small;
    if (small || Beyond() > 0) PassSmall(small ? evicted : kSmall);
    if (small) return;
    PassMain(evicted);
    nodes_[evicted].uses = 0;
  }

 private:
  static constexpr uint32_t kSmall = 0, kMain = 1, kFirst = 2, kOut = 0xffffffffu;
  struct Node {
    uint32_t previous = kOut, next = kOut;
    uint32_t blocks = 0;
    uint8_t uses = 0;
    bool small = false;
  };

  static uint32_t NodeOf(RecordSlot record) { return record + kFirst; }
  static RecordSlot RecordOf(uint32_t node) { return node - kFirst; }
  static uint32_t RingOf(const Node& node) { return node.small ? kSmall : kMain; }
  Node& Get(RecordSlot record) {
    const uint32_t node = NodeOf(record);
    KVTIDE_CHECK(node < nodes_.size() && nodes_[node].next != kOut, "not in the policy: record ", record);
    return nodes_[node];
  }
  // New blocks beyond their share.
  int64_t Beyond() const {
    const auto whole = static_cast<double>(blocks_[kSmall] + blocks_[kMain]);
    return blocks_[kSmall] - static_cast<int64_t>(whole * options_.small_share);
  }
  void Link(uint32_t node) {
    const uint32_t ring = RingOf(nodes_[node]), last = nodes_[ring].previous;
    nodes_[node].previous = last;
    nodes_[node].next = ring;
    nodes_[last].next = node;
    nodes_[ring].previous = node;
  }
  void Unlink(uint32_t node) {
    nodes_[nodes_[node].previous].next = nodes_[node].next;
    nodes_[nodes_[node].next].previous = nodes_[node].previous;
  }
  // Used ones at the front of the small queue, up to this one, get into the main queue.
  void PassSmall(uint32_t until) {
    while (nodes_[kSmall].next != until && nodes_[kSmall].next != kSmall) {
      const uint32_t node = nodes_[kSmall].next;
      if (nodes_[node].uses == 0 || (until == kSmall && Beyond() <= 0)) return;
      Requeue(node, false);
    }
  }
  // To the end of the other queue, unused so far.
  void Requeue(uint32_t node, bool small) {
    Unlink(node);
    blocks_[RingOf(nodes_[node])] -= nodes_[node].blocks;
    nodes_[node].small = small;
    nodes_[node].uses = 0;
    blocks_[RingOf(nodes_[node])] += nodes_[node].blocks;
    Link(node);
  }
  // Used ones at the front of the main queue go to its end, for a use.
  void PassMain(uint32_t until) {
    while (nodes_[kMain].next != until) {
      const uint32_t node = nodes_[kMain].next;
      if (nodes_[node].uses == 0) return;
      Unlink(node);
      nodes_[node].uses--;
      Link(node);
    }
  }

  const S3FifoOptions options_;
  std::vector<Node> nodes_;
  std::array<int64_t, 2> blocks_{};  // by queue
};

}  // namespace

std::unique_ptr<EvictionPolicy> MakeS3FifoPolicy(const S3FifoOptions& options) {
  return std::make_unique<S3FifoPolicy>(options);
}

}  // namespace kvtide
