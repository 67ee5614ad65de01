#include "daemon/cache/tier/priority_order.h"

#include <algorithm>
#include <random>
#include <vector>

#include "daemon/cache/tier/s3_fifo_policy.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

constexpr Priority kLow = Priority::kLow, kNormal = Priority::kNormal, kHigh = Priority::kHigh;
const int kAcme = 1, kOther = 2;  // whose addresses name tenants

std::vector<RecordSlot> Order(const PriorityOrder& order) {
  std::vector<RecordSlot> records;
  order.Peek([&](RecordSlot record) {
    records.push_back(record);
    return true;
  });
  return records;
}
PriorityOrder Lru() {
  return PriorityOrder([] { return MakeLruPolicy(); });
}
void Add(PriorityOrder& order, RecordSlot record, Priority priority, const int* tenant = &kAcme,
         int64_t blocks = 1) {
  order.Insert(record, Standing::kUsed, tenant, priority);
  order.Count(record, blocks);
}
// Its blocks leave for lack of room.
void Evict(PriorityOrder& order, RecordSlot record, int64_t blocks = 1) {
  for (; blocks > 0; blocks--) {
    order.Evict(record);
    order.Count(record, -1);
  }
  order.Remove(record);
}

TEST(PriorityOrderTest, LowerPrioritiesGoFirstAndEachByThePolicy) {
  PriorityOrder order = Lru();
  Add(order, 7, kHigh);
  Add(order, 3, kNormal);
  Add(order, 5, kLow);
  Add(order, 1, kNormal);
  Add(order, 2, kHigh);
  Add(order, 9, kLow);
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{5, 9, 3, 1, 7, 2}));
  order.Touch(5);
  order.Touch(7);
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{9, 5, 3, 1, 2, 7}));
  EXPECT_EQ(order.blocks(kHigh), 2u);
  int seen = 0;
  order.Peek([&](RecordSlot) { return ++seen < 2; });
  EXPECT_EQ(seen, 2);
}

TEST(PriorityOrderTest, APriorityChanges) {
  PriorityOrder order = Lru();
  for (const RecordSlot record : {0u, 1u, 2u}) Add(order, record, kNormal, &kAcme, 4);
  order.SetPriority(0, kHigh);
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{1, 2, 0}));
  order.SetPriority(2, kLow);
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{2, 1, 0}));
  EXPECT_EQ(order.blocks(kLow), 4u);
  EXPECT_EQ(order.blocks(kNormal), 4u);
  order.SetPriority(0, kNormal);
  order.SetPriority(2, kNormal);
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{1, 0, 2}));
  EXPECT_EQ(order.blocks(kNormal), 12u);
}

// Nobody pushes others out by calling all that it has important.
TEST(PriorityOrderTest, PrioritiesCountAmongTheTenantsOwnRecordsOnly) {
  PriorityOrder order = Lru();
  Add(order, 0, kHigh, &kAcme);
  Add(order, 1, kNormal, &kOther);
  Add(order, 2, kHigh, &kAcme);
  Add(order, 3, kNormal, &kOther);
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{0, 1, 2, 3})) << "as without priorities";
  Add(order, 4, kLow, &kAcme);
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{4, 1, 0, 3, 2}))
      << "acme's turns are the first, third, last";
}

// Its own important records are no reason to take more from a tenant, either.
TEST(PriorityOrderTest, WhatGoesInAnothersTurnEndsThatTurn) {
  PriorityOrder order = Lru();
  Add(order, 0, kHigh, &kAcme, 2);
  Add(order, 1, kNormal, &kOther);
  Add(order, 2, kNormal, &kAcme);
  Add(order, 3, kNormal, &kAcme);
  Evict(order, 2);
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{1, 3, 0})) << "the next turn is the other tenant's";
  order.Count(3, -1);  // nobody evicted it
  order.Remove(3);
  Add(order, 2, kNormal, &kOther);
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{1, 0, 2}));
}

// What may not leave has no turn that others of its tenant could take.
TEST(PriorityOrderTest, WhatMayNotGoTakesNoTurn) {
  bool pinned = true;
  PriorityOrder order([] { return MakeLruPolicy(); },
                      [&](RecordSlot record) { return !pinned || record != 0; });
  Add(order, 0, kLow, &kAcme);
  Add(order, 1, kNormal, &kOther);
  Add(order, 2, kHigh, &kAcme);
  Add(order, 3, kNormal, &kOther);
  Add(order, 4, kNormal, &kAcme);
  const auto usable = [&] {
    std::vector<RecordSlot> records;
    order.Peek([](RecordSlot record) { return record != 0; },
               [&](RecordSlot record) {
                 records.push_back(record);
                 return true;
               });
    return records;
  };
  EXPECT_EQ(usable(), (std::vector<RecordSlot>{1, 4, 3, 2}));
  Evict(order, 4);
  EXPECT_EQ(usable(), (std::vector<RecordSlot>{1, 3, 2}))
      << "in the turn of record 2, which has the last one now";
  pinned = false;
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{0, 1, 3, 2})) << "record 0 has its own turn still";
}

// Whatever the priorities, each tenant loses as many records, and at the same times.
TEST(PriorityOrderTest, TenantsGiveAsMuchAsWithoutPriorities) {
  std::mt19937 random(3);
  for (int round = 0; round < 50; round++) {
    PriorityOrder with = Lru(), without = Lru();
    size_t records = 0;
    std::vector<int> names(3);
    RecordSlot next = 0;
    for (int step = 0; step < 300; step++) {
      if (random() % 2 == 0 || records == 0) {
        const int tenant = static_cast<int>(random() % names.size());
        records++;
        // The first tenant calls everything important, the second some, the third nothing.
        const Priority priority = tenant == 0   ? kHigh
                                  : tenant == 1 ? kAllPriorities[random() % kPriorities]
                                                : kNormal;
        Add(with, next, priority, &names[static_cast<size_t>(tenant)]);
        Add(without, next, kNormal, &names[static_cast<size_t>(tenant)]);
        next++;
        continue;
      }
      const RecordSlot victim = Order(with).front(), plain = Order(without).front();
      ASSERT_EQ(with.TenantOf(victim), without.TenantOf(plain));
      records--;
      Evict(with, victim);
      Evict(without, plain);
    }
  }
}

// Against lists that are sorted anew.
TEST(PriorityOrderTest, RandomCallsOfOneTenantAgreeWithLists) {
  std::mt19937 random(8);
  PriorityOrder order = Lru();
  std::vector<std::pair<RecordSlot, Priority>> list;  // by recency
  for (int step = 0; step < 5000; step++) {
    const RecordSlot record = random() % 60;
    const auto it =
        std::find_if(list.begin(), list.end(), [&](const auto& one) { return one.first == record; });
    const Priority priority = kAllPriorities[random() % kPriorities];
    if (it == list.end()) {
      Add(order, record, priority);
      list.emplace_back(record, priority);
    } else {
      const auto one = *it;
      list.erase(it);
      if (random() % 3 == 0) {
        order.Count(record, -1);
        order.Remove(record);
      } else if (random() % 2 == 0) {
        order.Touch(record);
        list.push_back(one);
      } else {
        if (priority == one.second) order.Touch(record);
        order.SetPriority(record, priority);
        list.emplace_back(record, priority);
      }
    }
    std::vector<RecordSlot> expected;
    for (const Priority level : kAllPriorities)
      for (const auto& [one, its] : list)
        if (its == level) expected.push_back(one);
    ASSERT_EQ(Order(order), expected);
  }
}

TEST(PriorityOrderTest, EachPriorityHasAnS3FifoOfItsOwn) {
  PriorityOrder order([] { return MakeS3FifoPolicy(); });
  for (const RecordSlot record : {0u, 1u, 2u, 3u}) {
    order.Insert(record, Standing::kNew, &kAcme, record < 2 ? kHigh : kNormal);
    order.Count(record, 1);
  }
  order.Touch(2);
  // Record 2 was asked for and goes on to the main queue, where it is the oldest.
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{2, 3, 0, 1}));
  Evict(order, 3);
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{2, 0, 1}));
  order.Stand(0, Standing::kUsed);
  EXPECT_EQ(Order(order), (std::vector<RecordSlot>{2, 0, 1})) << "the new one has its share";
}

}  // namespace
}  // namespace kvtide
