// Measured harm of a pair. Rows come from `kvtide eval`; the planner ranks pairs by them and never chooses a
// pair without one. f16/f16 and bf16/bf16 are the yardstick: harm 0 by definition.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/type_pair.h"

namespace kvtide::planner {

struct QualityRow {
  std::string model;
  std::string text;
  int64_t tokens = 0;
  int64_t context = 0;
  TypePair pair;
  std::string window_policy;  // "default", "none", or "F+L" (exact blocks at either end)
  double ppl_change_percent = 0;
  double kld_mean = 0;
  double kld_p99 = 0;
  double top1_agreement = 0;
  double bits_per_value = 0;
  std::string version;
  std::string date;
};

// How much a pair harms, and how that is known.
struct Harm {
  bool measured = false;
  bool proxy = false;  // measured on another model
  double ppl_change_percent = 0;
  std::string model;  // of the row; empty for f16
  int64_t context = 0;
};

// CSV with a header line; the columns are named as in QualityRow with pair_k and pair_v. Lines that start
// with # are comments. An error names line and column.
absl::StatusOr<std::vector<QualityRow>> ParseQualityCsv(const std::string& csv, const std::string& file_name);

// The rows built into the program.
const std::vector<QualityRow>& BuiltInQuality();

// The harm of `pair` for `model` at `context` (pairs of the same bytes count as one): the row of this model
// and window policy with the nearest context; failing that, if proxies are accepted, the worst of the other
// models' rows.
Harm FindHarm(const std::vector<QualityRow>& rows, const TypePair& pair, const std::string& model,
              const std::string& window_policy, int64_t context, bool accept_proxy);

// A number somebody published; shown beside a plan, never used in it.
struct Claim {
  std::string pair;
  std::string models;  // catalogue names, separated by ';'; empty = any
  std::string claim;
  std::string verdict;
  std::string source;
};
const std::vector<Claim>& PublishedClaims();

}  // namespace kvtide::planner
