#include "kernels/attention_state.h"

#include <gtest/gtest.h>

#include <cmath>

namespace kvtide {
namespace {

TEST(AttentionState, EmptyStatesChangeNothing) {
  float a[2] = {1, 2}, b[2] = {7, 8};
  float lse = 0.5f;
  MergeAttentionState(a, &lse, b, -INFINITY, 2);
  EXPECT_EQ(a[0], 1);
  EXPECT_EQ(lse, 0.5f);
  float empty_lse = -INFINITY;
  MergeAttentionState(b, &empty_lse, a, lse, 2);
  EXPECT_EQ(b[1], 2);
  EXPECT_EQ(empty_lse, 0.5f);
  float none = -INFINITY;
  MergeAttentionState(a, &none, b, -INFINITY, 2);
  EXPECT_EQ(none, -INFINITY);
}

TEST(AttentionState, WeighsByTheSumsBehindTheStates) {
  // Weights 1 and 3: log 1 and log 3.
  float a[1] = {4};
  const float b[1] = {8};
  float lse = 0;
  MergeAttentionState(a, &lse, b, std::log(3.0f), 1);
  EXPECT_NEAR(a[0], 7.0f, 1e-6f);
  EXPECT_NEAR(lse, std::log(4.0f), 1e-6f);
}

TEST(AttentionState, StandsLogitsFarApart) {
  float a[1] = {4};
  const float b[1] = {8};
  float lse = 1e4f;
  MergeAttentionState(a, &lse, b, -1e4f, 1);
  EXPECT_EQ(a[0], 4);
  EXPECT_EQ(lse, 1e4f);
}

}  // namespace
}  // namespace kvtide
