// What every remote tier has to do, as tests over a way to make one.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "daemon/cache/tier/remote_tier.h"
#include "gtest/gtest.h"

namespace kvtide::testing {

struct RemoteKind {
  const char* name;
  // Another tier over the same store, which is empty at first; `store` keeps it.
  std::function<std::function<std::unique_ptr<RemoteTier>()>(std::shared_ptr<void>* store)> make;
};

class RemoteConformance : public ::testing::TestWithParam<RemoteKind> {};

}  // namespace kvtide::testing
