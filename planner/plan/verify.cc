#include "planner/plan/verify.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <optional>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

std::vector<std::string> Lines(const std::string& text) { return absl::StrSplit(text, '\n'); }

// The number that follows `marker`, and the unit behind it; commas inside numbers are dropped.
std::optional<double> NumberAfter(const std::string& line, const std::string& marker,
                                  std::string* rest = nullptr) {
  const size_t at = line.find(marker);
  if (at == std::string::npos) return std::nullopt;
  size_t begin = line.find_first_of("0123456789", at + marker.size());
  if (begin == std::string::npos) return std::nullopt;
  std::string number;
  size_t end = begin;
  for (; end < line.size() &&
         (absl::ascii_isdigit(static_cast<unsigned char>(line[end])) || line[end] == '.' || line[end] == ',');
       ++end) {
    if (line[end] != ',') number += line[end];
  }
  while (!number.empty() && number.back() == '.') number.pop_back();
  double value = 0;
  if (!absl::SimpleAtod(number, &value)) return std::nullopt;
  if (rest != nullptr) *rest = line.substr(end);
  return value;
}

// "... = 1024.00 MiB" or "took 14.98 GiB" after the marker.
std::optional<int64_t> BytesAfter(const std::string& line, const std::string& marker) {
  std::string rest;
  const std::optional<double> number = NumberAfter(line, marker, &rest);
  if (!number.has_value()) return std::nullopt;
  while (!rest.empty() && rest[0] == ' ') rest.erase(0, 1);
  for (const auto& unit : {std::pair<const char*, double>{"GiB", kGiB},
                           {"MiB", kMiB},
                           {"KiB", kKiB},
                           {"GB", 1e9},
                           {"MB", 1e6}}) {
    if (absl::StartsWith(rest, unit.first)) return static_cast<int64_t>(std::llround(*number * unit.second));
  }
  return std::nullopt;
}

// The word before the marker: "llama_kv_cache:      CUDA0 KV buffer size" -> "CUDA0".
std::string WordBefore(const std::string& line, const std::string& marker) {
  size_t end = line.find(marker);
  while (end > 0 && line[end - 1] == ' ') --end;
  size_t begin = end;
  while (begin > 0 && line[begin - 1] != ' ' && line[begin - 1] != ':') --begin;
  return line.substr(begin, end - begin);
}

bool IsHostBuffer(const std::string& name) {
  return absl::StartsWith(name, "CPU") || absl::StrContains(name, "Host") || absl::StrContains(name, "AMX");
}

int64_t SumOf(const ItemList& items, std::initializer_list<ItemKind> kinds) {
  int64_t sum = 0;
  for (const Item& item : items) {
    if (std::find(kinds.begin(), kinds.end(), item.kind) != kinds.end()) sum += item.bytes;
  }
  return sum;
}

}  // namespace

namespace {

using DeviceBytes = std::map<std::string, std::map<std::string, int64_t>>;  // item -> device -> bytes

// One map per context of the log. A cache or weights that come after a compute buffer belong to the next one;
// a context that repeats the one before it is a dry run of the same.
std::vector<DeviceBytes> LlamaContexts(const std::string& log) {
  static const std::pair<const char*, const char*> markers[] = {{"weights", "model buffer size"},
                                                                {"kv", "KV buffer size"},
                                                                {"recurrent", "RS buffer size"},
                                                                {"compute", "compute buffer size"}};
  std::vector<DeviceBytes> contexts(1);
  for (const std::string& line : Lines(log)) {
    for (const auto& [item, marker] : markers) {
      const std::optional<int64_t> bytes = BytesAfter(line, marker);
      if (!bytes.has_value()) continue;
      if (contexts.back().count("compute") > 0 && std::string(item) != "compute") contexts.emplace_back();
      contexts.back()[item][WordBefore(line, marker)] += *bytes;
      break;
    }
  }
  contexts.erase(std::unique(contexts.begin(), contexts.end()), contexts.end());
  return contexts;
}

// The fullest GPU of an item, or what lies in host memory.
int64_t FullestGpu(const std::map<std::string, int64_t>& devices) {
  int64_t most = 0;
  for (const auto& [device, bytes] : devices) {
    if (!IsHostBuffer(device)) most = std::max(most, bytes);
  }
  return most;
}

int64_t OnHost(const std::map<std::string, int64_t>& devices) {
  int64_t sum = 0;
  for (const auto& [device, bytes] : devices) {
    if (IsHostBuffer(device) && !absl::EndsWith(device, "REPACK")) sum += bytes;
  }
  return sum;
}

}  // namespace

absl::StatusOr<Measured> ParseLlamaLog(const std::string& log) {
  const std::vector<DeviceBytes> contexts = LlamaContexts(log);
  if (contexts.front().empty())
    return absl::InvalidArgumentError("no '... buffer size = N MiB' line: not a llama.cpp start-up log");
  Measured measured{"llama.cpp log", {}};
  measured.on_cpu = true;
  for (const DeviceBytes& context : contexts) {
    for (const auto& [item, devices] : context) measured.on_cpu &= FullestGpu(devices) == 0;
  }
  if (measured.on_cpu) measured.kind = "llama.cpp log, CPU only";
  for (size_t i = 0; i < contexts.size(); ++i) {
    const std::string prefix = i == 0 ? "" : "draft_";
    for (const auto& [item, devices] : contexts[i]) {
      const int64_t gpu = FullestGpu(devices), host = OnHost(devices);
      if (measured.on_cpu) {
        measured.bytes[prefix + item] += host;
      } else {
        if (gpu > 0) measured.bytes[prefix + item] += gpu;
        if (item == "kv" && host > 0) measured.bytes[prefix + "kv_host"] += host;
      }
      for (const auto& [device, bytes] : devices) {
        if (absl::EndsWith(device, "REPACK"))
          measured.notes.push_back(absl::StrCat(FormatMiB(bytes),
                                                " MiB of weights were repacked for the CPU (", device,
                                                "); no plan counts them"));
      }
    }
  }
  if (measured.bytes.empty())
    return absl::InvalidArgumentError("the log has buffers, but none of weights, cache or compute");
  return measured;
}

absl::StatusOr<Measured> ParseVllmLog(const std::string& log) {
  Measured measured{"vllm log", {}};
  std::optional<int64_t> available;
  std::optional<double> concurrency;
  static const std::pair<const char*, const char*> markers[] = {{"weights", "Model loading took"},
                                                                {"weights", "model weights take"},
                                                                {"compute", "activation peak memory takes"},
                                                                {"context", "non_torch_memory takes"},
                                                                {"graphs", "secs, took"}};
  for (const std::string& line : Lines(log)) {
    for (const auto& marker : markers) {
      if (const std::optional<int64_t> bytes = BytesAfter(line, marker.second))
        measured.bytes[marker.first] = *bytes;
    }
    for (const char* marker : {"Available KV cache memory:", "reserved for KV Cache is"}) {
      if (const std::optional<int64_t> bytes = BytesAfter(line, marker)) available = bytes;
    }
    if (absl::StrContains(line, "Maximum concurrency for")) {
      const std::optional<double> times = NumberAfter(line, "per request:");
      if (times.has_value() && *times > 0) concurrency = times;
    }
  }
  if (available.has_value() && concurrency.has_value()) {
    measured.bytes["kv_per_request"] = static_cast<int64_t>(static_cast<double>(*available) / *concurrency);
  }
  if (measured.bytes.empty())
    return absl::InvalidArgumentError("no memory line of vLLM: not a vLLM start-up log");
  return measured;
}

absl::StatusOr<Measured> ParseKvtidedMetrics(const std::string& text) {
  Measured measured{"kvtided metrics", {}};
  int64_t used = 0;
  bool found = false;
  for (const std::string& line : Lines(text)) {
    if (line.empty() || line[0] == '#' || !absl::StartsWith(line, "kvtide_pool_used_bytes")) continue;
    const size_t space = line.rfind(' ');
    double value = 0;
    if (space == std::string::npos || !absl::SimpleAtod(line.substr(space + 1), &value)) continue;
    used += static_cast<int64_t>(value);
    found = true;
  }
  if (!found) return absl::InvalidArgumentError("no kvtide_pool_used_bytes: not the metrics of kvtided");
  measured.bytes["kv"] = used;
  return measured;
}

namespace {

// Lines of other ranks than the first repeat what it says.
bool IsOtherRank(const std::string& line) {
  const std::optional<double> rank = NumberAfter(line, " TP");
  return absl::StrContains(line, " TP") && rank.has_value() && *rank > 0;
}

// SGLang writes GB and means GiB.
std::optional<int64_t> GibAfter(const std::string& line, const std::string& marker) {
  const std::optional<double> number = NumberAfter(line, marker);
  if (!number.has_value()) return std::nullopt;
  return static_cast<int64_t>(std::llround(*number * kGiB));
}

}  // namespace

absl::StatusOr<Measured> ParseSglangLog(const std::string& log) {
  Measured measured{"sglang log", {}};
  int64_t graphs = 0, recurrent = 0;
  for (const std::string& line : Lines(log)) {
    if (IsOtherRank(line)) continue;
    if (absl::StrContains(line, "Load weight end")) {
      if (const auto bytes = GibAfter(line, "mem usage=")) measured.bytes["weights"] = *bytes;
    } else if (absl::StrContains(line, "Cache is allocated") && absl::StrContains(line, "#tokens")) {
      for (const char* side : {" K size:", " V size:", " KV size:"}) {
        if (const auto bytes = GibAfter(line, side)) measured.pool_bytes += *bytes;
      }
      if (const auto tokens = NumberAfter(line, "#tokens:"))
        measured.pool_tokens = std::max(measured.pool_tokens, static_cast<int64_t>(*tokens));
    } else if (absl::StrContains(line, "Mamba Cache is allocated")) {
      for (const char* part : {"conv_state size:", "ssm_state size:"}) {
        if (const auto bytes = GibAfter(line, part)) recurrent += *bytes;
      }
    } else if (absl::StrContains(line, "Capture") && absl::StrContains(line, " end")) {
      if (const auto bytes = GibAfter(line, "mem usage=")) graphs += *bytes;
    }
  }
  if (measured.bytes.empty() && measured.pool_bytes == 0)
    return absl::InvalidArgumentError("no memory line of SGLang: not an SGLang start-up log");
  if (graphs > 0)
    measured.notes.push_back(
        absl::StrCat(FormatMiB(graphs), " MiB of graphs lie in what --mem-fraction-static leaves"));
  if (recurrent > 0)
    measured.notes.push_back(
        absl::StrCat(FormatMiB(recurrent), " MiB of recurrent states for all slots of the pool"));
  if (measured.pool_tokens > 0) {
    measured.notes.push_back(absl::StrFormat(
        "the pool holds %d tokens in %s MiB, %.1f bytes each", measured.pool_tokens,
        FormatMiB(measured.pool_bytes),
        static_cast<double>(measured.pool_bytes) / static_cast<double>(measured.pool_tokens)));
  }
  return measured;
}

void PerRequest(int64_t context, Measured* measured) {
  if (measured->pool_tokens <= 0 || measured->pool_bytes <= 0) return;
  measured->bytes["kv_per_request"] =
      static_cast<int64_t>(static_cast<double>(measured->pool_bytes) /
                           static_cast<double>(measured->pool_tokens) * static_cast<double>(context));
}

absl::StatusOr<Measured> ParseAnyLog(const std::string& text) {
  for (auto* parse : {&ParseLlamaLog, &ParseSglangLog, &ParseVllmLog, &ParseKvtidedMetrics}) {
    absl::StatusOr<Measured> measured = parse(text);
    if (measured.ok()) return measured;
  }
  return absl::InvalidArgumentError(
      "neither a llama.cpp start-up log (buffer size lines), nor one of vLLM or SGLang (KV cache memory "
      "lines), nor "
      "metrics of kvtided");
}

double VerifyLine::ErrorPercent() const {
  return actual == 0 ? (predicted == 0 ? 0 : 100)
                     : 100.0 * static_cast<double>(predicted - actual) / static_cast<double>(actual);
}

std::vector<VerifyLine> Compare(const Candidate& candidate, const std::optional<Split>& split,
                                int64_t sequences, const Measured& measured) {
  std::map<std::string, int64_t> predicted;
  const bool on_host = measured.bytes.count("kv_host") > 0;
  predicted["kv_host"] = !on_host ? 0 : split.has_value() ? split->host_kv_bytes : candidate.kv_bytes;
  predicted["weights"] = SumOf(candidate.items, {ItemKind::kWeights});
  predicted["kv"] = candidate.kv_bytes - predicted["kv_host"];
  predicted["recurrent"] = SumOf(candidate.items, {ItemKind::kRecurrent});
  predicted["compute"] = SumOf(candidate.items, {ItemKind::kCompute});
  if (!measured.on_cpu) predicted["compute"] += SumOf(candidate.items, {ItemKind::kDequantScratch});
  predicted["graphs"] = SumOf(candidate.items, {ItemKind::kGraphs});
  predicted["context"] = SumOf(candidate.items, {ItemKind::kContext});
  predicted["kv_per_request"] = sequences > 0 ? candidate.kv_bytes / sequences : 0;
  predicted["draft_weights"] = SumOf(candidate.items, {ItemKind::kDraft});
  predicted["draft_kv"] = SumOf(candidate.items, {ItemKind::kDraftKv});
  predicted["draft_compute"] = SumOf(candidate.items, {ItemKind::kDraftCompute});
  std::vector<VerifyLine> lines;
  VerifyLine sum{"sum", 0, 0};
  for (const auto& [item, actual] : measured.bytes) {
    lines.push_back({item, predicted[item], actual});
    sum.predicted += predicted[item];
    sum.actual += actual;
  }
  if (lines.size() > 1) lines.push_back(sum);
  return lines;
}

bool WithinTolerance(const std::vector<VerifyLine>& lines, double percent) {
  constexpr int64_t kSmall = 4 * kMiB;
  return std::all_of(lines.begin(), lines.end(), [&](const VerifyLine& line) {
    return std::fabs(line.ErrorPercent()) <= percent || std::abs(line.predicted - line.actual) <= kSmall;
  });
}

std::string RenderVerify(const std::vector<VerifyLine>& lines, const Measured& measured) {
  std::string text = absl::StrFormat("%-16s %14s %14s %9s   (%s)\n", "item", "predicted MiB", "actual MiB",
                                     "error", measured.kind);
  for (const VerifyLine& line : lines) {
    absl::StrAppendFormat(&text, "%-16s %14s %14s %+8.1f%%\n", line.item, FormatMiB(line.predicted),
                          FormatMiB(line.actual), line.ErrorPercent());
  }
  for (const std::string& note : measured.notes) absl::StrAppend(&text, "note: ", note, "\n");
  return text;
}

}  // namespace kvtide::planner
