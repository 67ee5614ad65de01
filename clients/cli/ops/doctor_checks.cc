#include "clients/cli/ops/doctor_checks.h"

#include <algorithm>
#include <cstdlib>
#include <map>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "clients/cli/terminal/json_text.h"
#include "nlohmann/json.hpp"
#include "planner/units.h"

namespace kvtide::cli {
namespace {

using planner::FormatBytes;
using planner::kGiB;
using planner::kMiB;

Finding Ok(std::string subject, std::string text) {
  return {Verdict::kOk, std::move(subject), std::move(text), ""};
}
Finding Warn(std::string subject, std::string text, std::string advice) {
  return {Verdict::kWarn, std::move(subject), std::move(text), std::move(advice)};
}
Finding Fail(std::string subject, std::string text, std::string advice) {
  return {Verdict::kFail, std::move(subject), std::move(text), std::move(advice)};
}

const char* Name(Verdict verdict) {
  switch (verdict) {
    case Verdict::kOk:
      return "ok";
    case Verdict::kWarn:
      return "warn";
    case Verdict::kFail:
      return "fail";
  }
  return "";
}

bool OnCpu(const client::TierInfo& tier) { return tier.backend.rfind("cuda", 0) != 0; }

// A daemon that answers is there: who starts another one has two.
const char* ConnectionAdvice(const absl::Status& status) {
  const auto says = [&](const char* words) { return absl::StrContains(status.message(), words); };
  if (absl::IsUnauthenticated(status))
    return "it runs, but does not know you: give the token of your tenant (--token-file, "
           "$KVTIDE_TOKEN_FILE), "
           "or have its operator add one to kvtided's tokens and reload";
  if (absl::IsPermissionDenied(status))
    return "it runs, but does not let this user in: become one that it does (sudo -u kvtide kvtide doctor), "
           "or "
           "have its operator name you (kvtided --allow)";
  if (absl::IsInvalidArgument(status)) return "mend the flag or variable that is named";
  if (absl::IsDeadlineExceeded(status) || absl::IsResourceExhausted(status) || says("it answers"))
    return "it runs, but is busy or full: try again with --timeout 60; its log has slow and refused calls";
  if (says("TLS") && !says("Connection refused"))
    return "something listens there: check --tls-ca, --tls-cert and --tls-key against kvtided's "
           "--server-cert "
           "and --client-ca; its log has the handshakes that failed";
  return "start it (systemctl start kvtided, or run kvtided), or name its address with --address or "
         "$KVTIDE_ADDRESS";
}

// What to do about v1::Trouble.what, unless another check says it.
const char* TroubleAdvice(const std::string& what) {
  if (what == "config")
    return "kvtide config check --config FILE says what to mend; then kvtide config reload";
  if (what == "tokens") return "mend the file of --tokens, then kvtide config reload";
  if (what == "certificate")
    return "renew --server-cert and --server-key, both at once; kvtided takes them within seconds, without a "
           "restart";
  if (what == "socket") return "make the folder of the socket again, with the owner that kvtided has";
  if (what == "device")
    return "restart kvtided; if it happens again read the driver's log (dmesg, Xid) and take the GPU out";
  return "kvtided's log has the line (trouble=)";
}

// Tiers in host memory; the rest of the daemon fits beside them in this.
constexpr int64_t kBesideTiers = 512 * kMiB;

}  // namespace

Finding CheckConnection(const std::string& address, const absl::Status& status) {
  if (status.ok()) return Ok("daemon", absl::StrCat("answers at ", address));
  return Fail("daemon", std::string(status.message()), ConnectionAdvice(status));
}

Finding CheckServing(bool serving) {
  if (serving) return Ok("health", "serving");
  return Fail("health", "the daemon is there but does not serve",
              "it is starting or stopping, or what stands below ends its service; its log says which");
}

Finding CheckWays(const client::DaemonWays& ways) {
  if (absl::IsInvalidArgument(ways.shared_memory))
    return Ok(
        "ways",
        "gRPC; engines on the daemon's host reach it by shared memory, or directly, at its Unix socket");
  const std::string shared =
      ways.shared_memory.ok()
          ? "gRPC, shared memory"
          : absl::StrCat("gRPC; no shared memory: ", std::string(ways.shared_memory.message()));
  if (ways.direct.ok())
    return Ok("ways", absl::StrCat(shared, ", direct (the pool on ", absl::StrJoin(ways.devices, ", "),
                                   " can be mapped)"));
  const std::string text = absl::StrCat(shared, "; not direct: ", std::string(ways.direct.message()));
  if (ways.shared_memory.ok()) return Ok("ways", text);
  return Warn("ways", text, "tensors of engines on this host travel in messages; what stands there says why");
}

Finding CheckVersions(const std::string& client, const std::string& daemon) {
  if (client == daemon) return Ok("versions", absl::StrCat("kvtide and kvtided are both ", client));
  return Warn("versions", absl::StrCat("kvtide is ", client, ", kvtided is ", daemon),
              "install the same version of both; an old daemon does not know new options");
}

Finding CheckCpu(const std::string& flags) {
  const std::vector<std::string> words = absl::StrSplit(flags, absl::ByAnyChar(" \t\n"), absl::SkipEmpty());
  const auto has = [&](const char* flag) {
    return std::find(words.begin(), words.end(), flag) != words.end();
  };
  const bool arm = has("asimd");
  const std::vector<const char*> used =
      arm ? std::vector<const char*>{"asimd", "asimddp", "aes"}
          : std::vector<const char*>{"avx2",     "fma",        "f16c",        "avx512f",
                                     "avx512bw", "avx512vbmi", "avx512_vnni", "avx512_bf16"};
  std::vector<std::string> found;
  for (const char* flag : used)
    if (has(flag)) found.push_back(flag);
  const std::string text = absl::StrJoin(found, " ");
  if (arm) {
    if (found.size() == used.size()) return Ok("processor", text);
    return Warn("processor", text,
                "the NEON kernels need asimddp and aes; attention in host memory is slow without");
  }
  if (found.empty()) {
    return Warn("processor", "no AVX2",
                "attention in host memory will be slow; take a machine with AVX2, better with AVX-512");
  }
  if (!has("avx2") || !has("fma")) {
    return Warn("processor", text, "without AVX2 and FMA attention in host memory is slow");
  }
  return Ok("processor", text);
}

Finding CheckHugePages(const std::string& setting) {
  const size_t open = setting.find('['), close = setting.find(']');
  if (open == std::string::npos || close == std::string::npos || close < open) {
    return Warn("huge pages", "unknown",
                "this kernel has no transparent huge pages; attention in host memory is a little slower");
  }
  const std::string chosen = setting.substr(open + 1, close - open - 1);
  if (chosen == "never") {
    return Warn("huge pages", "off", "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled");
  }
  return Ok("huge pages", chosen);
}

Finding CheckLockedMemory(std::optional<int64_t> limit_bytes, bool gpu) {
  if (!limit_bytes) return Ok("locked memory", "unlimited");
  const std::string text = absl::StrCat("this shell may lock ", FormatBytes(*limit_bytes));
  if (!gpu || *limit_bytes >= 64 * kGiB) return Ok("locked memory", text);
  return Warn("locked memory", text,
              "copies between GPU and host are fastest from pinned memory: LimitMEMLOCK=infinity in the "
              "unit, --ulimit "
              "memlock=-1 for containers, ulimit -l unlimited in a shell");
}

Finding CheckGpu(const GpuFacts& facts) {
  if (!facts.found.ok()) {
    if (!facts.device_files) return Ok("GPU", "none; the device tier is host memory");
    return Fail("GPU",
                absl::StrCat("the kernel driver is loaded, but NVML is not usable: ", facts.found.message()),
                "install the user part of the same driver version (libnvidia-ml1, libcuda1); in containers "
                "start with --gpus all");
  }
  std::string text = absl::StrCat(facts.name, ", ", FormatBytes(facts.memory_bytes));
  if (!facts.driver_library.empty()) {
    return Fail("GPU", absl::StrCat(text, ", but ", facts.driver_library),
                "install libcuda1 of the driver's version; in containers set "
                "NVIDIA_DRIVER_CAPABILITIES=compute,utility");
  }
  if (facts.cuda_version == 0)
    return Warn("GPU", absl::StrCat(text, ", driver of unknown version"), "reinstall the driver");
  absl::StrAppend(&text, ", driver for CUDA ", facts.cuda_version / 1000, ".",
                  facts.cuda_version % 1000 / 10);
  constexpr int kOldestCuda = 12080;
  if (facts.cuda_version < kOldestCuda) {
    return Warn("GPU", text, "kvtide is built with CUDA 12.8 or newer; update the driver (570 or newer)");
  }
  return Ok("GPU", text);
}

std::optional<Finding> CheckGpuUse(const GpuFacts& facts, const std::vector<client::TierInfo>& tiers) {
  if (!facts.found.ok() || tiers.empty() || !OnCpu(tiers.front())) return std::nullopt;
  return Warn("GPU use",
              absl::StrCat("the daemon's first tier is on ", tiers.front().backend, ", the GPU lies idle"),
              "start kvtided with --device auto or cuda:0; if it refuses, it was built without CUDA");
}

Finding CheckMemory(int64_t total_bytes, int64_t available_bytes, std::optional<int64_t> limit_bytes,
                    const std::vector<client::TierInfo>& tiers) {
  int64_t in_host = 0;
  for (const client::TierInfo& tier : tiers) in_host += OnCpu(tier) ? tier.capacity_bytes : 0;
  std::string text = absl::StrCat(FormatBytes(total_bytes), ", ", FormatBytes(available_bytes), " available");
  if (limit_bytes)
    absl::StrAppend(&text, ", limited to ", FormatBytes(*limit_bytes), " by the control group");
  if (in_host > 0) absl::StrAppend(&text, "; the daemon's tiers take ", FormatBytes(in_host), " of it");
  const int64_t most = limit_bytes ? std::min(total_bytes, *limit_bytes) : total_bytes;
  if (in_host + kBesideTiers > most) {
    return Fail("host memory", text,
                "the tiers do not fit: lower --host-memory or --device-memory, or raise the limit");
  }
  if (available_bytes < kGiB / 2) {
    return Warn("host memory", text,
                "little is left: the OOM killer takes the largest process, which is kvtided");
  }
  return Ok("host memory", text);
}

Finding CheckDisk(const std::string& folder, int64_t free_bytes) {
  const std::string text = absl::StrCat(FormatBytes(free_bytes), " free at ", folder);
  if (free_bytes < 16 * kMiB)
    return Warn("disk", text, "sockets and logs cannot be made on a full disk; make room");
  return Ok("disk", text);
}

namespace {

// Beyond this share of what was predicted memory is not as planned; nor does it count below so many bytes,
// which blocks take that wait for their turn to be sealed.
constexpr double kPlannedShare = 0.10;
constexpr int64_t kWaiting = 64 * kMiB;

Finding CheckMemoryUse(const client::MemoryUse& use) {
  const std::string subject = absl::StrCat("memory of ", use.part);
  const std::string text =
      absl::StrCat(FormatBytes(use.actual_bytes), ", predicted ", FormatBytes(use.predicted_bytes));
  const int64_t over = use.actual_bytes - use.predicted_bytes;
  const bool beyond =
      static_cast<double>(std::abs(over)) > kPlannedShare * static_cast<double>(use.predicted_bytes) &&
      std::abs(over) > kWaiting;
  if (!beyond || (use.part == "host" && over < 0)) return Ok(subject, text);
  if (use.part == "sequences")
    return Warn(subject, text,
                over > 0 ? "blocks wait to be sealed, or steps stay open: metrics kvtide_work_seconds and "
                           "kvtide_sealed_blocks_total; plan with what is measured until then"
                         : "blocks were dropped: attention over them is DATA_LOSS");
  if (use.part == "host")
    return Warn(
        subject, text,
        "more than tiers and limits allow, which a container with that limit would not survive: report "
        "it with the daemon's log");
  return Warn(subject, text,
              over > 0
                  ? "give the planner a larger margin (kvtide plan --margin), or a smaller --device-memory"
                  : "the driver takes less than the planner allows for: --device-memory may be larger");
}

}  // namespace

Finding CheckRemote(const client::RemoteStats& remote) {
  const std::string subject = "remote tier";
  const bool refused =
      absl::StrContains(remote.problem, "AUTH") || absl::StrContains(remote.problem, "WRONGPASS") ||
      absl::StrContains(remote.problem, "NOPERM") || absl::StrContains(remote.problem, "remote_auth_file");
  if (!remote.problem.empty())
    return Fail(
        subject, absl::StrCat(remote.server, ": ", remote.problem),
        refused ? "give kvtided the password or ACL user of the server (--remote-auth-file)"
                : "start the server, or name the right one (--remote); until then lookups find what is here");
  if (!remote.write_problem.empty()) {
    const bool full = absl::StartsWith(remote.write_problem, "OOM");
    return Warn(
        subject, absl::StrCat(remote.server, " takes no blocks: ", remote.write_problem),
        full ? "give the server more memory, or let it drop what is cold (maxmemory-policy allkeys-lru)"
             : "let kvtided's user write there, or let it read only (--remote-write none)");
  }
  if (remote.damaged_blocks > 0)
    return Warn(
        subject, absl::StrCat(remote.damaged_blocks, " values were not what was stored"),
        "somebody else writes under this prefix (--remote-prefix), or the server's memory is failing");
  if (remote.memory_limit_bytes == 0 && !remote.memory_policy.empty())
    return Warn(subject, absl::StrCat(remote.server, " has no memory limit (maxmemory)"),
                "set maxmemory and maxmemory-policy allkeys-lru, so that it drops what is cold before the "
                "host is full");
  if (remote.memory_policy == "noeviction")
    return Warn(subject, absl::StrCat(remote.server, " drops nothing when it is full (noeviction)"),
                "set maxmemory-policy allkeys-lru");
  return Ok(subject, absl::StrCat(remote.server, " answers"));
}

std::vector<Finding> CheckTroubles(const std::vector<client::Trouble>& troubles) {
  std::vector<Finding> findings;
  for (const client::Trouble& trouble : troubles) {
    if (trouble.what == "disk" || trouble.what == "remote" || trouble.what == "persist") continue;
    const std::string text =
        absl::StrCat("for ", DurationText(trouble.seconds), ": ",
                     trouble.text.empty() ? "not as it should be; an admin sees more" : trouble.text);
    const bool fails = trouble.ends_service || trouble.what == "device" || trouble.what == "socket";
    findings.push_back((fails ? Fail : Warn)(Printable(trouble.what), text, TroubleAdvice(trouble.what)));
  }
  return findings;
}

// What is short, or what a caller has to do, by reason of a refusal; null: a mistake of a client, or a race.
const char* RefusalAdvice(const std::string& reason) {
  constexpr std::pair<const char*, const char*> kAdvice[] = {
      {"no_room", "a tier is full: kvtide plan says what would fit, kvtide seq evict makes room now"},
      {"quota",
       "a tenant has what it may (--quota): raise it, or have the tenant close what it does not use"},
      {"limit",
       "max_sequences, max_models or another limit: close what is idle (kvtide status), or raise it"},
      {"queue_full", "more calls come than threads serve: --service-threads, or fewer clients a daemon"},
      {"call_memory", "clients send more at once than --call-memory has room for, or do not read answers"},
      {"too_large", "send less in one call, or raise --max-message-bytes or --max-attend-work"},
      {"not_received",
       "requests larger than --max-message-bytes, compressed ones, or such that their clients take back"},
      {"slow_client", "a client sends its request, or reads its answer, slower than 30 s"},
      {"unavailable", "a device or tier that calls need is away"},
      {"unauthenticated", "a token that is unknown or over (--tokens), or nobody who should call"},
      {"permission", "a user or tenant that may not: --allow, or an admin's verb"},
      {"other_tenant", "a client names what another tenant has: it is misled, or it tries"},
  };
  for (const auto& [known, advice] : kAdvice)
    if (reason == known) return advice;
  return nullptr;
}

void CheckRefused(const client::ServerStats& stats, std::vector<Finding>* findings) {
  int64_t calls = 0;
  for (const client::MethodStats& method : stats.methods) calls += method.calls;
  std::vector<std::string> others;
  for (const auto& [reason, refused] : stats.refused) {
    const char* const advice = RefusalAdvice(reason);
    if (advice == nullptr) {
      others.push_back(absl::StrCat(reason, " ", refused));
      continue;
    }
    const std::string tenants = RefusedTenantsText(stats, reason);
    findings->push_back(
        Warn("refused",
             absl::StrCat(refused, " calls since the start, ",
                          PercentText(static_cast<double>(refused) / std::max<double>(1, calls), 1),
                          " of all: ", reason, tenants.empty() ? "" : absl::StrCat(" (", tenants, ")")),
             absl::StrCat(advice, "; the log has the callers (reason=", reason, ")")));
  }
  if (!others.empty())
    findings->push_back(
        Ok("refused", absl::StrCat("mistakes of clients and races: ", absl::StrJoin(others, ", "))));
  // A daemon of an earlier version.
  if (stats.refused.empty() && stats.exhausted > 0)
    findings->push_back(Warn(
        "room", absl::StrCat(stats.exhausted, " calls since the start found no room or were beyond a limit"),
        "the log says of each which (code=RESOURCE_EXHAUSTED): a tier that is full (kvtide "
        "plan says what would fit), a tenant's quota, or another limit"));
}

std::vector<Finding> CheckContents(const client::ServerStats& stats, int64_t dropped_of_sequences) {
  std::vector<Finding> findings = CheckTroubles(stats.troubles);
  for (const client::MemoryUse& use : stats.memory) findings.push_back(CheckMemoryUse(use));
  for (const client::TierStats& tier : stats.tiers) {
    const double share = tier.capacity_bytes > 0
                             ? static_cast<double>(tier.used_bytes) / static_cast<double>(tier.capacity_bytes)
                             : 0;
    const std::string subject = absl::StrCat("tier ", tier.name);
    const std::string text =
        absl::StrCat(PercentText(share, 1), " of ", FormatBytes(tier.capacity_bytes), " used");
    if (share > 0.95) {
      findings.push_back(
          Warn(subject, text,
               "close idle sequences (kvtide status), enlarge it, or take a smaller pair (kvtide plan)"));
    } else {
      findings.push_back(Ok(subject, text));
    }
    if (!tier.problem.empty())
      findings.push_back(
          Fail(subject, tier.problem, "make room on the disk, or give the tier another folder (--disk)"));
    if (tier.read_errors + tier.checksum_errors > 0)
      findings.push_back(
          Fail(subject,
               absl::StrCat(tier.read_errors, " reads failed, ", tier.checksum_errors,
                            " found other bytes than were stored; ", tier.lost_blocks, " blocks are lost"),
               "the disk is failing: read its logs (dmesg, smartctl), give the tier another one"));
  }
  if (stats.remote.has_value()) findings.push_back(CheckRemote(*stats.remote));
  if (stats.failed_persists > 0)
    findings.push_back(
        Warn("durable", absl::StrCat(stats.failed_persists, " times a sequence could not be made durable"),
             "kvtide persist says of each sequence whether it can be made durable now, and why not"));
  if (stats.checksum_failures > 0) {
    findings.push_back(
        Fail("checksums", absl::StrCat(stats.checksum_failures, " blocks came back with other bytes"),
             "memory or storage of this host is failing: read its ECC and disk logs, move the work away"));
  }
  if (stats.failed_moves > 0) {
    findings.push_back(Warn("moves", absl::StrCat(stats.failed_moves, " block moves failed"),
                            "the daemon's log has the reason"));
  }
  // What calls came to: clients see these, whatever the tiers look like now.
  int64_t lost = 0, faults = 0;
  std::map<std::string, int64_t> failed;
  for (const client::MethodStats& method : stats.methods) {
    for (const auto& [code, calls] : method.failed) {
      failed[code] += calls;
      if (code == "DATA_LOSS") lost += calls;
      if (code == "INTERNAL" || code == "UNKNOWN") faults += calls;
    }
  }
  if (lost > 0 || stats.lost_blocks > 0) {
    findings.push_back(
        Fail("data loss",
             absl::StrCat(lost, " calls ended with DATA_LOSS; ", stats.lost_blocks,
                          " blocks could not be read back, ", stats.dropped_blocks, " were dropped"),
             "the log names the sequences and token ranges (code=DATA_LOSS): compute those again; "
             "dropped blocks mean that the tiers are too small (kvtide plan)"));
  } else if (dropped_of_sequences > 0) {
    findings.push_back(
        Warn("dropped",
             absl::StrCat("open sequences have lost ", dropped_of_sequences, " blocks that were dropped"),
             "attention over them will be DATA_LOSS: give a tier more memory, or keep fewer sequences"));
  } else if (stats.dropped_blocks > 0) {
    findings.push_back(Ok("dropped", absl::StrCat(stats.dropped_blocks,
                                                  " blocks since the start; no open sequence misses one")));
  }
  if (faults > 0) {
    findings.push_back(Fail("faults", absl::StrCat(faults, " calls ended with INTERNAL or UNKNOWN"),
                            "a fault of kvtided: its log has the calls (level error); report it with them"));
  }
  std::vector<std::string> codes;
  for (const auto& [code, calls] : failed) codes.push_back(absl::StrCat(code, " ", calls));
  if (!codes.empty())
    findings.push_back(Ok("errors", absl::StrCat("since the start: ", absl::StrJoin(codes, ", "))));
  CheckRefused(stats, &findings);
  return findings;
}

std::string RenderFindings(const std::vector<Finding>& findings, const Terminal& terminal) {
  size_t width = 0;
  for (const Finding& finding : findings) width = std::max(width, finding.subject.size());
  std::string text;
  int warned = 0, failed = 0;
  for (const Finding& finding : findings) {
    warned += finding.verdict == Verdict::kWarn ? 1 : 0;
    failed += finding.verdict == Verdict::kFail ? 1 : 0;
    const Paint paint = finding.verdict == Verdict::kOk     ? Paint::kGreen
                        : finding.verdict == Verdict::kWarn ? Paint::kYellow
                                                            : Paint::kRed;
    std::string verdict = Name(finding.verdict);
    verdict.resize(4, ' ');
    absl::StrAppend(&text, terminal.Painted(verdict, paint), "  ", finding.subject,
                    std::string(width - finding.subject.size(), ' '), "  ", Printable(finding.text), "\n");
    if (!finding.advice.empty())
      absl::StrAppend(&text, std::string(width + 8, ' '), "-> ", Printable(finding.advice), "\n");
  }
  absl::StrAppend(&text, "\n", findings.size(), " checks, ", warned, " warnings, ", failed, " failed\n");
  return text;
}

std::string RenderFindingsJson(const std::vector<Finding>& findings) {
  nlohmann::ordered_json json = {{"ok", !AnyFailed(findings)}, {"findings", nlohmann::ordered_json::array()}};
  for (const Finding& finding : findings) {
    json["findings"].push_back({{"verdict", Name(finding.verdict)},
                                {"subject", finding.subject},
                                {"text", finding.text},
                                {"advice", finding.advice}});
  }
  return JsonText(json);
}

bool AnyFailed(const std::vector<Finding>& findings) {
  return std::any_of(findings.begin(), findings.end(),
                     [](const Finding& finding) { return finding.verdict == Verdict::kFail; });
}

}  // namespace kvtide::cli
