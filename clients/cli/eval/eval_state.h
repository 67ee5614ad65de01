// What a stopped `kvtide eval` needs to go on: the scores of finished windows, in a JSON file that is
// replaced as a whole after every window. A file of another run (other model, text, context, window or build)
// is refused.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "clients/cli/eval/eval_score.h"

namespace kvtide::cli {

class EvalState {
 public:
  // `key` describes everything that changes scores. With an empty path nothing is read or written.
  static absl::StatusOr<EvalState> Open(const std::string& path, const std::string& key);

  bool Has(const std::string& pair, int window) const { return scores_.count({pair, window}) > 0; }
  const PredictionScore& Get(const std::string& pair, int window) const { return scores_.at({pair, window}); }
  void Put(const std::string& pair, int window, const PredictionScore& score) {
    scores_[{pair, window}] = score;
  }
  absl::Status Save() const;

 private:
  std::string path_, key_;
  std::map<std::pair<std::string, int>, PredictionScore> scores_;
};

}  // namespace kvtide::cli
