#include "daemon/trace/workload.h"

#include <algorithm>
#include <array>
#include <cerrno>
#include <cmath>
#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numbers>
#include <random>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvtide {
namespace {

constexpr int kMooncakeBlockTokens = 512;
// Sessions that began before the first request go on in it.
constexpr double kWarmSeconds = 1800;

// Numbers that are the same with every standard library.
class Random {
 public:
  explicit Random(uint64_t seed) : bits_(seed) {}
  double Uniform() { return static_cast<double>(bits_() >> 11) * 0x1p-53; }  // [0, 1)
  double Normal() {
    const double radius = std::sqrt(-2 * std::log(1 - Uniform()));
    return radius * std::cos(2 * std::numbers::pi * Uniform());
  }
  double LogNormal(const Spread& spread) {
    return spread.median > 0 ? spread.median * std::exp(spread.sigma * Normal()) : 0;
  }
  double Exponential(double mean) { return -mean * std::log(1 - Uniform()); }
  template <class Weight>
  size_t Pick(size_t count, const Weight& weight) {
    double whole = 0;
    for (size_t i = 0; i < count; i++) whole += weight(i);
    double left = Uniform() * whole;
    for (size_t i = 0; i + 1 < count; i++)
      if ((left -= weight(i)) < 0) return i;
    return count - 1;
  }

 private:
  std::mt19937_64 bits_;
};

// A number for block `index` of a text; different for different texts.
uint64_t KeyOf(uint64_t text, uint64_t index) {
  uint64_t key = text * 0x9e3779b97f4a7c15 + index + 1;
  key = (key ^ key >> 30) * 0xbf58476d1ce4e5b9;
  key = (key ^ key >> 27) * 0x94d049bb133111eb;
  return key ^ key >> 31;
}

enum Text : uint64_t { kSystem = 1, kSession = 2, kRequest = 3 };
uint64_t TextOf(Text kind, uint64_t number) { return KeyOf(kind, number); }

// A turn, before all of them are put into the order of time.
struct Turn {
  double second = 0;
  double tokens = 0;         // of the prompt
  double system_tokens = 0;  // of these, from the first one on
  double same_tokens = 0;    // as in the session's other turns, as far as they go
  uint64_t system = 0, session = 0;
};

void MakeSession(const WorkloadShape& shape, uint64_t session, Random& random, std::vector<Turn>* turns) {
  const size_t which = random.Pick(shape.kinds.size(), [&](size_t i) { return shape.kinds[i].share; });
  const SessionKind& kind = shape.kinds[which];
  Turn turn;
  turn.session = TextOf(kSession, session);
  turn.second = random.Uniform() * (shape.seconds + kWarmSeconds) - kWarmSeconds;
  if (kind.system_prompts > 0) {
    const size_t prompt = random.Pick(static_cast<size_t>(kind.system_prompts), [&](size_t i) {
      return std::pow(static_cast<double>(i + 1), -kind.skew);
    });
    turn.system = TextOf(kSystem, which << 32 | prompt);
    turn.system_tokens = Random(turn.system).LogNormal(kind.system_tokens);
  }
  double tokens = turn.system_tokens + random.LogNormal(kind.first_tokens);
  const double document = tokens;
  do {
    turn.tokens = kind.grows ? tokens : document + random.LogNormal(kind.more_tokens);
    turn.same_tokens = kind.grows ? turn.tokens : document;
    if (turn.tokens > static_cast<double>(shape.most_tokens)) return;
    if (turn.second >= 0 && turn.second < shape.seconds) turns->push_back(turn);
    turn.second += random.LogNormal(kind.gap_s);
    tokens += random.Exponential(kind.answer_tokens) + random.LogNormal(kind.more_tokens);
  } while (random.Uniform() < 1 - 1 / kind.turns);
}

std::vector<WorkloadShape> MakeShapes() {
  // Numbers of the traces: 12,031, 23,608 and 3,993 requests with prompts of 12,035, 8,596 and 15,325 tokens;
  // an endless cache finds about 40, 59 and 66 % of them.
  WorkloadShape conversation{"conversation", "chats that grow turn by turn, one system prompt", 12031, 3537};
  conversation.kinds.push_back({.share = 1,
                                .turns = 1.68,
                                .first_tokens = {4500, 1.15},
                                .more_tokens = {1700, 1.35},
                                .answer_tokens = 343,
                                .gap_s = {130, 0.95},
                                .system_prompts = 1,
                                .system_tokens = {600, 0}});
  WorkloadShape tools{"tool-agent", "tools and agents: long system prompts, a few of them very popular",
                      23608, 3537};
  tools.kinds.push_back({.share = 0.77,
                         .turns = 1.25,
                         .first_tokens = {900, 1.2},
                         .more_tokens = {400, 1},
                         .answer_tokens = 182,
                         .gap_s = {20, 1.2},
                         .system_prompts = 60,
                         .skew = 1.1,
                         .system_tokens = {5000, 0.3}});
  tools.kinds.push_back({.share = 0.23,
                         .turns = 1.45,
                         .first_tokens = {5200, 1.1},
                         .more_tokens = {900, 1.2},
                         .answer_tokens = 182,
                         .gap_s = {60, 1.2},
                         .system_prompts = 1,
                         .system_tokens = {600, 0}});
  WorkloadShape synthetic{"synthetic", "short prompts beside documents that are asked about many times", 3993,
                          1022};
  synthetic.kinds.push_back({.share = 0.94,
                             .turns = 1.2,
                             .first_tokens = {1100, 2},
                             .more_tokens = {200, 1},
                             .answer_tokens = 149,
                             .gap_s = {60, 1}});
  synthetic.kinds.push_back({.share = 0.06,
                             .turns = 14,
                             .first_tokens = {30000, 0.45},
                             .more_tokens = {60, 0.8},
                             .answer_tokens = 149,
                             .gap_s = {60, 1.2},
                             .grows = false});
  return {conversation, tools, synthetic};
}

}  // namespace

std::span<const WorkloadShape> WorkloadShapes() {
  static const std::vector<WorkloadShape> shapes = MakeShapes();
  return shapes;
}

absl::StatusOr<WorkloadShape> FindWorkloadShape(const std::string& name) {
  std::string known;
  for (const WorkloadShape& shape : WorkloadShapes()) {
    if (shape.name == name) return shape;
    absl::StrAppend(&known, known.empty() ? "" : ", ", shape.name);
  }
  return absl::NotFoundError(absl::StrCat("no workload is called '", name, "'; known: ", known));
}

std::vector<RecordedEvent> MakeWorkload(const WorkloadShape& shape, const WorkloadOptions& options) {
  const auto wanted = static_cast<size_t>(std::llround(static_cast<double>(shape.requests) * options.scale));
  Random random(options.seed);
  std::vector<Turn> turns;
  for (uint64_t session = 0; turns.size() < wanted; session++) MakeSession(shape, session, random, &turns);
  turns.resize(wanted);
  std::stable_sort(turns.begin(), turns.end(),
                   [](const Turn& a, const Turn& b) { return a.second < b.second; });
  std::vector<RecordedEvent> events;
  events.reserve(turns.size());
  const auto block = static_cast<double>(options.block_tokens);
  for (const Turn& turn : turns) {
    RecordedEvent& event = events.emplace_back();
    event.nanos = static_cast<int64_t>(turn.second * 1e9);
    event.verb = static_cast<uint8_t>(TraceVerb::kLookup);
    event.block_tokens = options.block_tokens;
    event.block_bytes = options.token_bytes * options.block_tokens;
    event.name_space = 1;
    const uint64_t request = TextOf(kRequest, events.size());
    const auto blocks = static_cast<uint64_t>(turn.tokens / block);
    event.keys.reserve(blocks);
    for (uint64_t i = 0; i < blocks; i++) {
      const double end = static_cast<double>(i + 1) * block;
      const uint64_t text = end <= turn.system_tokens ? turn.system
                            : end <= turn.same_tokens ? turn.session
                                                      : request;
      event.keys.push_back(KeyOf(text, i));
    }
  }
  return events;
}

absl::StatusOr<std::vector<RecordedEvent>> ReadMooncakeTrace(const std::string& path, uint64_t token_bytes,
                                                             const std::function<bool(uint64_t)>& progress) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  std::vector<RecordedEvent> events;
  std::string line;
  for (uint64_t number = 1; std::getline(file, line); number++) {
    if (line.find_first_not_of(" \t\r") == std::string::npos) continue;
    const auto wrong = [&](const char* what) {
      return absl::InvalidArgumentError(absl::StrCat(
          path, ", line ", number, ": ", what,
          "; a line is {\"timestamp\": MS, \"input_length\": TOKENS, \"hash_ids\": [NUMBER, ...]}"));
    };
    const nlohmann::json row = nlohmann::json::parse(line, nullptr, false);
    if (!row.is_object()) return wrong("no JSON object");
    const auto time = row.find("timestamp"), tokens = row.find("input_length"), ids = row.find("hash_ids");
    if (time == row.end() || !time->is_number() || !(time->get<double>() >= 0) || time->get<double>() > 1e12)
      return wrong("timestamp is no number of milliseconds");
    if (tokens == row.end() || !tokens->is_number_integer() || tokens->get<int64_t>() < 0)
      return wrong("input_length is no number of tokens");
    if (ids == row.end() || !ids->is_array()) return wrong("hash_ids is no list");
    RecordedEvent& event = events.emplace_back();
    event.nanos = static_cast<int64_t>(time->get<double>() * 1e6);
    event.verb = static_cast<uint8_t>(TraceVerb::kLookup);
    event.block_tokens = kMooncakeBlockTokens;
    event.block_bytes = token_bytes * kMooncakeBlockTokens;
    event.name_space = 1;
    const auto full = static_cast<uint64_t>(tokens->get<int64_t>()) / kMooncakeBlockTokens;
    for (const nlohmann::json& id : *ids) {
      if (!id.is_number_integer()) return wrong("hash_ids has something that is no whole number");
      if (event.keys.size() < std::min<uint64_t>(full, kMostTraceKeys))
        event.keys.push_back(static_cast<uint64_t>(id.get<int64_t>()));
    }
    if (progress && number % 64 == 0 && !progress(number)) return absl::CancelledError("interrupted");
  }
  if (events.empty()) return absl::InvalidArgumentError(absl::StrCat(path, " has no request"));
  std::stable_sort(events.begin(), events.end(),
                   [](const RecordedEvent& a, const RecordedEvent& b) { return a.nanos < b.nanos; });
  return events;
}

}  // namespace kvtide
