// What to type so that an engine uses kvtide: the answer of `kvtide connect`, as data. Pure: MakeConnection
// reads no file and asks nobody.
//
// How an engine can use kvtide:
//   * cache    the engine keeps its own pages; what it computed rests in kvtided, coded, and comes back when
//   a
//              prompt begins with the same tokens (vLLM connector, SGLang storage, saved states of llama.cpp)
//   * pages    the engine's own pages are kvtide's (vLLM's attention backend): more tokens in the same memory
//   * both     its coded pages rest in kvtided as they are
#pragma once

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "nlohmann/json.hpp"
#include "planner/plan/plan.h"

namespace kvtide::cli {

enum class ServingEngine { kVllm, kSglang, kTransformers, kLlamaCpp };
const char* ServingEngineName(ServingEngine engine);
absl::StatusOr<ServingEngine> ParseServingEngine(const std::string& name);

enum class Way { kCache, kPages, kBoth };
const char* WayName(Way way);
absl::StatusOr<Way> ParseWay(const std::string& name);

struct ConnectRequest {
  ServingEngine engine = ServingEngine::kVllm;
  Way way = Way::kCache;
  std::string model;    // as the user wrote it, for the engine's command line
  std::string address;  // of kvtided
  int64_t context = 32768;
  int sequences = 64;
  int gpus = 1;               // tensor parallel
  bool gpu = true;            // the engine runs on a GPU
  int64_t host_bytes = 0;     // kvtided's host tier
  std::string disk;           // kvtided's disk tier, FOLDER:SIZE; empty = none
  std::string pair = "auto";  // a pair, or the choice below
  std::string profile;        // whole path of a profile of the model's keys; empty = none
  // Of the model at `context`, engine kvtide, `sequences` at once; every candidate's harm and bytes.
  planner::Plan plan;
  // llama.cpp: the flags that `kvtide plan --output llama-args` gives for the device.
  std::string llama_arguments;
};

// The pair in which an engine's tokens rest, and why in one sentence.
struct PairChoice {
  std::string pair;
  std::string reason;
  double bits_per_value = 0;
  double ratio_to_f16 = 0;
  int64_t bytes_of_context = 0;  // of one sequence of the plan's context, all GPUs together
};

// Pairs that harm more than this on the most alike measured model are never chosen, in percent of perplexity.
inline constexpr double kMostHarmPercent = 1.0;

// The least measured harm with which all sequences of the request fit: into the host tier, or, where the
// engine's pages are kvtide's, into the device. Where no pair lets them, the smallest that harms less than
// kMostHarmPercent. FailedPrecondition when nothing was measured; NotFound when the plan lacks the pair that
// the request names.
absl::StatusOr<PairChoice> ChoosePair(const ConnectRequest& request);

struct Connection {
  ServingEngine engine = ServingEngine::kVllm;
  Way way = Way::kCache;
  PairChoice choice;
  std::vector<std::string> install;  // shell lines
  std::vector<std::string> daemon;   // words of the daemon's command; empty = not needed
  std::vector<std::pair<std::string, std::string>> environment;  // before the engine's command
  std::vector<std::string> command;                              // words
  std::vector<std::string> code;    // lines of Python, for engines that are libraries
  nlohmann::ordered_json settings;  // the connector's configuration; null = none
  std::vector<std::string> verify;  // shell lines, and "# what they say"
  std::vector<std::string> notes;
};

// InvalidArgument for a way or a profile that the engine does not have.
absl::StatusOr<Connection> MakeConnection(const ConnectRequest& request);

// Lines that can be typed or pasted; what is not typed begins with #.
std::string RenderConnection(const Connection& connection);
std::string RenderConnectionJson(const Connection& connection);

}  // namespace kvtide::cli
