// The direct way on a GPU: kvtided in a process of its own holds the pool, this one maps it by CUDA IPC,
// writes, attends and seals over it on its own stream.
#include <cuda_runtime.h>
#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "tests/base/eventually.h"
#include "tests/clients/cpp/direct_script.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::testing {
namespace {

using absl::StatusCode;

void Cuda(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

class DeviceMemory : public EngineMemory {
 public:
  DeviceMemory() { Cuda(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  ~DeviceMemory() override {
    Clear();
    (void)cudaStreamDestroy(stream_);
  }
  void* stream() const override { return stream_; }
  void Set(float* data, std::span<const float> values) override {
    Cuda(cudaMemcpyAsync(data, values.data(), values.size_bytes(), cudaMemcpyHostToDevice, stream_));
  }
  float* Room(size_t count) override {
    void* data = nullptr;
    Cuda(cudaMalloc(&data, count * sizeof(float)));
    pieces_.push_back(data);
    return static_cast<float*>(data);
  }
  std::vector<float> Get(const float* data, size_t count) override {
    std::vector<float> values(count);
    Cuda(cudaMemcpyAsync(values.data(), data, count * sizeof(float), cudaMemcpyDeviceToHost, stream_));
    Cuda(cudaStreamSynchronize(stream_));
    return values;
  }
  void Replay(const std::function<void()>& work) override {
    if (graph_ == nullptr) {
      cudaGraph_t recorded = nullptr;
      Cuda(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
      work();
      Cuda(cudaStreamEndCapture(stream_, &recorded));
      Cuda(cudaGraphInstantiate(&graph_, recorded, 0));
      Cuda(cudaGraphDestroy(recorded));
    }
    Cuda(cudaGraphLaunch(graph_, stream_));
  }
  void Clear() override {
    Cuda(cudaStreamSynchronize(stream_));
    if (graph_ != nullptr) Cuda(cudaGraphExecDestroy(std::exchange(graph_, nullptr)));
    for (void* const piece : pieces_) (void)cudaFree(piece);
    pieces_.clear();
  }

 private:
  cudaStream_t stream_ = nullptr;
  cudaGraphExec_t graph_ = nullptr;
  std::vector<void*> pieces_;
};

client::PoolOptions OnGpu() {
  client::PoolOptions options;
  options.direct_device = "cuda:0";
  options.embedded_config = R"({"device": "cuda:0", "device_memory": "256MiB", "host_memory": "64MiB"})";
  return options;
}

std::unique_ptr<e2e::TestDaemon> GpuDaemon(const std::string& sharing = "ipc") {
  return e2e::TestDaemon::Start({"--device", "cuda:0", "--device-memory", "256MiB", "--host-memory", "64MiB",
                                 "--gpu-sharing", sharing});
}

std::unique_ptr<Pool> Connect(const std::string& address) {
  auto pool = Pool::Connect(address, OnGpu());
  EXPECT_TRUE(pool.ok()) << pool.status();
  return pool.ok() ? *std::move(pool) : nullptr;
}

// An engine in a process of its own, which works until it is killed.
pid_t StartWorker(std::string address) {
  const pid_t child = ::fork();
  if (child != 0) return child;
  // A fresh program: CUDA does not survive a fork.
  char self[] = "/proc/self/exe", flag[] = "--work";
  char* arguments[] = {self, flag, address.data(), nullptr};
  ::execv(self, arguments);
  ::_exit(127);
}

TEST(DirectGpu, StepsOverTheMappedPoolEqualThoseOfAnEmbeddedOneToTheBit) {
  const auto daemon = GpuDaemon();
  for (const char* const pair : {"turbo4/turbo3", "q8_0/turbo4", "f16/f16"}) {
    const auto direct = Connect("direct:" + daemon->address());
    ASSERT_NE(direct, nullptr);
    ASSERT_EQ(direct->way(), client::Way::kDirect);
    const DirectScriptOptions script{.pairs = {pair}, .seed = 1, .rounds = 30, .tolerance = 5e-3};
    const std::vector<float> answers = RunDirectScript(*direct, script, std::make_unique<DeviceMemory>());
    ASSERT_FALSE(HasFailure()) << pair;
    const auto embedded = Connect("embedded");
    const std::vector<float> expected = RunDirectScript(*embedded, script, std::make_unique<DeviceMemory>());
    ASSERT_EQ(answers.size(), expected.size());
    EXPECT_EQ(std::memcmp(answers.data(), expected.data(), answers.size() * sizeof(float)), 0) << pair;
    const auto stats = direct->GetStats();
    ASSERT_TRUE(stats.ok()) << stats.status();
    EXPECT_EQ(stats->stored_bytes, 0);
  }
}

// Small enough for compute-sanitizer.
TEST(DirectGpu, EmbeddedSmallStepsEqualTheModel) {
  const auto pool = Connect("embedded");
  ASSERT_NE(pool, nullptr);
  const char* const asked = std::getenv("KVTIDE_TEST_ROUNDS");
  RunDirectScript(*pool,
                  {.pairs = {"turbo4/turbo3"},
                   .seed = 11,
                   .rounds = asked != nullptr ? std::atoi(asked) : 10,
                   .tolerance = 5e-3},
                  std::make_unique<DeviceMemory>());
}

// Several pairs in one step: by calls, and as graphs that are captured over a mixed batch.
TEST(DirectGpu, MixedPairsEqualStepsOfEachPairAlone) {
  const auto daemon = GpuDaemon();
  for (const std::string& address : {"direct:" + daemon->address(), std::string("embedded")}) {
    for (const bool graphs : {false, true}) {
      const auto pool = Connect(address);
      ASSERT_NE(pool, nullptr);
      CheckMixedSteps(*pool,
                      {.pairs = {"turbo4/turbo3", "q8_0/turbo4", "f16/f16", "turbo2/turbo2"},
                       .graphs = graphs,
                       .steps = graphs ? 150 : 24},
                      std::make_unique<DeviceMemory>());
      ASSERT_FALSE(HasFailure()) << address << (graphs ? ", as graphs" : "");
    }
  }
}

TEST(DirectGpu, MixedPairsEqualTheModelAndTheDaemonsOwnBytes) {
  const auto daemon = GpuDaemon();
  const auto direct = Connect("direct:" + daemon->address());
  ASSERT_NE(direct, nullptr);
  RunDirectScript(
      *direct,
      {.pairs = {"turbo4/turbo3", "q8_0/turbo4", "f16/f16"}, .seed = 5, .rounds = 30, .tolerance = 5e-3},
      std::make_unique<DeviceMemory>());
}

// Small enough for compute-sanitizer.
TEST(DirectGpu, EmbeddedSmallMixedStepsEqualTheModel) {
  const auto pool = Connect("embedded");
  ASSERT_NE(pool, nullptr);
  const char* const asked = std::getenv("KVTIDE_TEST_ROUNDS");
  RunDirectScript(*pool,
                  {.pairs = {"turbo4/turbo3", "q8_0/turbo4"},
                   .seed = 12,
                   .rounds = asked != nullptr ? std::atoi(asked) : 10,
                   .tolerance = 5e-3},
                  std::make_unique<DeviceMemory>());
}

// The pool is mapped by file descriptors instead of CUDA IPC: the same answers, two engines at a time, a
// killed one leaves nothing, and memory comes back with the daemon.
TEST(DirectGpu, DescriptorsMapThePoolAsIpcDoes) {
  const DirectScriptOptions script{
      .pairs = {"turbo4/turbo3", "q8_0/turbo4"}, .seed = 21, .rounds = 20, .tolerance = 5e-3};
  std::vector<float> answers[2];
  size_t free[2] = {}, all = 0;
  for (int round = 0; round < 2; round++) {
    const auto daemon = GpuDaemon(round == 0 ? "ipc" : "descriptors");
    const auto pool = Connect("direct:" + daemon->address());
    ASSERT_NE(pool, nullptr);
    ASSERT_EQ(pool->way(), client::Way::kDirect);
    answers[round] = RunDirectScript(*pool, script, std::make_unique<DeviceMemory>());
    ASSERT_FALSE(HasFailure()) << round;
    Cuda(cudaMemGetInfo(&free[round], &all));
    const auto second = Connect("direct:" + daemon->address());
    ASSERT_NE(second, nullptr);
    RunDirectScript(*second, script, std::make_unique<DeviceMemory>());
    const auto stats = pool->GetStats();
    ASSERT_TRUE(stats.ok()) << stats.status();
    EXPECT_EQ(stats->stored_bytes, 0);
  }
  ASSERT_EQ(answers[0].size(), answers[1].size());
  EXPECT_EQ(std::memcmp(answers[0].data(), answers[1].data(), answers[0].size() * sizeof(float)), 0);
  EXPECT_NEAR(static_cast<double>(free[0]), static_cast<double>(free[1]), 64 << 20) << "a slab was left";
}

TEST(DirectGpu, DescriptorsSurviveAKilledEngine) {
  const auto daemon = GpuDaemon("descriptors");
  const auto watcher = daemon->Connect();
  const auto bystander = Connect("direct:" + daemon->address());
  ASSERT_NE(bystander, nullptr);
  DirectScript script(*bystander, {.pairs = {"turbo4/turbo3"}, .seed = 3, .tolerance = 5e-3},
                      std::make_unique<DeviceMemory>());
  script.Create();
  for (int round = 0; round < 2; round++) {
    const pid_t child = StartWorker(daemon->address());
    ASSERT_TRUE(Eventually([&] { return watcher->GetStats()->sequences > 2; }));
    ::kill(child, SIGKILL);
    EXPECT_EQ(e2e::WaitForExit(child, 30), 128 + SIGKILL);
    ASSERT_TRUE(Eventually([&] { return watcher->GetStats()->sequences == 1; })) << "round " << round;
    script.Steps(2);
    ASSERT_FALSE(HasFailure()) << "round " << round;
  }
  script.CheckBytes();
}

TEST(DirectGpu, TwoEnginesShareAPool) {
  const auto daemon = GpuDaemon();
  const auto a = Connect("direct:" + daemon->address()), b = Connect("direct:" + daemon->address());
  DirectScript first(*a, {.pairs = {"turbo4/turbo3"}, .seed = 5, .tolerance = 5e-3},
                     std::make_unique<DeviceMemory>());
  DirectScript second(*b, {.pairs = {"turbo4/turbo3"}, .seed = 6, .tolerance = 5e-3},
                      std::make_unique<DeviceMemory>());
  first.Create();
  second.Create();
  for (int i = 0; i < 10 && !HasFailure(); i++) {
    first.Steps(2);
    second.Steps(2);
  }
  first.CheckBytes();
  second.CheckBytes();
}

TEST(DirectGpu, AnotherDeviceAndAnotherWayAreToldApart) {
  const auto daemon = GpuDaemon();
  client::PoolOptions cpu = OnGpu();
  cpu.direct_device = "cpu";
  const absl::Status status = Pool::Connect("direct:" + daemon->address(), cpu).status();
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "the pool lies on GPU-")) << status;
  const auto best = Pool::Connect("auto:" + daemon->address(), OnGpu());
  ASSERT_TRUE(best.ok()) << best.status();
  EXPECT_EQ((*best)->way(), client::Way::kDirect);
}

TEST(DirectGpu, AKilledEngineLeavesNothingAndAKilledDaemonIsAnError) {
  const auto daemon = GpuDaemon();
  const auto watcher = daemon->Connect();
  std::mt19937 random(20260101);
  const char* const asked = std::getenv("KVTIDE_TEST_DEATHS");
  const int rounds = asked != nullptr ? std::atoi(asked) : 3;
  const auto bystander = Connect("direct:" + daemon->address());
  DirectScript script(*bystander, {.pairs = {"turbo4/turbo3"}, .seed = 3, .tolerance = 5e-3},
                      std::make_unique<DeviceMemory>());
  script.Create();
  for (int round = 0; round < rounds; round++) {
    const pid_t child = StartWorker(daemon->address());
    ASSERT_TRUE(Eventually([&] { return watcher->GetStats()->sequences > 2; }));
    absl::SleepFor(absl::Microseconds(random() % 50000));
    ::kill(child, SIGKILL);
    EXPECT_EQ(e2e::WaitForExit(child, 30), 128 + SIGKILL);
    ASSERT_TRUE(Eventually([&] { return watcher->GetStats()->sequences == 1; })) << "round " << round;
    script.Steps(2);
    ASSERT_FALSE(HasFailure()) << "round " << round;
  }
  script.CheckBytes();
  daemon->Kill();
  const client::StepItem item{script.ids()[0], 1};
  const absl::Status status = script.attention().Begin({&item, 1}, nullptr).status();
  EXPECT_EQ(status.code(), StatusCode::kUnavailable) << status;
  script.Abandon();
}

}  // namespace

// An engine that works until it is killed.
int WorkUntilKilled(const std::string& address) {
  auto pool = Pool::Connect("direct:" + address, OnGpu());
  if (!pool.ok()) return 1;
  for (uint32_t seed = 1; !::testing::Test::HasFailure(); seed++)
    RunDirectScript(**pool, {.pairs = {"turbo4/turbo3"}, .seed = seed, .tolerance = 5e-3},
                    std::make_unique<DeviceMemory>());
  return 1;
}

}  // namespace kvtide::testing

int main(int count, char** arguments) {
  ::testing::InitGoogleTest(&count, arguments);
  int devices = 0;
  if (cudaGetDeviceCount(&devices) != cudaSuccess || devices == 0) return 77;
  if (count == 3 && std::strcmp(arguments[1], "--work") == 0)
    return kvtide::testing::WorkUntilKilled(arguments[2]);
  return RUN_ALL_TESTS();
}
