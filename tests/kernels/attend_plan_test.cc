// The cut of a launch into workers and slots, against a walk like the attention kernel's.
#include "kernels/cuda/attend/attend_plan.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <set>
#include <vector>

namespace kvtide::cuda {
namespace {

// Block tables that only their addresses matter of.
const std::byte* const* Table() {
  static const std::vector<const std::byte*> table(1u << 16);
  return table.data();
}

std::vector<AttendUnit> RandomUnits(std::mt19937& rng, int most_units, int most_pages) {
  std::vector<AttendUnit> units(1 + rng() % static_cast<unsigned>(most_units));
  for (AttendUnit& unit : units)
    unit.pages = static_cast<uint32_t>(1 + rng() % static_cast<unsigned>(most_pages));
  const uint32_t pages = NumberPages(&units);
  EXPECT_LE(pages, 1u << 16);
  for (AttendUnit& unit : units) unit.blocks = Table() + unit.first_page;
  return units;
}

uint32_t EndOf(const AttendUnit& unit) { return unit.first_page + unit.pages; }

// Slots written for each unit when every worker reads its pages: a state for each unit that ends before the
// worker's share does, and one for all workers of a CTA that end in its last unit.
std::vector<std::set<uint32_t>> WrittenSlots(const std::vector<AttendUnit>& units,
                                             const std::vector<AttendWorker>& workers, size_t warps) {
  std::vector<std::set<uint32_t>> written(units.size());
  std::set<uint32_t> all;
  const auto write = [&](size_t unit, size_t worker) {
    const auto slot = static_cast<uint32_t>(unit + worker);
    EXPECT_TRUE(all.insert(slot).second) << "slot " << slot << " is written twice";
    EXPECT_LT(slot, SlotCount(units.size(), workers.size()));
    written[unit].insert(slot);
  };
  for (size_t cta = 0; cta < workers.size(); cta += warps) {
    bool joined = false;
    for (size_t i = cta; i < cta + warps; i++) {
      const AttendWorker& worker = workers[i];
      EXPECT_EQ(worker.last_unit, workers[cta].last_unit);
      if (worker.begin == worker.end) continue;
      size_t unit = worker.unit;
      for (; EndOf(units[unit]) < worker.end; unit++) write(unit, i);
      if (unit != worker.last_unit) {
        write(unit, i);
      } else if (!joined) {
        joined = true;
        write(unit, i);
      }
    }
    EXPECT_TRUE(joined);
  }
  return written;
}

TEST(AttendPlan, WorkersCoverAllPagesOnce) {
  std::mt19937 rng(1);
  for (int round = 0; round < 500; round++) {
    const std::vector<AttendUnit> units = RandomUnits(rng, 40, round % 2 == 0 ? 4 : 200);
    const int ctas = 1 + static_cast<int>(rng() % 20), warps = 1 + static_cast<int>(rng() % kMostWarps);
    const std::vector<AttendWorker> workers = CutShares(units, ctas, warps);
    ASSERT_EQ(workers.size() % static_cast<size_t>(warps), 0u);
    ASSERT_LE(workers.size(), static_cast<size_t>(ctas * warps));
    uint32_t page = 0, least = ~0u, most = 0;
    for (const AttendWorker& worker : workers) {
      ASSERT_EQ(worker.begin, page);
      page = worker.end;
      least = std::min(least, worker.end - worker.begin);
      most = std::max(most, worker.end - worker.begin);
      if (worker.begin == worker.end) continue;
      const AttendUnit& unit = units[worker.unit];
      EXPECT_LE(unit.first_page, worker.begin);
      EXPECT_EQ(worker.unit_end, EndOf(unit));
      EXPECT_LT(worker.begin, worker.unit_end);
      EXPECT_EQ(worker.blocks, unit.blocks + (worker.begin - unit.first_page));
    }
    EXPECT_EQ(page, EndOf(units.back()));
    EXPECT_LE(most - least, 1u);
  }
}

TEST(AttendPlan, SlotsAreThoseThatTheKernelWrites) {
  std::mt19937 rng(2);
  for (int round = 0; round < 1000; round++) {
    const std::vector<AttendUnit> units = RandomUnits(rng, 40,
                                                      round % 3 == 0   ? 4
                                                      : round % 3 == 1 ? 30
                                                                       : 300);
    const int warps = 1 + static_cast<int>(rng() % kMostWarps);
    const std::vector<AttendWorker> workers = CutShares(units, 1 + static_cast<int>(rng() % 20), warps);
    const std::vector<std::set<uint32_t>> written = WrittenSlots(units, workers, static_cast<size_t>(warps));
    for (size_t unit = 0; unit < units.size(); unit++) {
      std::vector<uint32_t> slots;
      const uint32_t count = AppendSlots(units, unit, workers.size(), warps, &slots);
      EXPECT_EQ(count, slots.size());
      EXPECT_TRUE(std::is_sorted(slots.begin(), slots.end()));
      ASSERT_EQ(std::set<uint32_t>(slots.begin(), slots.end()), written[unit])
          << "round " << round << ", unit " << unit;
    }
  }
}

// A long unit costs one state for each CTA, and one more where it ends inside of a CTA.
TEST(AttendPlan, LongUnitsHaveFewSlots) {
  std::vector<AttendUnit> units(8);
  for (AttendUnit& unit : units) unit.pages = 2048, unit.blocks = Table();
  NumberPages(&units);
  const std::vector<AttendWorker> workers = CutShares(units, 132, 12);
  for (size_t unit = 0; unit < units.size(); unit++) {
    std::vector<uint32_t> slots;
    EXPECT_LE(AppendSlots(units, unit, workers.size(), 12, &slots), 17u + 12u);
  }
}

TEST(AttendPlan, CtasOfAJointLaunchFollowTheCosts) {
  EXPECT_EQ(ExactCtas(132, 0, 9000, 10, 33000), 132u);
  EXPECT_EQ(ExactCtas(132, 10, 9000, 0, 33000), 0u);
  EXPECT_EQ(ExactCtas(132, 1u << 20, 9000, 1, 33000), 1u);
  EXPECT_EQ(ExactCtas(132, 1, 9000, 1u << 20, 33000), 131u);
  EXPECT_EQ(ExactCtas(2, 1, 9000, 1u << 20, 33000), 1u);
  EXPECT_EQ(ExactCtas(100, 100, 17, 100, 17), 61u);  // 17 against 11
  std::mt19937 rng(3);
  for (int round = 0; round < 1000; round++) {
    const uint32_t ctas = 2 + rng() % 150, coded_bytes = 2000 + rng() % 40000,
                   exact_bytes = 5000 + rng() % 70000;
    const uint64_t coded = 1 + rng() % 100000, exact = 1 + rng() % 10000;
    const uint32_t share = ExactCtas(ctas, coded, coded_bytes, exact, exact_bytes);
    ASSERT_GE(share, 1u);
    ASSERT_LT(share, ctas);
    const double exact_cost = 17.0 * exact_bytes * static_cast<double>(exact),
                 coded_cost = (8.0 * coded_bytes + 3.0 * exact_bytes) * static_cast<double>(coded),
                 wanted = exact_cost / (exact_cost + coded_cost) * ctas;
    EXPECT_NEAR(share, std::clamp(wanted, 1.0, ctas - 1.0), 0.5 + 1e-9);
  }
}

TEST(AttendPlan, BothSourcesOfARowHaveWarps) {
  EXPECT_EQ(SecondSourceWarps(4, 16, 2), 1);
  EXPECT_EQ(SecondSourceWarps(4, 100, 1), 1);
  EXPECT_EQ(SecondSourceWarps(4, 9, 9), 2);
  EXPECT_EQ(SecondSourceWarps(4, 1, 100), 3);
  EXPECT_EQ(SecondSourceWarps(2, 1, 100), 1);
}

TEST(AttendPlan, JointTablesHoldTheSharesOfBothForms) {
  std::mt19937 rng(4);
  for (int round = 0; round < 200; round++) {
    const std::vector<AttendUnit> coded = RandomUnits(rng, 20, 100), exact = RandomUnits(rng, 20, 6);
    const int warps = 1 + static_cast<int>(rng() % kMostWarps),
              exact_warps = 1 + static_cast<int>(rng() % static_cast<unsigned>(warps));
    const std::vector<AttendWorker> of_coded = CutShares(coded, 1 + static_cast<int>(rng() % 20), warps),
                                    of_exact =
                                        CutShares(exact, 1 + static_cast<int>(rng() % 20), exact_warps);
    const std::vector<AttendWorker> table = JoinWorkers(of_coded, warps, of_exact, exact_warps);
    const size_t width = static_cast<size_t>(warps), exact_width = static_cast<size_t>(exact_warps),
                 coded_ctas = of_coded.size() / width, ctas = coded_ctas + of_exact.size() / exact_width;
    ASSERT_EQ(table.size(), ctas * width);
    for (size_t i = 0; i < table.size(); i++) {
      const AttendWorker& worker = table[i];
      const bool is_exact = i / width >= coded_ctas;
      const size_t cta = i / width - (is_exact ? coded_ctas : 0), warp = i % width;
      ASSERT_EQ(worker.exact, is_exact ? 1u : 0u);
      ASSERT_EQ(worker.cta, cta);
      if (is_exact && warp >= exact_width) {
        EXPECT_EQ(worker.begin, worker.end);
        continue;
      }
      const AttendWorker& own = is_exact ? of_exact[cta * exact_width + warp] : of_coded[i];
      EXPECT_EQ(worker.begin, own.begin);
      EXPECT_EQ(worker.end, own.end);
      EXPECT_EQ(worker.unit, own.unit);
      EXPECT_EQ(worker.last_unit, own.last_unit);
      EXPECT_EQ(worker.blocks, own.blocks);
    }
  }
}

}  // namespace
}  // namespace kvtide::cuda
