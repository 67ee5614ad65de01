#include "clients/cli/eval/eval_state.h"

#include "clients/cli/eval/state_file.h"
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
  KVTIDE_ASSIGN_OR_RETURN(const json saved, ReadStateFile(path, key, "scores"));
  try {
    for (const json& entry : saved) {
      state.scores_[{entry.at("pair"), entry.at("window")}] = FromJson(entry.at("score"));
    }
  } catch (const json::exception& error) {
    return NotAState(path, error.what());
  }
  return state;
}

absl::Status EvalState::Save() const {
  json scores = json::array();
  for (const auto& [where, score] : scores_) {
    scores.push_back({{"pair", where.first}, {"window", where.second}, {"score", ToJson(score)}});
  }
  return WriteStateFile(path_, key_, "scores", scores);
}

}  // namespace kvtide::cli
