#include "clients/cli/eval_state.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {
namespace {

using nlohmann::json;

json ToJson(const PredictionScore& score) {
  json bins = json::array();
  for (const auto& [bin, count] : score.divergences.bins()) bins.push_back({bin, count});
  return {{"predictions", score.predictions},
          {"loss", score.loss},
          {"divergence", score.divergence},
          {"same_top", score.same_top},
          {"bytes", score.stored_bytes},
          {"tokens", score.stored_tokens},
          {"bins", bins}};
}

PredictionScore FromJson(const json& j) {
  PredictionScore score;
  score.predictions = j.at("predictions");
  score.loss = j.at("loss");
  score.divergence = j.at("divergence");
  score.same_top = j.at("same_top");
  score.stored_bytes = j.at("bytes");
  score.stored_tokens = j.at("tokens");
  for (const json& bin : j.at("bins")) score.divergences.AddBin(bin.at(0), bin.at(1));
  return score;
}

}  // namespace

absl::StatusOr<EvalState> EvalState::Open(const std::string& path, const std::string& key) {
  EvalState state;
  state.path_ = path;
  state.key_ = key;
  std::ifstream in(path);
  if (path.empty() || !in) return state;
  try {
    const json file = json::parse(in);
    if (file.at("run") != key) {
      return absl::FailedPreconditionError(absl::StrCat(path, " belongs to another run (",
                                                        std::string(file.at("run")), "); this one is ", key,
                                                        ". Remove it or name another file."));
    }
    for (const json& entry : file.at("scores")) {
      state.scores_[{entry.at("pair"), entry.at("window")}] = FromJson(entry.at("score"));
    }
  } catch (const json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(path, " is not a state of kvtide eval: ", error.what()));
  }
  return state;
}

absl::Status EvalState::Save() const {
  if (path_.empty()) return absl::OkStatus();
  json scores = json::array();
  for (const auto& [where, score] : scores_) {
    scores.push_back({{"pair", where.first}, {"window", where.second}, {"score", ToJson(score)}});
  }
  const std::string part = path_ + ".part";
  std::ofstream out(part);
  out << json{{"run", key_}, {"scores", scores}}.dump() << "\n";
  out.close();
  if (!out || std::rename(part.c_str(), path_.c_str()) != 0) {
    return absl::InternalError(absl::StrCat("cannot write ", path_, ": ", std::strerror(errno)));
  }
  return absl::OkStatus();
}

}  // namespace kvtide::cli
