#include "daemon/cache/call/spec_hash.h"

#include <gtest/gtest.h>

#include <utility>
#include <vector>

#include "tests/daemon/cache/cache_fixture.h"

namespace kvtide::testing {
namespace {

// PegaFlow #367: two clients that differ in one of these must never share. LMCache #1842: equal ones must
// agree in every process (the numbers are frozen).
TEST(SpecHashTest, DiffersWithEveryPartAndIsTheSameInEveryProcess) {
  EXPECT_EQ(HashModel(SmallModel()), HashModel(SmallModel()));
  std::vector<ModelSpec> others(9, MixedModel());
  others[1].name = "other";
  others[2].groups[0].shape.head_dim_k = 64;
  others[3].groups[1].window = 101;
  others[4].groups[1].softcap = 0;
  others[5].groups[1].scale = 0.2f;
  others[6].groups[0].heads = 6;
  std::swap(others[7].layers[0], others[7].layers[1]);
  others[8].groups[1].shape.kv_heads = 4;
  for (size_t i = 0; i < others.size(); i++)
    for (size_t j = 0; j < i; j++) EXPECT_NE(HashModel(others[i]), HashModel(others[j])) << i << " " << j;
  EXPECT_NE(HashNameSpace("a"), HashNameSpace("b"));
  EXPECT_NE(HashLayout(BlockLayout({2, 2, 64, 64}, Pair("q8_0"))),
            HashLayout(BlockLayout({2, 2, 64, 64}, Pair("q5_0"))));
  EXPECT_EQ(HashNameSpace("tenant-1"), 7061958536135975107u);
  EXPECT_EQ(HashModel(SmallModel()), 11233260667790927134u);
}

}  // namespace
}  // namespace kvtide::testing
