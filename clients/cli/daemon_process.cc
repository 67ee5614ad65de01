#include "clients/cli/daemon_process.h"

#include <fcntl.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <cerrno>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {
namespace {

namespace fs = std::filesystem;

bool IsProgram(const fs::path& path) {
  std::error_code error;
  return fs::is_regular_file(path, error) && access(path.c_str(), X_OK) == 0;
}

// A folder that only this user can enter.
absl::StatusOr<std::string> MakePrivateFolder() {
  const char* base = std::getenv("TMPDIR");
  std::string pattern = absl::StrCat(base != nullptr && *base != '\0' ? base : "/tmp", "/kvtide-XXXXXX");
  // A Unix socket's path has at most 107 characters.
  if (pattern.size() > 90) pattern = "/tmp/kvtide-XXXXXX";
  if (mkdtemp(pattern.data()) == nullptr) {
    return absl::InternalError(absl::StrCat("cannot make a folder ", pattern, ": ", std::strerror(errno)));
  }
  return pattern;
}

absl::Status WriteConfig(const std::string& folder, const DaemonOptions& options) {
  nlohmann::json config = {{"listen", {"unix:" + folder + "/kvtided.sock"}},
                           {"device_tier_bytes", options.device_bytes},
                           {"host_tier_bytes", options.host_bytes},
                           {"metrics_address", options.metrics_address},
                           {"log_level", "warning"}};
  if (options.device_bytes == 0) config.erase("device_tier_bytes");
  if (!options.device.empty()) config["device"] = options.device;
  if (!options.disk.empty()) config["disk"] = options.disk;
  if (options.share_pool) config["share_pool"] = true;
  if (options.host_sharing) config["host_sharing"] = true;
  if (!options.shared_memory.empty())
    config["shared_memory"] = config["shared_memory_client"] = options.shared_memory;
  if (options.compute_threads > 0) config["compute_threads"] = options.compute_threads;
  std::ofstream out(folder + "/kvtided.json");
  out << config.dump(1) << "\n";
  out.close();
  return out ? absl::OkStatus() : absl::InternalError(absl::StrCat("cannot write ", folder, "/kvtided.json"));
}

}  // namespace

absl::StatusOr<std::string> FindDaemonProgram(const std::string& asked) {
  if (!asked.empty()) {
    if (IsProgram(asked)) return asked;
    return absl::NotFoundError(absl::StrCat("--kvtided ", asked, " is not a program"));
  }
  std::error_code error;
  const fs::path here = fs::read_symlink("/proc/self/exe", error).parent_path();
  std::vector<fs::path> places = {here / "kvtided"};
  // Programs of a build tree lie in folders like those of the sources.
  for (fs::path up = here; !up.empty() && up != up.root_path(); up = up.parent_path()) {
    places.push_back(up / "daemon" / "kvtided");
    if (fs::exists(up / "CMakeCache.txt", error)) break;
  }
  const char* path = std::getenv("PATH");
  for (std::string rest = path != nullptr ? path : ""; !rest.empty();) {
    const size_t colon = rest.find(':');
    if (colon != 0) places.push_back(fs::path(rest.substr(0, colon)) / "kvtided");
    rest = colon == std::string::npos ? "" : rest.substr(colon + 1);
  }
  for (const fs::path& place : places) {
    if (IsProgram(place)) return place.string();
  }
  return absl::NotFoundError(absl::StrCat("kvtided is neither beside ", here.string(),
                                          "/kvtide nor in PATH; name it with --kvtided"));
}

absl::StatusOr<std::unique_ptr<DaemonProcess>> DaemonProcess::Start(const DaemonOptions& options) {
  KVTIDE_ASSIGN_OR_RETURN(const std::string program, FindDaemonProgram(options.program));
  KVTIDE_ASSIGN_OR_RETURN(const std::string folder, MakePrivateFolder());
  KVTIDE_RETURN_IF_ERROR(WriteConfig(folder, options));
  const std::string config = folder + "/kvtided.json", log = folder + "/kvtided.log";
  const pid_t parent = getpid();
  const pid_t pid = fork();
  if (pid < 0) return absl::InternalError(absl::StrCat("cannot start a process: ", std::strerror(errno)));
  if (pid == 0) {
    // Only calls that are safe between fork and exec.
    prctl(PR_SET_PDEATHSIG, SIGTERM);
    if (getppid() != parent) _exit(126);
    const int out = open(log.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (out >= 0) {
      dup2(out, 1);
      dup2(out, 2);
    }
    // Its own process group: Ctrl-C reaches the command first, which then stops the daemon in order.
    setpgid(0, 0);
    execl(program.c_str(), program.c_str(), "--config", config.c_str(), static_cast<char*>(nullptr));
    _exit(127);
  }
  std::unique_ptr<DaemonProcess> daemon(new DaemonProcess(folder, pid));
  constexpr auto kPatience = std::chrono::seconds(20);
  const auto start = std::chrono::steady_clock::now();
  while (access((folder + "/kvtided.sock").c_str(), F_OK) != 0) {
    if (!daemon->running()) {
      return absl::InternalError(absl::StrCat(program, " stopped while starting: ", daemon->LogTail()));
    }
    if (std::chrono::steady_clock::now() - start > kPatience) {
      return absl::DeadlineExceededError(
          absl::StrCat(program, " did not open its socket: ", daemon->LogTail()));
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return daemon;
}

DaemonProcess::DaemonProcess(std::string folder, pid_t pid)
    : folder_(std::move(folder)), address_("unix:" + folder_ + "/kvtided.sock"), pid_(pid) {}

bool DaemonProcess::running() const {
  if (!reaped_ && waitpid(pid_, nullptr, WNOHANG) == pid_) reaped_ = true;
  return !reaped_;
}

bool DaemonProcess::EndsWithin(std::chrono::milliseconds patience) const {
  const auto until = std::chrono::steady_clock::now() + patience;
  while (running()) {
    if (std::chrono::steady_clock::now() >= until) return false;
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  return true;
}

std::string DaemonProcess::LogTail() const {
  std::ifstream in(folder_ + "/kvtided.log");
  const std::string text(std::istreambuf_iterator<char>(in), {});
  constexpr size_t kTail = 2000;
  return text.empty() ? "(it wrote nothing)" : text.substr(text.size() > kTail ? text.size() - kTail : 0);
}

DaemonProcess::~DaemonProcess() {
  if (running()) {
    kill(pid_, SIGTERM);
    if (!EndsWithin(std::chrono::seconds(10))) {
      kill(pid_, SIGKILL);
      waitpid(pid_, nullptr, 0);
    }
  }
  std::error_code error;
  fs::remove_all(folder_, error);
}

}  // namespace kvtide::cli
