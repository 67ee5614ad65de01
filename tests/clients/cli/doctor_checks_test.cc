#include "clients/cli/ops/doctor_checks.h"

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {
namespace {

using testing::HasSubstr;

constexpr int64_t kGib = int64_t{1} << 30;

client::TierInfo Tier(const std::string& backend, int64_t bytes) { return {"t", backend, bytes}; }

TEST(DoctorChecks, Connection) {
  EXPECT_EQ(CheckConnection("unix:/x", absl::OkStatus()).verdict, Verdict::kOk);
  const Finding finding = CheckConnection("unix:/x", absl::UnavailableError("there is no socket /x"));
  EXPECT_EQ(finding.verdict, Verdict::kFail);
  EXPECT_THAT(finding.text, HasSubstr("no socket"));
  EXPECT_THAT(finding.advice, HasSubstr("--address"));
  EXPECT_EQ(CheckServing(false).verdict, Verdict::kFail);
}

// It is there: nobody has to start it.
TEST(DoctorChecks, ADaemonThatRefusesIsNotToBeStarted) {
  for (const absl::Status& status :
       {absl::UnauthenticatedError("the token is none"), absl::PermissionDeniedError("user 65534 may not"),
        absl::DeadlineExceededError("too late"), absl::ResourceExhaustedError("full"),
        absl::UnavailableError("no kvtided at a: it answers, but not in time"),
        absl::UnavailableError("no kvtided at a: Socket closed; does it speak TLS (--server-cert)?")}) {
    const Finding finding = CheckConnection("a:1", status);
    EXPECT_EQ(finding.verdict, Verdict::kFail);
    EXPECT_EQ(finding.advice.find("start it"), std::string::npos) << finding.advice;
    EXPECT_FALSE(finding.advice.empty());
  }
  EXPECT_THAT(CheckConnection("a", absl::UnavailableError("Connection refused; does it speak TLS?")).advice,
              HasSubstr("start it"));
  EXPECT_THAT(CheckConnection("a:1", absl::UnauthenticatedError("x")).advice, HasSubstr("--token-file"));
  EXPECT_THAT(CheckConnection("a:1", absl::PermissionDeniedError("x")).advice, HasSubstr("--allow"));
}

TEST(DoctorChecks, TellsWhatTheDaemonKnowsToBeWrong) {
  client::ServerStats stats;
  stats.troubles = {{"config", "the settings from before are used: no field x", 125, false},
                    {"device", "CUDA device 0 is lost", 5, true},
                    {"tokens", "", 5, false},
                    {"remote", "told by the check of the tier", 5, false}};
  const std::vector<Finding> findings = CheckContents(stats);
  ASSERT_EQ(findings.size(), 3u);
  EXPECT_EQ(findings[0].verdict, Verdict::kWarn);
  EXPECT_EQ(findings[0].text, "for 2:05: the settings from before are used: no field x");
  EXPECT_THAT(findings[0].advice, HasSubstr("kvtide config check"));
  EXPECT_EQ(findings[1].verdict, Verdict::kFail);
  EXPECT_THAT(findings[1].advice, HasSubstr("restart kvtided"));
  EXPECT_THAT(findings[2].text, HasSubstr("an admin sees more"));
}

TEST(DoctorChecks, Versions) {
  EXPECT_EQ(CheckVersions("0.1.0", "0.1.0").verdict, Verdict::kOk);
  EXPECT_EQ(CheckVersions("0.1.0", "0.2.0").verdict, Verdict::kWarn);
}

TEST(DoctorChecks, Ways) {
  client::DaemonWays ways;
  ways.devices = {"GPU-1", "GPU-2"};
  EXPECT_EQ(CheckWays(ways).verdict, Verdict::kOk);
  EXPECT_THAT(CheckWays(ways).text, HasSubstr("direct (the pool on GPU-1, GPU-2 can be mapped)"));
  ways.direct = absl::PermissionDeniedError("only an admin");
  EXPECT_EQ(CheckWays(ways).verdict, Verdict::kOk);
  EXPECT_THAT(CheckWays(ways).text, HasSubstr("shared memory; not direct: only an admin"));
  ways.shared_memory = absl::NotFoundError("nobody offers it");
  EXPECT_EQ(CheckWays(ways).verdict, Verdict::kWarn);
  EXPECT_THAT(CheckWays(ways).text, HasSubstr("no shared memory: nobody offers it"));
  EXPECT_EQ(CheckWays(client::ProbeWays("host:1")).verdict, Verdict::kOk);
}

TEST(DoctorChecks, Cpu) {
  const Finding fast = CheckCpu(" fpu sse4_2 avx2 fma f16c avx512f avx512bw avx512_vnni");
  EXPECT_EQ(fast.verdict, Verdict::kOk);
  EXPECT_THAT(fast.text, HasSubstr("avx512_vnni"));
  EXPECT_EQ(CheckCpu("fpu sse4_2").verdict, Verdict::kWarn);
  EXPECT_EQ(CheckCpu("avx2x").verdict, Verdict::kWarn);  // words, not parts of words
  EXPECT_EQ(CheckCpu("f16c").verdict, Verdict::kWarn);
  EXPECT_EQ(CheckCpu("fpu aes avx2 fma").text, "avx2 fma");
  const Finding grace = CheckCpu("fp asimd evtstrm aes pmull asimdhp asimddp sve");
  EXPECT_EQ(grace.verdict, Verdict::kOk);
  EXPECT_EQ(grace.text, "asimd asimddp aes");
  const Finding old = CheckCpu("fp asimd evtstrm crc32 cpuid");
  EXPECT_EQ(old.verdict, Verdict::kWarn);
  EXPECT_THAT(old.advice, HasSubstr("asimddp"));
}

TEST(DoctorChecks, HugePages) {
  EXPECT_EQ(CheckHugePages("always [madvise] never\n").text, "madvise");
  EXPECT_EQ(CheckHugePages("[always] madvise never\n").verdict, Verdict::kOk);
  EXPECT_EQ(CheckHugePages("always madvise [never]\n").verdict, Verdict::kWarn);
  EXPECT_EQ(CheckHugePages("").verdict, Verdict::kWarn);
  EXPECT_EQ(CheckHugePages("][").verdict, Verdict::kWarn);
}

TEST(DoctorChecks, LockedMemoryMattersWithAGpu) {
  EXPECT_EQ(CheckLockedMemory(std::nullopt, true).verdict, Verdict::kOk);
  EXPECT_EQ(CheckLockedMemory(8 << 20, false).verdict, Verdict::kOk);
  EXPECT_EQ(CheckLockedMemory(8 << 20, true).verdict, Verdict::kWarn);
}

TEST(DoctorChecks, Gpu) {
  GpuFacts none;
  none.found = absl::NotFoundError("no driver");
  none.driver_library = "cannot open";
  EXPECT_EQ(CheckGpu(none).verdict, Verdict::kOk);
  GpuFacts half = none;
  half.device_files = true;
  EXPECT_EQ(CheckGpu(half).verdict, Verdict::kFail);

  GpuFacts good;
  good.device_files = true;
  good.name = "NVIDIA H200";
  good.memory_bytes = 141 * kGib;
  good.cuda_version = 13000;
  EXPECT_EQ(CheckGpu(good).verdict, Verdict::kOk);
  EXPECT_THAT(CheckGpu(good).text, HasSubstr("CUDA 13.0"));
  GpuFacts old = good;
  old.cuda_version = 12040;
  EXPECT_EQ(CheckGpu(old).verdict, Verdict::kWarn);
  EXPECT_THAT(CheckGpu(old).text, HasSubstr("12.4"));
  GpuFacts no_compute = good;
  no_compute.driver_library = "libcuda.so.1: cannot open shared object file";
  EXPECT_EQ(CheckGpu(no_compute).verdict, Verdict::kFail);

  EXPECT_TRUE(CheckGpuUse(good, {Tier("cpu", kGib)}).has_value());
  EXPECT_FALSE(CheckGpuUse(good, {Tier("cuda:0", kGib), Tier("cpu", kGib)}).has_value());
  EXPECT_FALSE(CheckGpuUse(good, {}).has_value());
  EXPECT_FALSE(CheckGpuUse(none, {Tier("cpu", kGib)}).has_value());
}

TEST(DoctorChecks, MemoryAgainstTheTiers) {
  EXPECT_EQ(
      CheckMemory(16 * kGib, 8 * kGib, std::nullopt, {Tier("cpu", kGib), Tier("cpu", 8 * kGib)}).verdict,
      Verdict::kOk);
  EXPECT_EQ(CheckMemory(8 * kGib, 4 * kGib, std::nullopt, {Tier("cpu", 8 * kGib)}).verdict, Verdict::kFail);
  // GPU memory is no host memory.
  EXPECT_EQ(CheckMemory(8 * kGib, 4 * kGib, std::nullopt, {Tier("cuda:0", 80 * kGib)}).verdict, Verdict::kOk);
  // The container's limit counts, not the machine.
  const Finding limited = CheckMemory(64 * kGib, 60 * kGib, 4 * kGib, {Tier("cpu", 4 * kGib)});
  EXPECT_EQ(limited.verdict, Verdict::kFail);
  EXPECT_THAT(limited.text, HasSubstr("control group"));
  EXPECT_EQ(CheckMemory(8 * kGib, kGib / 4, std::nullopt, {}).verdict, Verdict::kWarn);
}

TEST(DoctorChecks, DiskAndContents) {
  EXPECT_EQ(CheckDisk("/run", kGib).verdict, Verdict::kOk);
  EXPECT_EQ(CheckDisk("/run", 0).verdict, Verdict::kWarn);
  client::ServerStats stats;
  client::TierStats tier;
  tier.name = "device";
  tier.capacity_bytes = 100;
  tier.used_bytes = 50;
  stats.tiers = {tier};
  ASSERT_EQ(CheckContents(stats).size(), 1u);
  EXPECT_EQ(CheckContents(stats)[0].verdict, Verdict::kOk);
  stats.tiers[0].used_bytes = 99;
  stats.checksum_failures = 1;
  stats.failed_moves = 2;
  stats.exhausted = 3;
  const std::vector<Finding> findings = CheckContents(stats);
  ASSERT_EQ(findings.size(), 4u);
  EXPECT_EQ(findings[0].verdict, Verdict::kWarn);
  EXPECT_EQ(findings[1].verdict, Verdict::kFail);
}

// What is short warns, with what to do; a client's mistakes are no business of the daemon's.
TEST(DoctorChecks, RefusedCallsSayWhatIsShort) {
  client::ServerStats stats;
  client::MethodStats method;
  method.method = "Append";
  method.calls = 200;
  stats.methods = {method};
  stats.refused = {{"queue_full", 20}, {"not_found", 7}, {"conflict", 1}};
  stats.refused_tenants = {{"acme", "queue_full", 19}, {"shop", "queue_full", 1}, {"acme", "conflict", 1}};
  stats.exhausted = 3;
  const std::vector<Finding> findings = CheckContents(stats);
  ASSERT_EQ(findings.size(), 2u);
  EXPECT_EQ(findings[0].verdict, Verdict::kWarn);
  EXPECT_EQ(findings[0].text, "20 calls since the start, 10 % of all: queue_full (acme 19, shop 1)");
  EXPECT_THAT(findings[0].advice, HasSubstr("--service-threads"));
  EXPECT_THAT(findings[0].advice, HasSubstr("reason=queue_full"));
  EXPECT_EQ(findings[1].verdict, Verdict::kOk);
  EXPECT_THAT(findings[1].text, HasSubstr("not_found 7, conflict 1"));
}

TEST(DoctorChecks, MemoryIsAsPlannedOrNot) {
  const auto verdict = [](const char* part, int64_t predicted, int64_t actual) {
    client::ServerStats stats;
    stats.memory = {{part, predicted, actual}};
    return CheckContents(stats)[0].verdict;
  };
  EXPECT_EQ(verdict("sequences", kGib, kGib), Verdict::kOk);
  EXPECT_EQ(verdict("sequences", kGib, kGib + kGib / 11), Verdict::kOk);
  EXPECT_EQ(verdict("sequences", kGib, kGib + kGib / 9), Verdict::kWarn);
  EXPECT_EQ(verdict("sequences", kGib, kGib - kGib / 9), Verdict::kWarn);
  EXPECT_EQ(verdict("sequences", kGib >> 10, kGib >> 9), Verdict::kOk) << "a few blocks wait to be sealed";
  EXPECT_EQ(verdict("host", 4 * kGib, kGib), Verdict::kOk) << "pages are taken as they are used";
  EXPECT_EQ(verdict("host", 4 * kGib, 5 * kGib), Verdict::kWarn);
  EXPECT_EQ(verdict("gpus", 4 * kGib, 5 * kGib), Verdict::kWarn);
  client::ServerStats stats;
  stats.memory = {{"gpus", 4 * kGib, 5 * kGib}};
  EXPECT_THAT(CheckContents(stats)[0].advice, HasSubstr("--margin"));
}

// What the alerts of deploy/prometheus wake somebody for, doctor finds as well.
TEST(DoctorChecks, FindsLostDataFaultsAndDroppedBlocks) {
  int64_t dropped_of_sequences = 0;
  const auto subjects = [&](const client::ServerStats& stats, Verdict verdict) {
    std::string text;
    for (const Finding& finding : CheckContents(stats, dropped_of_sequences))
      if (finding.verdict == verdict) text += finding.subject + ";";
    return text;
  };
  client::ServerStats stats;
  stats.methods = {{"Attend", 10, {{"NOT_FOUND", 1}}, 0, 0}};
  EXPECT_EQ(subjects(stats, Verdict::kOk), "errors;") << "a mistake of a client";
  EXPECT_FALSE(AnyFailed(CheckContents(stats)));
  stats.dropped_blocks = 4;
  EXPECT_EQ(subjects(stats, Verdict::kWarn), "") << "what was only cached made way";
  EXPECT_EQ(subjects(stats, Verdict::kOk), "dropped;errors;");
  dropped_of_sequences = 1;
  EXPECT_EQ(subjects(stats, Verdict::kWarn), "dropped;");
  stats.methods[0].failed.emplace_back("DATA_LOSS", 3);
  EXPECT_EQ(subjects(stats, Verdict::kFail), "data loss;");
  stats.methods[0].failed.emplace_back("INTERNAL", 1);
  EXPECT_EQ(subjects(stats, Verdict::kFail), "data loss;faults;");
  stats = {};
  stats.lost_blocks = 1;
  EXPECT_EQ(subjects(stats, Verdict::kFail), "data loss;");
}

TEST(DoctorChecks, RendersAndCounts) {
  const std::vector<Finding> findings = {{Verdict::kOk, "one", "fine", ""},
                                         {Verdict::kFail, "second", "broken", "mend it"}};
  const std::string text = RenderFindings(findings, Terminal(false, false, 80));
  EXPECT_THAT(text, HasSubstr("ok    one     fine\n"));
  EXPECT_THAT(text, HasSubstr("fail  second  broken\n"));
  EXPECT_THAT(text, HasSubstr("-> mend it"));
  EXPECT_THAT(text, HasSubstr("2 checks, 0 warnings, 1 failed"));
  EXPECT_TRUE(AnyFailed(findings));
  EXPECT_FALSE(AnyFailed({findings[0]}));
  const nlohmann::json json = nlohmann::json::parse(RenderFindingsJson(findings));
  EXPECT_EQ(json["ok"], false);
  EXPECT_EQ(json["findings"][1]["advice"], "mend it");
}

// Whatever is wrong, the reader learns what to do.
TEST(DoctorChecks, EveryComplaintHasAdvice) {
  GpuFacts half;
  half.device_files = true;
  half.found = absl::UnavailableError("x");
  for (const Finding& finding :
       {CheckConnection("a", absl::UnavailableError("x")), CheckServing(false), CheckVersions("1", "2"),
        CheckCpu(""), CheckHugePages("[never]"), CheckLockedMemory(0, true), CheckGpu(half),
        CheckMemory(0, 0, 0, {}), CheckDisk("/", 0)}) {
    EXPECT_NE(finding.verdict, Verdict::kOk) << finding.subject;
    EXPECT_FALSE(finding.advice.empty()) << finding.subject;
    EXPECT_FALSE(finding.text.empty()) << finding.subject;
  }
}

TEST(DoctorChecks, TheRemoteTierSaysWhatToDo) {
  client::RemoteStats remote;
  remote.server = "redis://cache:6379";
  remote.memory_limit_bytes = 1 << 30;
  remote.memory_policy = "allkeys-lru";
  EXPECT_EQ(CheckRemote(remote).verdict, Verdict::kOk);
  const auto expect = [](const client::RemoteStats& stats, Verdict verdict, const char* advice) {
    const Finding finding = CheckRemote(stats);
    EXPECT_EQ(finding.verdict, verdict) << finding.text;
    EXPECT_NE(finding.advice.find(advice), std::string::npos) << finding.advice;
  };
  client::RemoteStats changed = remote;
  changed.problem = "Connection refused";
  expect(changed, Verdict::kFail, "start the server");
  changed.problem = "WRONGPASS invalid username-password pair or user is disabled. (see remote_auth_file)";
  expect(changed, Verdict::kFail, "--remote-auth-file");
  changed = remote;
  changed.write_problem = "OOM command not allowed when used memory > 'maxmemory'.";
  expect(changed, Verdict::kWarn, "allkeys-lru");
  changed.write_problem = "NOPERM this user has no permissions";
  expect(changed, Verdict::kWarn, "--remote-write none");
  changed = remote;
  changed.damaged_blocks = 3;
  expect(changed, Verdict::kWarn, "--remote-prefix");
  changed = remote;
  changed.memory_limit_bytes = 0;
  expect(changed, Verdict::kWarn, "maxmemory");
  changed = remote;
  changed.memory_policy = "noeviction";
  expect(changed, Verdict::kWarn, "allkeys-lru");
}

}  // namespace
}  // namespace kvtide::cli
