#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "planner/fleet/fleet.h"
#include "planner/units.h"

namespace kvtide::planner {

std::string RenderFleetTable(const FleetRequest& request, const FleetResult& result) {
  const int cards = result.cards_per_group;
  std::string text =
      absl::StrFormat("%s, %s, %s on %s: device tier %s per GPU, seed %d\n", request.plan.model.name,
                      EngineName(request.plan.engine.engine), request.pair.Name(), request.plan.device.name,
                      FormatBytes(result.device_tier_bytes), request.seed);
  absl::StrAppendFormat(&text, "%12s %6s %11s %9s %7s %15s %8s %11s %6s\n", "host/GPU", "GPUs", "device hit",
                        "host hit", "miss", "recomputed t/s", "prefill", "wait p95 s", "held");
  for (const FleetPoint& point : result.points) {
    absl::StrAppendFormat(&text, "%12s %6s %10.1f%% %8.1f%% %6.1f%% %15.0f %7.0f%% %11.2f %5.0f%%\n",
                          FormatBytes(point.host_bytes),
                          point.gpus == 0 ? absl::StrCat(">", request.max_gpus) : absl::StrCat(point.gpus),
                          100 * point.device_hit, 100 * point.host_hit, 100 * point.miss,
                          point.recomputed_tokens_per_s, 100 * point.prefill_load, point.wait_p95_s,
                          100 * point.held);
  }
  absl::StrAppendFormat(&text,
                        "hits, waits and load are those of %d GPUs; GPUs = fewest that keep the wait below "
                        "%.1f s; prefill = share of its "
                        "capacity, held = share of the cache that turns at work hold\n",
                        result.compared_gpus, request.max_wait_s);
  if (result.best >= 0) {
    const FleetPoint& best = result.points[static_cast<size_t>(result.best)];
    absl::StrAppend(
        &text, "answer: ", best.gpus, best.gpus == 1 ? " GPU" : " GPUs",
        cards > 1 ? absl::StrCat(" in ", best.groups, best.groups == 1 ? " group of " : " groups of ", cards)
                  : "",
        " with ",
        best.host_bytes == 0 ? std::string("no host tier")
                             : absl::StrCat("a host tier of ", FormatBytes(best.host_bytes), " each"),
        "\n");
  } else {
    absl::StrAppend(&text, "answer: ", request.max_gpus, " GPUs do not suffice\n");
  }
  for (const std::string& warning : result.warnings) absl::StrAppend(&text, "warning: ", warning, "\n");
  absl::StrAppendFormat(
      &text,
      "assumed: prefill at %.0f tokens/s per GPU, shared by its turns (measure yours: --prefill-rate); "
      "a turn keeps the step time it started with\n",
      request.prefill_tokens_per_s);
  return text;
}

std::string RenderFleetJson(const FleetRequest& request, const FleetResult& result) {
  nlohmann::ordered_json json;
  json["schema"] = "kvtide.fleet/1";
  json["model"] = request.plan.model.name;
  json["engine"] = EngineName(request.plan.engine.engine);
  json["pair"] = request.pair.Name();
  json["device"] = request.plan.device.name;
  json["device_tier_bytes"] = result.device_tier_bytes;
  json["compared_gpus"] = result.compared_gpus;
  json["cards_per_group"] = result.cards_per_group;
  json["seed"] = request.seed;
  json["host_tier_mode"] = request.mode == HostTierMode::kExclusive ? "exclusive" : "inclusive";
  json["prefill_tokens_per_s"] = request.prefill_tokens_per_s;
  json["points"] = nlohmann::ordered_json::array();
  for (const FleetPoint& point : result.points) {
    json["points"].push_back({{"host_bytes", point.host_bytes},
                              {"gpus", point.gpus},
                              {"groups", point.groups},
                              {"device_hit", point.device_hit},
                              {"host_hit", point.host_hit},
                              {"miss", point.miss},
                              {"recomputed_tokens_per_s", point.recomputed_tokens_per_s},
                              {"wait_p95_s", point.wait_p95_s},
                              {"busy", point.busy},
                              {"held", point.held},
                              {"prefill_load", point.prefill_load},
                              {"turns", point.turns}});
  }
  json["best"] = result.best >= 0 ? nlohmann::ordered_json(result.best) : nlohmann::ordered_json(nullptr);
  json["warnings"] = result.warnings;
  return json.dump(2) + "\n";
}

}  // namespace kvtide::planner
