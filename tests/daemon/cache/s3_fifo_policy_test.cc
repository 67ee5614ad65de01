// The order of S3-FIFO: what is new and unused leaves first beyond its share, then the main queue's oldest
// that was not used; with records of one block it is the paper's algorithm, victim by victim.
#include "daemon/cache/tier/s3_fifo_policy.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <map>
#include <random>
#include <set>
#include <vector>

#include "gtest/gtest.h"
#include "tests/daemon/cache/policy_order.h"

namespace kvtide {
namespace {

using testing::Order;

void Add(EvictionPolicy& policy, RecordSlot record, Standing standing, int64_t blocks = 1) {
  policy.Insert(record, standing);
  policy.Count(record, blocks);
}
void Drop(EvictionPolicy& policy, RecordSlot record, int64_t blocks = 1) {
  policy.Evict(record);
  policy.Count(record, -blocks);
  policy.Remove(record);
}

using Slots = std::vector<RecordSlot>;

TEST(S3FifoPolicyTest, NewOnesBeyondTheirShareGoFirst) {
  const auto policy = MakeS3FifoPolicy({0.5});
  for (const RecordSlot used : {1u, 2u}) Add(*policy, used, Standing::kUsed);
  for (const RecordSlot fresh : {3u, 4u, 5u, 6u}) Add(*policy, fresh, Standing::kNew);
  // Three may be new: one goes, then those that were used before, then the rest.
  EXPECT_EQ(Order(*policy), (Slots{3, 1, 2, 4, 5, 6}));
  policy->Touch(1);
  EXPECT_EQ(Order(*policy), (Slots{3, 2, 1, 4, 5, 6}));
  // Asked for again while it is new: it gets into the main queue instead of leaving.
  policy->Touch(3);
  EXPECT_EQ(Order(*policy), (Slots{2, 3, 1, 4, 5, 6}));
  Drop(*policy, 2);
  EXPECT_EQ(Order(*policy), (Slots{4, 3, 1, 5, 6})) << "3 of 5 are new, and 4 is the oldest";
  int seen = 0;
  policy->Peek([&](RecordSlot) { return ++seen < 2; });
  EXPECT_EQ(seen, 2);
}

TEST(S3FifoPolicyTest, AUseIsASecondChanceOnce) {
  const auto policy = MakeS3FifoPolicy();
  for (const RecordSlot used : {1u, 2u, 3u}) Add(*policy, used, Standing::kUsed);
  policy->Touch(1);
  EXPECT_EQ(Order(*policy), (Slots{2, 3, 1}));
  Drop(*policy, 2);  // 1 was passed over
  EXPECT_EQ(Order(*policy), (Slots{3, 1}));
  Add(*policy, 2, Standing::kUsed);
  EXPECT_EQ(Order(*policy), (Slots{3, 1, 2})) << "what was passed over is no younger than what comes";
}

TEST(S3FifoPolicyTest, BlocksCountNotRecords) {
  const auto policy = MakeS3FifoPolicy({0.5});
  Add(*policy, 1, Standing::kUsed, 100);
  Add(*policy, 2, Standing::kNew, 10);
  Add(*policy, 3, Standing::kNew, 10);
  EXPECT_EQ(Order(*policy), (Slots{1, 2, 3})) << "few blocks are new";
  Add(*policy, 4, Standing::kNew, 100);
  EXPECT_EQ(Order(*policy), (Slots{2, 1, 3, 4}));
  policy->Count(1, -80);
  EXPECT_EQ(Order(*policy), (Slots{2, 3, 4, 1}));
}

TEST(S3FifoPolicyTest, AClosedSequenceIsNewAndStandsBehindOthers) {
  const auto policy = MakeS3FifoPolicy({0.5});
  for (const RecordSlot record : {1u, 2u, 3u}) Add(*policy, record, Standing::kUsed);
  policy->Stand(2, Standing::kNew);
  EXPECT_EQ(Order(*policy), (Slots{1, 3, 2}));
  policy->Stand(3, Standing::kNew);
  policy->Stand(3, Standing::kNew);
  EXPECT_EQ(Order(*policy), (Slots{2, 1, 3}));
  policy->Stand(2, Standing::kUsed);
  EXPECT_EQ(Order(*policy), (Slots{1, 2, 3}));
}

TEST(S3FifoPolicyTest, WhatCannotLeaveIsPassedOver) {
  const auto policy = MakeS3FifoPolicy({0.25});
  for (const RecordSlot record : {1u, 2u, 3u}) Add(*policy, record, Standing::kUsed);
  for (const RecordSlot record : {4u, 5u}) Add(*policy, record, Standing::kNew);
  Drop(*policy, 3);
  Drop(*policy, 5);
  EXPECT_EQ(Order(*policy), (Slots{4, 1, 2}));
}

// The paper's algorithm over single blocks.
class Paper {
 public:
  Paper(size_t capacity, double share) : capacity_(capacity), share_(share) {}
  bool Has(RecordSlot block) const { return uses_.contains(block); }
  void Hit(RecordSlot block) { uses_[block] = std::min(3, uses_[block] + 1); }
  void Insert(RecordSlot block, bool ghost) {
    uses_[block] = 0;
    (ghost ? main_ : small_).push_back(block);
  }
  bool Full() const { return uses_.size() >= capacity_; }
  RecordSlot Evict() {
    while (true) {
      const auto beyond = static_cast<int64_t>(small_.size()) -
                          static_cast<int64_t>(static_cast<double>(uses_.size()) * share_);
      std::deque<RecordSlot>& queue = beyond > 0 || main_.empty() ? small_ : main_;
      const RecordSlot block = queue.front();
      queue.pop_front();
      if (uses_[block] == 0) {
        uses_.erase(block);
        return block;
      }
      uses_[block] = &queue == &small_ ? 0 : uses_[block] - 1;
      main_.push_back(block);
    }
  }

 private:
  const size_t capacity_;
  const double share_;
  std::deque<RecordSlot> small_, main_;
  std::map<RecordSlot, int> uses_;
};

TEST(S3FifoPolicyTest, IsThePapersAlgorithmForSingleBlocks) {
  for (uint32_t seed = 1; seed <= 20; seed++) {
    std::mt19937 random(seed);
    const double share = seed % 2 == 0 ? 0.5 : 0.1;
    const size_t capacity = 20 + random() % 80;
    Paper paper(capacity, share);
    const auto policy = MakeS3FifoPolicy({share});
    size_t same = 0, evictions = 0;
    for (int step = 0; step < 20000; step++) {
      // A few blocks are asked for much more often than others.
      const auto block = static_cast<RecordSlot>(std::min<double>(
          999, 1000 * std::pow(static_cast<double>(random()) / static_cast<double>(random.max()), 4)));
      if (paper.Has(block)) {
        paper.Hit(block);
        policy->Touch(block);
        continue;
      }
      if (paper.Full()) {
        const RecordSlot victim = paper.Evict();
        evictions++;
        const RecordSlot mine = Order(*policy).front();
        same += mine == victim;
        ASSERT_EQ(mine, victim) << "seed " << seed << ", step " << step;
        Drop(*policy, victim);
      }
      const bool ghost = random() % 4 == 0;
      paper.Insert(block, ghost);
      Add(*policy, block, ghost ? Standing::kUsed : Standing::kNew);
    }
    EXPECT_GT(evictions, 1000u);
    EXPECT_EQ(same, evictions);
  }
}

TEST(S3FifoPolicyTest, RandomCallsShowEveryRecordOnce) {
  std::mt19937 random(5);
  const auto policy = MakeS3FifoPolicy();
  std::map<RecordSlot, int64_t> blocks;
  for (int step = 0; step < 20000; step++) {
    const RecordSlot id = random() % 40;
    const auto it = blocks.find(id);
    if (it == blocks.end()) {
      blocks[id] = 1 + random() % 9;
      Add(*policy, id, random() % 2 == 0 ? Standing::kNew : Standing::kUsed, blocks[id]);
    } else {
      switch (random() % 4) {
        case 0:
          policy->Touch(id);
          break;
        case 1:
          policy->Stand(id, random() % 2 == 0 ? Standing::kNew : Standing::kUsed);
          break;
        case 2:
          if (it->second == 1) break;
          policy->Evict(id);
          policy->Count(id, -1);
          it->second--;
          break;
        default:
          if (random() % 2 == 0) policy->Evict(id);
          policy->Count(id, -it->second);
          policy->Remove(id);
          blocks.erase(it);
      }
    }
    const std::vector<RecordSlot> order = Order(*policy);
    std::set<RecordSlot> shown(order.begin(), order.end());
    ASSERT_EQ(shown.size(), order.size());
    ASSERT_EQ(order.size(), blocks.size());
    for (const auto& [record, count] : blocks) ASSERT_TRUE(shown.contains(record));
  }
}

TEST(S3FifoPolicyDeathTest, WrongCallsStopTheProcess) {
  const auto policy = MakeS3FifoPolicy();
  Add(*policy, 1, Standing::kNew);
  EXPECT_DEATH(policy->Insert(1, Standing::kUsed), "inserted twice");
  EXPECT_DEATH(policy->Touch(2), "not in the policy");
  EXPECT_DEATH(policy->Remove(1), "leaves with 1 blocks");
}

}  // namespace
}  // namespace kvtide
