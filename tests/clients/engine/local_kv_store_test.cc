#include "clients/engine/local_kv_store.h"

#include <cmath>
#include <random>

#include "gtest/gtest.h"
#include "kernels/base/float16.h"

namespace kvtide::engine {
namespace {

struct Tokens {
  std::vector<float> q, k, v;
};

Tokens RandomTokens(const KvGeometry& g, int n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  Tokens t;
  t.q.resize(n * g.query_width());
  t.k.resize(n * g.kv_width());
  t.v.resize(n * g.kv_width());
  for (auto* values : {&t.q, &t.k, &t.v}) {
    for (float& x : *values) x = 2 * normal(random);
  }
  return t;
}

std::vector<float> Rounded(std::vector<float> x) {
  for (float& value : x) value = F16ToF32(F32ToF16(value));
  return x;
}

std::vector<double> Reference(const KvGeometry& g, int n, const Tokens& t) {
  const int d = g.head_dim, group = g.query_heads / g.kv_heads;
  std::vector<double> out(n * g.query_width(), 0.0);
  for (int p = 0; p < n; ++p) {
    const int first = g.sliding_window > 0 ? std::max(0, p - g.sliding_window + 1) : 0;
    for (int h = 0; h < g.query_heads; ++h) {
      std::vector<double> logit;
      double most = -1e300, total = 0;
      for (int s = first; s <= p; ++s) {
        double dot = 0;
        for (int c = 0; c < d; ++c)
          dot += static_cast<double>(t.q[p * g.query_width() + h * d + c]) *
                 t.k[s * g.kv_width() + h / group * d + c];
        logit.push_back(dot * g.scale());
        most = std::max(most, logit.back());
      }
      for (double& l : logit) total += l = std::exp(l - most);
      for (int s = first; s <= p; ++s) {
        for (int c = 0; c < d; ++c) {
          out[p * g.query_width() + h * d + c] +=
              logit[s - first] / total * t.v[s * g.kv_width() + h / group * d + c];
        }
      }
    }
  }
  return out;
}

std::vector<float> AppendAndAttend(LocalKvStore& store, SequenceId sequence, const Tokens& t, int from, int n,
                                   int chunk) {
  const KvGeometry& g = store.geometry();
  std::vector<float> out(n * g.query_width());
  for (int at = 0; at < n; at += chunk) {
    const int count = std::min(chunk, n - at);
    const absl::Status status = store.AppendAttend(
        sequence, 0, from + at, count, t.q.data() + at * g.query_width(), t.k.data() + at * g.kv_width(),
        t.v.data() + at * g.kv_width(), out.data() + at * g.query_width());
    EXPECT_TRUE(status.ok()) << status;
  }
  return out;
}

TEST(LocalKvStoreTest, AttendsAsTheDefinitionSays) {
  ThreadPool pool(2);
  for (const int window : {0, 1, 65, 300}) {
    const KvGeometry g{1, 6, 2, 40, window};
    for (const int chunk : {1, 33, 700}) {
      const Tokens t = RandomTokens(g, 700, /*seed=*/chunk);
      LocalKvStore store(g, DataType::kF32, pool);
      const std::vector<float> out = AppendAndAttend(store, store.CreateSequence().value(), t, 0, 700, chunk);
      const std::vector<double> expected = Reference(g, 700, t);
      for (size_t i = 0; i < out.size(); ++i)
        ASSERT_NEAR(out[i], expected[i], 1e-4) << "window " << window << ", chunk " << chunk << ", " << i;
    }
  }
}

TEST(LocalKvStoreTest, HalfStorageRoundsKeysAndValues) {
  ThreadPool pool(2);
  const KvGeometry g{1, 2, 1, 128, 0};
  Tokens t = RandomTokens(g, 130, /*seed=*/9);
  LocalKvStore store(g, DataType::kF16, pool);
  const std::vector<float> out = AppendAndAttend(store, store.CreateSequence().value(), t, 0, 130, 50);
  t.k = Rounded(t.k);
  t.v = Rounded(t.v);
  const std::vector<double> expected = Reference(g, 130, t);
  for (size_t i = 0; i < out.size(); ++i) ASSERT_NEAR(out[i], expected[i], 5e-5);
}

TEST(LocalKvStoreTest, ForksGrowApartAndTruncateForgets) {
  ThreadPool pool(2);
  const KvGeometry g{1, 2, 2, 32, 0};
  const Tokens start = RandomTokens(g, 100, /*seed=*/1), a = RandomTokens(g, 30, /*seed=*/2),
               b = RandomTokens(g, 30, /*seed=*/3);
  LocalKvStore store(g, DataType::kF32, pool);
  const SequenceId first = store.CreateSequence().value();
  AppendAndAttend(store, first, start, 0, 100, 100);
  const SequenceId second = store.Fork(first).value();
  const std::vector<float> on_first = AppendAndAttend(store, first, a, 100, 30, 30);
  const std::vector<float> on_second = AppendAndAttend(store, second, b, 100, 30, 30);
  ASSERT_TRUE(store.Truncate(first, 100).ok());
  EXPECT_EQ(AppendAndAttend(store, first, b, 100, 30, 30), on_second);
  ASSERT_TRUE(store.Truncate(second, 100).ok());
  EXPECT_EQ(AppendAndAttend(store, second, a, 100, 30, 30), on_first);
}

TEST(LocalKvStoreTest, RefusesAGapAndUnknownSequences) {
  ThreadPool pool(1);
  const KvGeometry g{2, 1, 1, 32, 0};
  const Tokens t = RandomTokens(g, 4, /*seed=*/1);
  LocalKvStore store(g, DataType::kF32, pool);
  const SequenceId sequence = store.CreateSequence().value();
  std::vector<float> out(4 * g.query_width());
  const auto append = [&](SequenceId id, int layer, int64_t start) {
    return store.AppendAttend(id, layer, start, 4, t.q.data(), t.k.data(), t.v.data(), out.data()).code();
  };
  EXPECT_EQ(append(sequence, 0, 1), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(append(sequence, 2, 0), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(append(sequence + 1, 0, 0), absl::StatusCode::kNotFound);
  EXPECT_TRUE(store.Close(sequence).ok());
  EXPECT_EQ(store.Close(sequence).code(), absl::StatusCode::kNotFound);
}

}  // namespace
}  // namespace kvtide::engine
