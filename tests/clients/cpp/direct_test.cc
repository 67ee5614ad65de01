// The direct way on the CPU: a real kvtided whose first tier is mapped into this process, which writes,
// attends and seals over it; the same over an embedded pool. tests/gpu does so on GPUs.
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <random>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "clients/cpp/direct_attention.h"
#include "gtest/gtest.h"
#include "tests/base/eventually.h"
#include "tests/clients/cpp/direct_script.h"
#include "tests/clients/cpp/pool_script.h"

namespace kvtide::testing {
namespace {

using absl::StatusCode;

void ExpectError(const absl::Status& status, StatusCode code, const std::string& part) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), part)) << status << "\nexpected: " << part;
}

client::PoolOptions OnCpu() {
  client::PoolOptions options;
  options.direct_device = "cpu";
  options.direct_threads = 1;
  options.embedded_config =
      R"({"device": "cpu", "device_memory": "24MiB", "host_memory": "24MiB", "compute_threads": 1})";
  return options;
}

std::unique_ptr<e2e::TestDaemon> SharingDaemon() {
  return e2e::TestDaemon::Start(
      {"--device", "cpu", "--device-memory", "24MiB", "--host-memory", "24MiB", "--share-pool"}, 1);
}

std::unique_ptr<Pool> Connect(const std::string& address) {
  auto pool = Pool::Connect(address, OnCpu());
  EXPECT_TRUE(pool.ok()) << pool.status();
  return pool.ok() ? *std::move(pool) : nullptr;
}

TEST(Direct, StepsEqualTheModelOfTheCacheAndTheDaemonsOwnBytes) {
  const auto daemon = SharingDaemon();
  for (const std::string pair : {"turbo4/turbo3", "q8_0/turbo4", "f16/f16"}) {
    for (const uint32_t seed : {1u, 2u}) {
      const auto direct = Connect("direct:" + daemon->address()), embedded = Connect("embedded");
      ASSERT_EQ(direct->way(), client::Way::kDirect);
      const std::vector<float> answers = RunDirectScript(*direct, {.pair = pair, .seed = seed});
      ASSERT_FALSE(HasFailure()) << pair << " seed " << seed;
      EXPECT_EQ(answers, RunDirectScript(*embedded, {.pair = pair, .seed = seed}))
          << pair << " seed " << seed;
      const auto stats = direct->GetStats();
      ASSERT_TRUE(stats.ok()) << stats.status();
      EXPECT_EQ(stats->stored_bytes, 0);
      if (pair != "f16/f16") {
        EXPECT_GT(stats->sealed_blocks, 0);
      }
    }
  }
}

TEST(Direct, WhatIsNotMappedSaysWhy) {
  const auto plain = e2e::TestDaemon::Start();
  ExpectError(Pool::Connect("direct:" + plain->address(), OnCpu()).status(), StatusCode::kFailedPrecondition,
              "start kvtided with --share-pool");
  client::PoolOptions nowhere;
  ExpectError(Pool::Connect("direct:" + plain->address(), nowhere).status(), StatusCode::kInvalidArgument,
              "is no device on which an engine computes");
  const auto best = Connect("auto:" + plain->address());
  EXPECT_EQ(best->way(), client::Way::kSharedMemory);
  EXPECT_TRUE(absl::StrContains(best->why(), "not direct: ")) << best->why();
  ExpectError(client::DirectAttention::Make(best.get(), e2e::SmallModel(), {.pair = "f16/f16"}).status(),
              StatusCode::kFailedPrecondition, "this pool is not mapped (way: shared memory)");
  const auto sharing = SharingDaemon();
  EXPECT_EQ(Connect("auto:" + sharing->address())->way(), client::Way::kDirect);
  // Blocks of those who have mapped nothing are not written by themselves.
  const auto shared = Connect("shm:" + sharing->address());
  ASSERT_TRUE(shared->RegisterModel(e2e::SmallModel()).ok());
  ExpectError(client::DirectAttention::Make(shared.get(), e2e::SmallModel(), {.pair = "f16/f16"}).status(),
              StatusCode::kFailedPrecondition, "this pool is not mapped");
}

TEST(Direct, OnlyAnAdminMapsThePool) {
  if (::geteuid() != 0) GTEST_SKIP() << "needs to become somebody else";
  const auto daemon = e2e::TestDaemon::Start({"--share-pool", "--allow", "uid:4321"});
  ASSERT_EQ(std::system(("chmod 755 " + daemon->folder() + " " + daemon->folder() + "/run && chmod 666 " +
                         daemon->socket_path() + ".ring")
                            .c_str()),
            0);
  const pid_t child = ::fork();
  if (child == 0) {
    if (::setuid(4321) != 0) ::_exit(9);
    const auto status = Pool::Connect("direct:" + daemon->address(), OnCpu()).status();
    ::_exit(absl::IsPermissionDenied(status) && absl::StrContains(status.message(), "only an admin") ? 3 : 1);
  }
  EXPECT_EQ(e2e::WaitForExit(child, 60), 3);
}

TEST(Direct, MistakesAreNamedAndTheStepIsTakenBack) {
  const auto daemon = SharingDaemon();
  const auto pool = Connect("direct:" + daemon->address());
  const client::Model model = e2e::SmallModel();
  const auto make = [&](client::DirectOptions options) {
    return client::DirectAttention::Make(pool.get(), model, options);
  };
  ExpectError(make({.pair = "nothing"}).status(), StatusCode::kInvalidArgument, "DirectOptions::pair");
  ExpectError(make({.pair = "f16/f16", .max_sequences = 0}).status(), StatusCode::kInvalidArgument, "");
  auto attention =
      make({.pair = "q8_0/turbo4", .type = DataType::kF32, .max_sequences = 2, .max_sequence_tokens = 128});
  ASSERT_TRUE(attention.ok()) << attention.status();
  const auto id = pool->CreateSequence("small", {.pair = "q8_0/turbo4"});
  const auto other =
      pool->CreateSequence("small", {.pair = "turbo4/turbo4", .exact_window = ExactWindow{0, 0}});
  ASSERT_TRUE(id.ok() && other.ok());
  ASSERT_TRUE(pool->Append(*other, 0, e2e::Tokens(1, 0, 64).layers).ok());
  const auto begin = [&](std::vector<client::StepItem> items) { return (*attention)->Begin(items, nullptr); };
  ExpectError(begin({{*id, 3}}).status(), StatusCode::kInvalidArgument, "made for 2 and 2");
  ExpectError(begin({{*id, 0}}).status(), StatusCode::kInvalidArgument, "a step of 0 tokens");
  ExpectError(begin({{*other, 1}}).status(), StatusCode::kInvalidArgument,
              "blocks are coded as turbo4/turbo4");
  ExpectError((*attention)->Write(9, {}, {}, nullptr), StatusCode::kInvalidArgument, "layer 9 of 2");
  ASSERT_TRUE(pool->Append(*id, 0, e2e::Tokens(1, 0, 128).layers).ok());
  ExpectError(begin({{*id, 1}}).status(), StatusCode::kInvalidArgument, "max_sequence_tokens is 128");
  ASSERT_TRUE(pool->TruncateSequence(*id, 100).ok()) << "the steps before were taken back";
  auto step = begin({{*id, 1}});
  ASSERT_TRUE(step.ok()) << step.status();
  ExpectError((*attention)->End(*std::move(step)), StatusCode::kFailedPrecondition, "the step has no mark");
}

// All that a sequence has goes up to the first tier before it is attended there.
TEST(Direct, WhatLiesBelowIsBroughtUp) {
  const auto daemon = SharingDaemon();
  const auto pool = Connect("direct:" + daemon->address());
  DirectScript script(*pool, {.pair = "turbo4/turbo3", .seed = 7});
  script.Create();
  for (int i = 0; i < 20; i++) {
    script.Steps(1);
    const auto moved = pool->EvictSequences(script.ids());
    ASSERT_TRUE(moved.ok()) << moved.status();
    if (i > 2) {
      EXPECT_GT(moved->blocks, 0);
    }
    ASSERT_FALSE(HasFailure()) << i;
  }
}

[[noreturn]] void WorkUntilKilled(const std::string& address, uint32_t seed) {
  auto pool = Pool::Connect("direct:" + address, OnCpu());
  if (!pool.ok()) ::_exit(1);
  for (; !::testing::Test::HasFailure(); seed += 1000)
    RunDirectScript(**pool, {.pair = "turbo4/turbo3", .seed = seed});
  ::_exit(1);
}

TEST(Direct, AKilledEngineLeavesNothingAndAKilledDaemonIsAnError) {
  const char* const asked = std::getenv("KVTIDE_TEST_DEATHS");
  const int rounds = asked != nullptr ? std::atoi(asked) : 5;
  const auto daemon = SharingDaemon();
  const auto watcher = daemon->Connect();
  std::mt19937 random(20260101);
  for (int round = 0; round < rounds; round++) {
    const pid_t child = ::fork();
    if (child == 0) WorkUntilKilled(daemon->address(), static_cast<uint32_t>(round));
    ASSERT_TRUE(Eventually([&] { return watcher->GetStats()->sequences > 0; }));
    absl::SleepFor(absl::Microseconds(random() % 20000));
    ::kill(child, SIGKILL);
    EXPECT_EQ(e2e::WaitForExit(child, 30), 128 + SIGKILL);
    ASSERT_TRUE(Eventually([&] {
      const auto stats = watcher->GetStats();
      return stats.ok() && stats->sequences == 0 &&
             stats->tiers[0].used_bytes + stats->tiers[1].used_bytes == 0;
    })) << "round "
        << round;
  }
  const auto pool = Connect("direct:" + daemon->address());
  DirectScript script(*pool, {.pair = "turbo4/turbo3", .seed = 3});
  script.Create();
  script.Steps(1);
  daemon->Kill();
  // The mapped memory stays; the next step says what has happened.
  const client::StepItem item{script.ids()[0], 1};
  ExpectError(script.attention().Begin({&item, 1}, nullptr).status(), StatusCode::kUnavailable,
              "connect again");
  script.Abandon();
}

}  // namespace
}  // namespace kvtide::testing
