// Slots: objects stay where they are, and numbers are used again.
#include "daemon/cache/block/slots.h"

#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

TEST(Slots, NumbersAreUsedAgainAndObjectsStay) {
  Slots<int> slots;
  std::vector<const int*> where;
  std::set<uint32_t> taken;
  for (int i = 0; i < 1000; i++) {
    const uint32_t slot = slots.Take();
    EXPECT_TRUE(taken.insert(slot).second);
    slots[slot] = i;
    where.push_back(&slots[slot]);
  }
  EXPECT_EQ(slots.size(), 1000u);
  for (uint32_t slot = 0; slot < 1000; slot++) EXPECT_EQ(&slots[slot], where[slot]);
  for (const uint32_t slot : {7u, 256u, 999u}) slots.Give(slot);
  std::set<uint32_t> again;
  for (int i = 0; i < 3; i++) again.insert(slots.Take());
  EXPECT_EQ(again, (std::set<uint32_t>{7, 256, 999}));
  EXPECT_EQ(slots[256], 256) << "it keeps its value until it is written";
  EXPECT_EQ(slots.Take(), 1000u);
}

}  // namespace
}  // namespace kvtide
