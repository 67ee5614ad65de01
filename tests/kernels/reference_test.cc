// The yardstick itself, against numbers worked out by hand.
#include "kernels/cpu/reference.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

#include "kernels/format/page_codec.h"

namespace kvtide {
namespace {

// Two tokens of dim 16: K = e0 * {1, 2}, V = e1 * {10, 20}.
class ReferenceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    std::vector<float> k(2 * 16), v(2 * 16);
    k[0] = 1;
    k[16] = 2;
    v[1] = 10;
    v[17] = 20;
    EncodeHalf(layout_.pair().k, Side::kKey, layout_.k(), nullptr, k.data(), 2, bytes_.data());
    EncodeHalf(layout_.pair().v, Side::kValue, layout_.v(), nullptr, v.data(), 2,
               bytes_.data() + layout_.v_codes());
    run_.layout = &layout_;
    run_.blocks = {&block_, 1};
    run_.first_position = 5;
    run_.tokens = 2;
    q_[0] = 3;
    item_.runs = {&run_, 1};
    item_.q = q_.data();
    item_.queries = 1;
    item_.first_query_position = 6;
    item_.out = out_.data();
    item_.lse = &lse_;
    args_.heads = 1;
    args_.scale = 0.5f;
    args_.items = {&item_, 1};
  }
  const BlockLayout layout_{{1, 1, 16, 16}, ExactPair()};
  std::vector<std::byte> bytes_ = std::vector<std::byte>(layout_.block_bytes());
  std::byte* block_ = bytes_.data();
  BlockRun run_;
  AttendItem item_;
  AttendArgs args_;
  std::vector<float> q_ = std::vector<float>(16), out_ = std::vector<float>(16);
  float lse_ = 0;
};

TEST_F(ReferenceTest, WeighsValuesBySoftmaxOfScaledDots) {
  ASSERT_TRUE(ReferenceAttend(args_).ok());
  const double a = std::exp(1.5), b = std::exp(3.0);
  EXPECT_NEAR(out_[1], (10 * a + 20 * b) / (a + b), 1e-5);
  EXPECT_NEAR(lse_, std::log(a + b), 1e-6);
  EXPECT_EQ(out_[0], 0.0f);
}

TEST_F(ReferenceTest, MasksCapsAndCountsSinks) {
  item_.first_query_position = 5;  // sees the first token alone
  ASSERT_TRUE(ReferenceAttend(args_).ok());
  EXPECT_FLOAT_EQ(out_[1], 10);
  item_.first_query_position = 7;
  args_.window = 2;  // sees position 6 alone
  ASSERT_TRUE(ReferenceAttend(args_).ok());
  EXPECT_FLOAT_EQ(out_[1], 20);
  args_.softcap = 2;
  const float sink = 1;
  args_.sinks = &sink;
  ASSERT_TRUE(ReferenceAttend(args_).ok());
  const double w = std::exp(2 * std::tanh(1.5)), s = std::exp(1.0);
  EXPECT_NEAR(out_[1], 20 * w / (w + s), 1e-5);
  EXPECT_NEAR(lse_, std::log(w + s), 1e-6);
}

}  // namespace
}  // namespace kvtide
