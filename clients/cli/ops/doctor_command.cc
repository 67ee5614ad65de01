#include "clients/cli/ops/doctor_command.h"

#include <dlfcn.h>
#include <sys/resource.h>
#include <sys/statvfs.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <iterator>
#include <memory>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "clients/cli/ops/daemon_flags.h"
#include "clients/cli/ops/doctor_checks.h"
#include "clients/cli/ops/doctor_engine.h"
#include "clients/cli/ops/status_command.h"
#include "clients/cli/plan/plan_device.h"
#include "clients/cli/terminal/command_status.h"

namespace kvtide::cli {
namespace {

struct DoctorFlags {
  DaemonFlags daemon;
  std::string engine;
  std::string python = "python3";
  std::string output = "table";
};

std::string ReadFile(const char* path) {
  std::ifstream file(path);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

// The rest of the first line that begins with `key`.
std::string LineAfter(const std::string& text, const std::string& key) {
  size_t at = 0;
  while (at < text.size()) {
    const size_t end = std::min(text.find('\n', at), text.size());
    if (text.compare(at, key.size(), key) == 0) return text.substr(at + key.size(), end - at - key.size());
    at = end + 1;
  }
  return "";
}

int64_t MemoryTotal() {
  int64_t kib = 0;
  std::string value = LineAfter(ReadFile("/proc/meminfo"), "MemTotal:");
  value = value.substr(0, value.find("kB"));
  return absl::SimpleAtoi(value, &kib) ? kib * 1024 : 0;
}

// The memory limit of this process's container, if it has one (control groups v2, then v1).
std::optional<int64_t> MemoryLimit() {
  for (const char* path : {"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}) {
    int64_t bytes = 0;
    constexpr int64_t kNoLimit = int64_t{1} << 60;
    if (absl::SimpleAtoi(ReadFile(path), &bytes) && bytes < kNoLimit) return bytes;
  }
  return std::nullopt;
}

std::optional<int64_t> LockedMemoryLimit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_MEMLOCK, &limit) != 0 || limit.rlim_cur == RLIM_INFINITY) return std::nullopt;
  return static_cast<int64_t>(limit.rlim_cur);
}

// Asks the driver without any part of CUDA.
GpuFacts AskGpu() {
  GpuFacts facts;
  facts.device_files =
      access("/proc/driver/nvidia/version", F_OK) == 0 || access("/dev/nvidiactl", F_OK) == 0;
  const absl::StatusOr<planner::DeviceBudget> device = DetectDevice("auto:0");
  facts.found = device.status();
  if (device.ok()) {
    facts.name = device->name;
    facts.memory_bytes = device->vram_bytes;
  }
  void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) {
    const char* error = dlerror();
    facts.driver_library = error != nullptr ? error : "libcuda.so.1 cannot be opened";
    return facts;
  }
  const auto version = reinterpret_cast<int (*)(int*)>(dlsym(library, "cuDriverGetVersion"));
  if (version != nullptr && version(&facts.cuda_version) != 0) facts.cuda_version = 0;
  dlclose(library);
  return facts;
}

// Of the socket's folder, or its nearest parent that is there.
std::optional<Finding> SocketDisk(const std::string& address) {
  const std::string prefix = "unix:";
  if (address.compare(0, prefix.size(), prefix) != 0) return std::nullopt;
  std::string folder = address.substr(prefix.size());
  struct statvfs info {};
  do {
    folder = folder.substr(0, folder.rfind('/'));
    if (statvfs(folder.empty() ? "/" : folder.c_str(), &info) == 0) {
      return CheckDisk(folder.empty() ? "/" : folder,
                       static_cast<int64_t>(info.f_bavail) * static_cast<int64_t>(info.f_frsize));
    }
  } while (!folder.empty() && folder.find('/') != std::string::npos);
  return std::nullopt;
}

std::vector<Finding> Examine(const DaemonFlags& flags) {
  std::vector<Finding> findings;
  std::vector<client::TierInfo> tiers;
  const absl::StatusOr<std::unique_ptr<client::Client>> client = flags.Connect();
  absl::StatusOr<DaemonSnapshot> snapshot = client.ok() ? TakeSnapshot(**client) : client.status();
  findings.push_back(CheckConnection(flags.Address(), snapshot.status()));
  if (snapshot.ok()) {
    tiers = snapshot->info.tiers;
    findings.push_back(CheckServing(snapshot->serving));
    findings.push_back(CheckVersions(KVTIDE_VERSION, snapshot->info.version));
    findings.push_back(CheckWays(client::ProbeWays(flags.Address())));
    int64_t dropped = 0;
    for (const client::SequenceInfo& sequence : snapshot->sequences) dropped += sequence.dropped_blocks;
    for (Finding& finding : CheckContents(snapshot->stats, dropped)) findings.push_back(std::move(finding));
  }
  const GpuFacts gpu = AskGpu();
  findings.push_back(CheckGpu(gpu));
  if (std::optional<Finding> use = CheckGpuUse(gpu, tiers)) findings.push_back(*std::move(use));
  const std::string cpu = ReadFile("/proc/cpuinfo");
  findings.push_back(CheckCpu(LineAfter(cpu, "flags\t\t:") + LineAfter(cpu, "Features\t:")));
  findings.push_back(CheckMemory(MemoryTotal(), AvailableHostBytes(), MemoryLimit(), tiers));
  findings.push_back(CheckHugePages(ReadFile("/sys/kernel/mm/transparent_hugepage/enabled")));
  findings.push_back(CheckLockedMemory(LockedMemoryLimit(), gpu.found.ok()));
  if (std::optional<Finding> disk = SocketDisk(flags.Address())) findings.push_back(*std::move(disk));
  return findings;
}

}  // namespace

void AddDoctorCommand(CLI::App& app, int* exit_code) {
  auto flags = std::make_shared<DoctorFlags>();
  CLI::App* doctor = app.add_subcommand("doctor", "Check the daemon and this machine, and say what to do");
  doctor->footer(
      "Examples:\n"
      "  kvtide doctor\n"
      "  kvtide doctor --address unix:/run/kvtide/kvtided.sock --output json\n"
      "  kvtide doctor --engine vllm --python ~/vllm/bin/python3        and the engine that `kvtide connect` "
      "set up");
  flags->daemon.AddTo(doctor);
  doctor
      ->add_option("--engine", flags->engine,
                   "Check this engine too: vllm, sglang, transformers or llama.cpp")
      ->check(CLI::IsMember({"vllm", "sglang", "transformers", "llama.cpp"}));
  doctor->add_option("--python", flags->python, "The interpreter of the engine's environment")
      ->capture_default_str();
  doctor->add_option("--output", flags->output, "table or json")
      ->check(CLI::IsMember({"table", "json"}))
      ->capture_default_str();
  doctor->callback([flags, exit_code] {
    std::vector<Finding> findings = Examine(flags->daemon);
    if (!flags->engine.empty()) {
      for (Finding& finding : ExamineEngine(flags->engine, flags->python, flags->daemon.Address()))
        findings.push_back(std::move(finding));
    }
    const std::string text = flags->output == "json" ? RenderFindingsJson(findings)
                                                     : RenderFindings(findings, Terminal::Of(STDOUT_FILENO));
    Say(text);
    *exit_code = AnyFailed(findings) ? 1 : 0;
  });
}

}  // namespace kvtide::cli
