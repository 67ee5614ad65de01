#include "planner/fleet/fleet.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <queue>
#include <random>
#include <set>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status.h"
#include "planner/csv.h"
#include "planner/plan/overheads.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

constexpr int64_t kMaxSessions = 500'000;
constexpr double kWarmUp = 0.25;  // of the duration
constexpr int kMaxBatch = 1024;
constexpr double kLittleGain = 0.005;  // of the returning turns
constexpr double kMostPrefill = 0.9;   // of the time, that prefill takes from decoding

enum class Place { kNowhere, kDevice, kHost };

struct Session {
  int kind = 0;
  int gpu = 0;
  int turn = 0;            // finished turns
  int64_t bytes = 0;       // as cached on the device or moved to the host
  int64_t copy_bytes = 0;  // of the copy on the host, inclusive mode
  Place place = Place::kNowhere;
  bool host_copy = false;  // inclusive mode
  bool active = false;
  double last_use = 0;
  double wished_at = 0;
};

struct Gpu {
  int64_t device_used = 0;
  int64_t host_used = 0;
  std::set<std::pair<double, int>> idle;  // on the device, coldest first
  std::set<std::pair<double, int>> host;
  std::deque<int> waiting;
  int active = 0;
  double busy_since = 0;
  double busy_s = 0;
  int64_t held_bytes = 0;  // of turns at work
  double held_area = 0;    // byte seconds until held_since
  double held_since = 0;
  double prefill_free_at = 0;  // when the prefills and copies that are queued will be done
  double copy_free_at = 0;
  double prefill_s = 0;  // work so far
};

struct Event {
  double time;
  int64_t order;  // ties in order of creation
  enum Kind { kWish, kFinish } kind;
  int session;
  friend bool operator>(const Event& a, const Event& b) {
    return a.time != b.time ? a.time > b.time : a.order > b.order;
  }
};

// What one GPU can hold and how fast it runs; the same for every simulation of a request.
struct Machine {
  int64_t device_bytes = 0;
  const KvSizer* sizer = nullptr;
  std::vector<double> step_s;  // by batch, 1-based
  double pcie_gb_s = 0;
  double prefill_tokens_per_s = 0;
};

class Simulation {
 public:
  Simulation(const FleetRequest& request, const Machine& machine, int gpus, int64_t host_bytes)
      : request_(request), machine_(machine), host_bytes_(host_bytes), gpus_(static_cast<size_t>(gpus)) {}

  FleetPoint Run() {
    Arrivals();
    while (!events_.empty()) {
      const Event event = events_.top();
      events_.pop();
      now_ = event.time;
      if (now_ > request_.duration_s) break;
      if (event.kind == Event::kWish) {
        Wish(event.session);
      } else {
        Finish(event.session);
      }
    }
    return Summary();
  }

 private:
  const SessionClass& Class(const Session& session) const {
    return request_.mix[static_cast<size_t>(session.kind)];
  }
  bool Counted() const { return now_ >= kWarmUp * request_.duration_s; }

  void Arrivals() {
    std::mt19937_64 random(request_.seed);
    for (size_t kind = 0; kind < request_.mix.size(); ++kind) {
      double time = 0;
      while (true) {
        const double uniform = static_cast<double>(random() >> 11) * 0x1p-53;
        time -= std::log1p(-uniform) / request_.mix[kind].rate_per_s;
        if (time > request_.duration_s) break;
        Session session;
        session.kind = static_cast<int>(kind);
        session.gpu = static_cast<int>(sessions_.size() % gpus_.size());
        sessions_.push_back(session);
        Push(time, Event::kWish, static_cast<int>(sessions_.size()) - 1);
      }
    }
  }

  void Push(double time, Event::Kind kind, int session) { events_.push({time, order_++, kind, session}); }

  int64_t TokensAfter(const Session& session) const {
    const SessionClass& kind = Class(session);
    const int64_t last = kind.context_tokens - (kind.turns - 1 - session.turn) * kind.output_tokens;
    return std::max(last, kind.output_tokens);
  }

  void Wish(int id) {
    sessions_[static_cast<size_t>(id)].wished_at = now_;
    Gpu& gpu = gpus_[static_cast<size_t>(sessions_[static_cast<size_t>(id)].gpu)];
    if (!gpu.waiting.empty() || !Start(id)) gpu.waiting.push_back(id);
  }

  // False when the sessions at work leave no room.
  bool Start(int id) {
    Session& session = sessions_[static_cast<size_t>(id)];
    Gpu& gpu = gpus_[static_cast<size_t>(session.gpu)];
    const int64_t need = machine_.sizer->Bytes({TokensAfter(session), 1, 0}).Cache();
    const int64_t own = session.place == Place::kDevice ? session.bytes : 0;
    if (session.place == Place::kDevice) gpu.idle.erase({session.last_use, id});
    int64_t evictable = 0;
    for (auto it = gpu.idle.begin();
         it != gpu.idle.end() && gpu.device_used - own + need - evictable > machine_.device_bytes; ++it) {
      evictable += sessions_[static_cast<size_t>(it->second)].bytes;
    }
    if (gpu.device_used - own + need - evictable > machine_.device_bytes) {
      if (session.place == Place::kDevice) gpu.idle.insert({session.last_use, id});
      return false;
    }
    while (gpu.device_used - own + need > machine_.device_bytes) EvictColdest(&gpu);
    Account(session);
    const Fetched fetched = Fetch(id, &session, &gpu);
    gpu.device_used += need - own;
    session.place = Place::kDevice;
    session.bytes = need;
    session.active = true;
    Hold(&gpu, now_, need);
    if (gpu.active++ == 0) gpu.busy_since = now_;
    const size_t batch = std::min(static_cast<size_t>(gpu.active), machine_.step_s.size() - 1);
    // Prefill and decoding share the GPU: a step is as much longer as the share that prefill has taken so
    // far.
    const double prefill = now_ > 0 ? std::min(kMostPrefill, gpu.prefill_s / (now_ + fetched.work_s)) : 0;
    const double decode_s =
        machine_.step_s[batch] * static_cast<double>(Class(session).output_tokens) / (1 - prefill);
    Push(now_ + fetched.queued_s + fetched.work_s + decode_s, Event::kFinish, id);
    if (Counted()) waits_.push_back(now_ - session.wished_at + fetched.queued_s);
    return true;
  }

  // Counts a returning turn by where its cache was found.
  void Account(const Session& session) {
    if (!Counted()) return;
    ++turns_;
    if (session.turn == 0) return;
    ++returning_;
    device_hits_ += session.place == Place::kDevice;
    host_hits_ += session.place == Place::kHost || (session.place == Place::kNowhere && session.host_copy);
  }

  // What a turn's past costs before its first token: behind the work of others, and its own.
  struct Fetched {
    double queued_s = 0;
    double work_s = 0;
  };

  // One after another: a turn's work starts when what was queued before is done.
  Fetched Queue(double work_s, double* free_at) const {
    const double start = std::max(now_, *free_at);
    *free_at = start + work_s;
    return {start - now_, work_s};
  }

  // Brings the cache of the turn's past: nothing to do, a copy from the host, or prefill. The copy of an
  // inclusive host tier stays where it is.
  Fetched Fetch(int id, Session* session, Gpu* gpu) {
    const int64_t prompt = TokensAfter(*session) - Class(*session).output_tokens;
    const bool on_host =
        session->place == Place::kHost || (session->place == Place::kNowhere && session->host_copy);
    if (session->place == Place::kDevice) return {};
    if (on_host) {
      if (session->place == Place::kHost) {
        gpu->host.erase({session->last_use, id});
        gpu->host_used -= session->bytes;
      }
      if (machine_.pcie_gb_s <= 0) return {};
      return Queue(static_cast<double>(session->bytes) / (machine_.pcie_gb_s * 1e9), &gpu->copy_free_at);
    }
    if (Counted() && session->turn > 0) recomputed_ += prompt;
    const double work_s = static_cast<double>(prompt) / machine_.prefill_tokens_per_s;
    gpu->prefill_s += work_s;
    return Queue(work_s, &gpu->prefill_free_at);
  }

  void Hold(Gpu* gpu, double until, int64_t more) const {
    gpu->held_area += static_cast<double>(gpu->held_bytes) * (until - gpu->held_since);
    gpu->held_since = until;
    gpu->held_bytes += more;
  }

  void EvictColdest(Gpu* gpu) {
    const int id = gpu->idle.begin()->second;
    gpu->idle.erase(gpu->idle.begin());
    Session& session = sessions_[static_cast<size_t>(id)];
    gpu->device_used -= session.bytes;
    session.place = Place::kNowhere;
    if (request_.mode == HostTierMode::kExclusive && MakeHostRoom(gpu, session.bytes)) {
      session.place = Place::kHost;
      gpu->host.insert({session.last_use, id});
      gpu->host_used += session.bytes;
    }
  }

  bool MakeHostRoom(Gpu* gpu, int64_t bytes) {
    if (bytes > host_bytes_) return false;
    while (gpu->host_used + bytes > host_bytes_) {
      const int id = gpu->host.begin()->second;
      gpu->host.erase(gpu->host.begin());
      Session& dropped = sessions_[static_cast<size_t>(id)];
      gpu->host_used -= HostBytes(dropped);
      if (dropped.place == Place::kHost) dropped.place = Place::kNowhere;
      dropped.host_copy = false;
    }
    return true;
  }

  // Inclusive copies are as large as the session was when its last turn ended.
  static int64_t HostBytes(const Session& session) {
    return session.host_copy ? session.copy_bytes : session.bytes;
  }

  void Finish(int id) {
    Session& session = sessions_[static_cast<size_t>(id)];
    Gpu& gpu = gpus_[static_cast<size_t>(session.gpu)];
    session.active = false;
    Hold(&gpu, now_, -session.bytes);
    if (--gpu.active == 0) gpu.busy_s += now_ - gpu.busy_since;
    if (session.host_copy) {  // the old copy is replaced
      gpu.host.erase({session.last_use, id});
      gpu.host_used -= HostBytes(session);
      session.host_copy = false;
    }
    session.last_use = now_;
    ++session.turn;
    if (session.turn >= Class(session).turns) {
      gpu.device_used -= session.bytes;
      session.place = Place::kNowhere;
    } else {
      gpu.idle.insert({session.last_use, id});
      if (request_.mode == HostTierMode::kInclusive && MakeHostRoom(&gpu, session.bytes)) {
        session.host_copy = true;
        session.copy_bytes = session.bytes;
        gpu.host.insert({session.last_use, id});
        gpu.host_used += session.bytes;
      }
      Push(now_ + Class(session).think_s, Event::kWish, id);
    }
    while (!gpu.waiting.empty() && Start(gpu.waiting.front())) gpu.waiting.pop_front();
  }

  FleetPoint Summary() {
    FleetPoint point;
    point.host_bytes = host_bytes_;
    point.groups = static_cast<int>(gpus_.size());
    point.gpus = point.groups * request_.plan.device.count;
    point.turns = turns_;
    const double returning = static_cast<double>(std::max<int64_t>(1, returning_));
    point.device_hit = static_cast<double>(device_hits_) / returning;
    point.host_hit = static_cast<double>(host_hits_) / returning;
    point.miss = returning_ == 0 ? 0 : 1 - point.device_hit - point.host_hit;
    const double counted_s = request_.duration_s * (1 - kWarmUp);
    point.recomputed_tokens_per_s = static_cast<double>(recomputed_) / counted_s;
    // Turns that still wait count with what they have waited.
    for (Gpu& gpu : gpus_) {
      for (int id : gpu.waiting)
        waits_.push_back(request_.duration_s - sessions_[static_cast<size_t>(id)].wished_at);
      if (gpu.active > 0) gpu.busy_s += request_.duration_s - gpu.busy_since;
      point.busy += gpu.busy_s / request_.duration_s / static_cast<double>(gpus_.size());
      Hold(&gpu, request_.duration_s, 0);
      point.held += gpu.held_area / request_.duration_s / static_cast<double>(machine_.device_bytes) /
                    static_cast<double>(gpus_.size());
      point.prefill_load += gpu.prefill_s / request_.duration_s / static_cast<double>(gpus_.size());
    }
    if (!waits_.empty()) {
      const size_t rank = (waits_.size() - 1) * 95 / 100;
      std::nth_element(waits_.begin(), waits_.begin() + static_cast<std::ptrdiff_t>(rank), waits_.end());
      point.wait_p95_s = waits_[rank];
    }
    return point;
  }

  const FleetRequest& request_;
  const Machine& machine_;
  const int64_t host_bytes_;
  std::vector<Gpu> gpus_;
  std::vector<Session> sessions_;
  std::priority_queue<Event, std::vector<Event>, std::greater<Event>> events_;
  int64_t order_ = 0;
  double now_ = 0;
  int64_t turns_ = 0, returning_ = 0, device_hits_ = 0, host_hits_ = 0, recomputed_ = 0;
  std::vector<double> waits_;
};

absl::Status CheckMix(const FleetRequest& request) {
  if (request.mix.empty()) return absl::InvalidArgumentError("workload: no session class");
  double sessions = 0;
  for (const SessionClass& kind : request.mix) {
    const std::string place = absl::StrCat("workload '", kind.name, "': ");
    if (kind.context_tokens < 1 || kind.context_tokens > (int64_t{1} << 26) || kind.output_tokens < 1 ||
        kind.turns < 1 || kind.turns > 10000) {
      return absl::InvalidArgumentError(
          absl::StrCat(place, "context_tokens, output_tokens and turns must be 1 or more"));
    }
    if (!(kind.rate_per_s > 0) || !(kind.think_s >= 0)) {
      return absl::InvalidArgumentError(
          absl::StrCat(place, "rate_per_s must be above 0 and think_s 0 or more"));
    }
    if (kind.output_tokens > kind.context_tokens) {
      return absl::InvalidArgumentError(absl::StrCat(place, "output_tokens is larger than context_tokens"));
    }
    if (kind.turns * kind.output_tokens > kind.context_tokens) {
      return absl::InvalidArgumentError(absl::StrCat(
          place, kind.turns, " turns of ", kind.output_tokens, " output tokens are ",
          kind.turns * kind.output_tokens, ", more than context_tokens ", kind.context_tokens,
          ", the whole session at its end; give fewer turns, fewer output_tokens or a longer context"));
    }
    sessions += kind.rate_per_s * request.duration_s;
  }
  if (sessions > kMaxSessions) {
    return absl::InvalidArgumentError(absl::StrCat("workload: ", static_cast<int64_t>(sessions),
                                                   " sessions in ", request.duration_s, " s, at most ",
                                                   kMaxSessions, "; shorten --duration"));
  }
  if (!(request.duration_s > 0) || !(request.prefill_tokens_per_s > 0) || request.max_gpus < 1) {
    return absl::InvalidArgumentError(
        "duration, prefill rate and the largest number of GPUs must be above 0");
  }
  return absl::OkStatus();
}

// Seconds of a decode step by batch, at the mean context of the mix.
std::vector<double> StepTimes(const FleetRequest& request, const KvSizer& sizer) {
  double context = 0, rate = 0;
  for (const SessionClass& kind : request.mix) {
    context += kind.rate_per_s * kind.turns * static_cast<double>(kind.context_tokens);
    rate += kind.rate_per_s * kind.turns;
  }
  const int64_t mean = static_cast<int64_t>(context / rate);
  const int count = request.plan.device.count;
  const bool serial = SplitsLayers(request.plan);
  const int64_t weights = request.plan.weights.bytes / (serial ? 1 : count);
  std::vector<double> step_s(1, 0.0);
  for (int batch = 1; batch <= kMaxBatch; ++batch) {
    StepTraffic traffic;
    (serial ? traffic.serial_devices : traffic.tensor_devices) = count;
    traffic.weight_bytes = ActiveWeightBytes(request.plan.model, weights, batch);
    traffic.kv_bytes = Product(sizer.ReadBytes(mean), batch, serial ? count : 1);
    step_s.push_back(
        PredictSpeed(request.plan.model, request.plan.device, request.plan.engine, traffic, batch).step_ms /
        1000);
  }
  return step_s;
}

// Fewest GPUs that keep the wait, by doubling and bisection; waits fall with more GPUs.
FleetPoint FewestGpus(const FleetRequest& request, const Machine& machine, int64_t host_bytes) {
  const auto acceptable = [&](const FleetPoint& point) { return point.wait_p95_s <= request.max_wait_s; };
  const int most = std::max(1, request.max_gpus / request.plan.device.count);
  int low = 0, high = 1;
  FleetPoint best = Simulation(request, machine, high, host_bytes).Run();
  while (!acceptable(best) && high < most) {
    low = high;
    high = std::min(2 * high, most);
    best = Simulation(request, machine, high, host_bytes).Run();
  }
  if (!acceptable(best)) {
    best.groups = best.gpus = 0;
    return best;
  }
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    const FleetPoint point = Simulation(request, machine, middle, host_bytes).Run();
    if (acceptable(point)) {
      high = middle, best = point;
    } else {
      low = middle;
    }
  }
  return best;
}

std::vector<int64_t> HostSizes(const FleetRequest& request, int64_t device_bytes) {
  if (!request.host_bytes.empty()) return request.host_bytes;
  return {0, device_bytes / 4, device_bytes / 2, device_bytes, 2 * device_bytes, 4 * device_bytes};
}

int FindBest(const std::vector<FleetPoint>& points) {
  int best = -1;
  for (int i = 0; i < static_cast<int>(points.size()); ++i) {
    const FleetPoint& point = points[static_cast<size_t>(i)];
    if (point.gpus == 0) continue;
    if (best < 0) {
      best = i;
      continue;
    }
    const FleetPoint& least = points[static_cast<size_t>(best)];
    if (point.gpus < least.gpus || (point.gpus == least.gpus && point.host_bytes < least.host_bytes))
      best = i;
  }
  return best;
}

void AddWarnings(const FleetRequest& request, FleetResult* result) {
  const FleetPoint& none = result->points.front();
  for (const FleetPoint& point : result->points) {
    if (point.host_bytes == 0) continue;
    if (request.mode == HostTierMode::kInclusive && point.host_bytes <= result->device_tier_bytes) {
      result->warnings.push_back(absl::StrCat("a write-through host tier of ", FormatBytes(point.host_bytes),
                                              " is not larger than the device tier of ",
                                              FormatBytes(result->device_tier_bytes),
                                              ": it holds copies of what the device has and gains nothing"));
    } else if (none.host_bytes == 0 && point.miss > none.miss - kLittleGain) {
      result->warnings.push_back(
          absl::StrCat("a host tier of ", FormatBytes(point.host_bytes), " gains less than ",
                       absl::StrFormat("%.1f %%", 100 * kLittleGain), " of the returning turns"));
    }
  }
  constexpr double kMuch = 0.3;
  if (result->best < 0 && none.prefill_load > kMuch) {
    result->warnings.push_back(
        absl::StrFormat("prefill takes %.0f %% of the time of %d GPUs, which decode the less: at %.0f prompt "
                        "tokens a second and GPU "
                        "the prompts alone are more than they can do",
                        100 * none.prefill_load, result->compared_gpus, request.prefill_tokens_per_s));
  }
  for (const SessionClass& kind : request.mix) {
    if (kind.turns > 1) return;
  }
  result->warnings.push_back(
      "no class has more than one turn: nothing ever comes back, a host tier cannot help");
}

}  // namespace

absl::StatusOr<std::vector<SessionClass>> ParseMixCsv(const std::string& csv, const std::string& file_name) {
  KVTIDE_ASSIGN_OR_RETURN(const std::vector<CsvRow> rows,
                          ParseCsv(csv, file_name, {"context_tokens", "rate_per_s"}));
  std::vector<SessionClass> mix;
  for (const CsvRow& row : rows) {
    SessionClass kind;
    int64_t turns = 1;
    kind.name = row.Text("name").empty() ? row.place() : row.Text("name");
    KVTIDE_ASSIGN_OR_RETURN(kind.context_tokens, row.Integer("context_tokens"));
    KVTIDE_ASSIGN_OR_RETURN(kind.rate_per_s, row.Number("rate_per_s"));
    KVTIDE_ASSIGN_OR_RETURN(kind.output_tokens,
                            row.Integer("output_tokens", std::min<int64_t>(256, kind.context_tokens)));
    KVTIDE_ASSIGN_OR_RETURN(turns, row.Integer("turns", 1));
    KVTIDE_ASSIGN_OR_RETURN(kind.think_s, row.Number("think_s", 30));
    if (turns < 1 || turns > 10000)
      return absl::InvalidArgumentError(absl::StrCat(row.place(), ": turns is ", turns));
    kind.turns = static_cast<int>(turns);
    mix.push_back(kind);
  }
  return mix;
}

absl::StatusOr<FleetResult> SimulateFleet(const FleetRequest& request) {
  KVTIDE_RETURN_IF_ERROR(CheckMix(request));
  PlanRequest plan = request.plan;
  plan.pairs = {request.pair};
  plan.workload.contexts = {1};
  plan.workload.concurrency = 1;
  for (const SessionClass& kind : request.mix)
    plan.workload.contexts[0] = std::max(plan.workload.contexts[0], kind.context_tokens);
  KVTIDE_ASSIGN_OR_RETURN(const Plan largest, MakePlan(plan));
  const Candidate& candidate = largest.contexts.front().candidates.front();
  if (candidate.free_bytes < 0) {
    return absl::FailedPreconditionError(
        absl::StrCat("one session of ", plan.workload.contexts[0], " tokens in ", request.pair.Name(),
                     " misses ", FormatBytes(-candidate.free_bytes), " on ", request.plan.device.name));
  }
  if (!candidate.speed.known) {
    return absl::InvalidArgumentError(
        "the bandwidth of the device and the weights must be known to simulate a fleet");
  }
  const ModelGeometry rank = PerDeviceGeometry(plan);
  KVTIDE_ASSIGN_OR_RETURN(const std::unique_ptr<KvSizer> sizer,
                          MakeKvSizer(plan.engine, rank, GroupLayers(rank), candidate.asked));
  Machine machine{candidate.kv_bytes + candidate.free_bytes, sizer.get(), StepTimes(request, *sizer),
                  plan.device.pcie_gb_s, request.prefill_tokens_per_s * plan.device.count};
  FleetResult result;
  result.cards_per_group = plan.device.count;
  result.device_tier_bytes = machine.device_bytes;
  for (int64_t host_bytes : HostSizes(request, machine.device_bytes)) {
    result.points.push_back(FewestGpus(request, machine, host_bytes));
    result.compared_gpus = std::max(result.compared_gpus, result.points.back().gpus);
  }
  if (result.compared_gpus == 0)
    result.compared_gpus = std::max(1, request.max_gpus / plan.device.count) * plan.device.count;
  for (FleetPoint& point : result.points) {
    const int groups = point.groups;
    point = Simulation(request, machine, result.compared_gpus / plan.device.count, point.host_bytes).Run();
    point.groups = groups;
    point.gpus = groups * plan.device.count;
  }
  result.best = FindBest(result.points);
  AddWarnings(request, &result);
  return result;
}

}  // namespace kvtide::planner
