#include "kernels/format/profile.h"

#include <gtest/gtest.h>

#include <set>

namespace kvtide {
namespace {

Profile Sample() {
  Profile profile;
  profile.shape = {2, 1, 64, 64};
  profile.k.resize(2);
  profile.k[0].mean = {1, 2, 3};
  profile.k[1].gain = {4, 5};
  return profile;
}

TEST(Profile, HashChangesWithEveryPartAndIsNeverZero) {
  std::set<uint64_t> hashes{0, HashProfile(Profile{}), HashProfile(Sample())};
  size_t count = 3;
  const auto differs = [&](Profile profile) {
    hashes.insert(HashProfile(profile));
    EXPECT_EQ(hashes.size(), ++count);
  };
  EXPECT_EQ(hashes.size(), count);
  Profile p = Sample();
  p.shape.layers = 3;
  differs(p);
  p = Sample();
  p.k[0].mean[2] = 3.0000002f;
  differs(p);
  p = Sample();
  std::swap(p.k[0].mean, p.k[0].gain);
  differs(p);
  p = Sample();
  std::swap(p.k[0], p.k[1]);
  differs(p);
  p = Sample();
  p.k[0].transform = {1};
  differs(p);
  p = Sample();
  p.k[0].widths = {6, 4};
  differs(p);
  p = Sample();
  p.v = p.k;
  p.k.clear();
  differs(p);
}

TEST(Profile, HashDependsOnContentsOnly) {
  Profile p = Sample();
  p.hash = 77;
  EXPECT_EQ(HashProfile(p), HashProfile(Sample()));
}

TEST(Profile, HeadsAreLayerMajor) {
  Profile p = Sample();
  p.shape = {2, 3, 64, 64};
  p.k.assign(6, {});
  p.k[5].mean = {9};
  EXPECT_EQ(p.key(1, 2).mean, std::vector<float>{9});
}

}  // namespace
}  // namespace kvtide
