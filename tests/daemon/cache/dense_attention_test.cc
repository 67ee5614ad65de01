// The reference against the definition once more, written as plainly as it can be.
#include "tests/daemon/cache/dense_attention.h"

#include <cmath>
#include <limits>
#include <random>

#include "gtest/gtest.h"
#include "kernels/format/page_order.h"

namespace kvtide::testing {
namespace {

struct Rows {
  Rows(std::mt19937& random, int64_t tokens, size_t row) {
    std::normal_distribution<float> normal;
    for (int64_t first = 0; first < tokens; first += kBlockTokens) {
      blocks.emplace_back(static_cast<size_t>(kBlockTokens) * row);
      for (float& x : blocks.back()) x = normal(random);
    }
    for (const std::vector<float>& block : blocks) pointers.push_back(block.data());
  }
  std::vector<std::vector<float>> blocks;
  std::vector<const float*> pointers;
};

// One output row and its log-sum-exp.
double OneRow(const DenseAttention& a, const Rows& k, const Rows& v, int64_t tokens, const float* q,
              int64_t position, int head, std::vector<double>* out) {
  const auto kv = static_cast<size_t>(head / (a.heads / a.kv_heads));
  const auto value = [&](const Rows& rows, int dim, int64_t token, int d) {
    const size_t at = (static_cast<size_t>(token % kBlockTokens) * static_cast<size_t>(a.kv_heads) + kv) *
                          static_cast<size_t>(dim) +
                      static_cast<size_t>(d);
    return static_cast<long double>(rows.blocks[static_cast<size_t>(token / kBlockTokens)][at]);
  };
  long double sum = a.sinks != nullptr ? std::exp(static_cast<long double>(a.sinks[head])) : 0.0L;
  std::vector<long double> sums(static_cast<size_t>(a.dim_v));
  for (int64_t t = 0; t < tokens; t++) {
    if (a.causal && t > position) continue;
    if (a.window > 0 && t <= position - a.window) continue;
    long double logit = 0;
    for (int d = 0; d < a.dim_k; d++) logit += static_cast<long double>(q[d]) * value(k, a.dim_k, t, d);
    logit *= static_cast<long double>(a.scale);
    if (a.softcap > 0)
      logit = static_cast<long double>(a.softcap) * std::tanh(logit / static_cast<long double>(a.softcap));
    const long double weight = std::exp(logit);
    sum += weight;
    for (int d = 0; d < a.dim_v; d++) sums[static_cast<size_t>(d)] += weight * value(v, a.dim_v, t, d);
  }
  out->assign(static_cast<size_t>(a.dim_v), 0.0);
  if (sum == 0) return -std::numeric_limits<double>::infinity();
  for (size_t d = 0; d < sums.size(); d++) (*out)[d] = static_cast<double>(sums[d] / sum);
  return static_cast<double>(std::log(sum));
}

TEST(DenseAttentionTest, IsWhatTheDefinitionSays) {
  std::mt19937 random(1);
  const std::vector<float> sinks = {0.5f, -1.0f, 30.0f, 2.0f, 0.0f, 1.0f};
  for (int round = 0; round < 400; round++) {
    const auto pick = [&](int below) { return static_cast<int>(random() % static_cast<uint32_t>(below)); };
    DenseAttention a;
    a.kv_heads = 1 + pick(2);
    a.heads = a.kv_heads * (1 + pick(3));
    a.dim_k = pick(2) == 0 ? 64 : 1 + pick(130);
    a.dim_v = pick(2) == 0 ? 64 : 1 + pick(130);
    a.scale = 1.0 / std::sqrt(static_cast<double>(a.dim_k));
    a.softcap = pick(2) == 0 ? 0 : 5;
    a.window = pick(2) == 0 ? 0 : 1 + pick(150);
    a.causal = pick(4) != 0;
    a.sinks = pick(3) == 0 ? sinks.data() : nullptr;
    const int64_t tokens = 1 + pick(200), queries = 1 + pick(9), first = pick(static_cast<int>(tokens) + 200);
    const Rows k(random, tokens, static_cast<size_t>(a.kv_heads * a.dim_k)),
        v(random, tokens, static_cast<size_t>(a.kv_heads * a.dim_v));
    std::vector<float> q(static_cast<size_t>(queries * a.heads * a.dim_k));
    std::normal_distribution<float> normal;
    for (float& x : q) x = normal(random);
    const AttentionResult result = AttendDense(a, k.pointers, v.pointers, tokens, q.data(), queries, first);
    ASSERT_EQ(result.lse.size(), static_cast<size_t>(queries * a.heads));
    ASSERT_EQ(result.out.size(), result.lse.size() * static_cast<size_t>(a.dim_v));
    for (size_t at = 0; at < result.lse.size(); at++) {
      std::vector<double> out;
      const double lse =
          OneRow(a, k, v, tokens, q.data() + at * static_cast<size_t>(a.dim_k),
                 first + static_cast<int64_t>(at) / a.heads, static_cast<int>(at) % a.heads, &out);
      if (std::isinf(lse)) {
        ASSERT_EQ(result.lse[at], -std::numeric_limits<float>::infinity());
      } else {
        ASSERT_NEAR(result.lse[at], lse, 1e-6 + std::fabs(lse) * 2e-7);
      }
      for (size_t d = 0; d < out.size(); d++)
        ASSERT_NEAR(result.out[at * out.size() + d], out[d], 1e-6 + std::fabs(out[d]) * 2e-7)
            << "round " << round << ", row " << at << ", value " << d;
    }
  }
}

// Blocks that no query sees need not be there.
TEST(DenseAttentionTest, DoesNotReadWhatTheWindowHasLeft) {
  std::mt19937 random(2);
  DenseAttention a;
  a.dim_k = a.dim_v = 64;
  a.window = 60;
  const Rows k(random, 200, 64), v(random, 200, 64);
  const std::vector<float> q(64, 0.5f);
  const AttentionResult whole = AttendDense(a, k.pointers, v.pointers, 200, q.data(), 1, 199);
  std::vector<const float*> some_k = k.pointers, some_v = v.pointers;
  some_k[0] = some_k[1] = some_v[0] = some_v[1] = nullptr;
  EXPECT_EQ(AttendDense(a, some_k, some_v, 200, q.data(), 1, 199).out, whole.out);
}

}  // namespace
}  // namespace kvtide::testing
