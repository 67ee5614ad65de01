// Measured harm of a pair. Rows come from `kvtide eval`; the planner ranks pairs by them and never chooses a
// pair without one. f16/f16 and bf16/bf16 are the yardstick: harm 0 by definition.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/model/key_traits.h"
#include "planner/type_pair.h"

namespace kvtide::planner {

struct CalibratedKeys;  // engines/engine.h

struct QualityRow {
  std::string model;  // as catalogues call it, or as the file does
  std::string text;
  int64_t tokens = 0;
  int64_t context = 0;
  TypePair pair;
  // The text of the profile around whose means keys were coded (`kvtide eval --profile`), and with whose
  // transforms in tide types; empty = no profile. In files "TEXT@after-rope" is one whose
  // transforms are of keys after RoPE.
  std::string key_profile;
  bool after_rope = false;
  std::string window_policy;  // "default", "none", or "F+L" (exact blocks at either end)
  double ppl_change_percent = 0;
  double kld_mean = 0;
  double kld_p99 = 0;
  double top1_agreement = 0;
  double bits_per_value = 0;
  std::string version;
  std::string date;
  KeyShape shape;  // of the model; unknown for models that no catalogue has
};

// How much a pair harms, and how that is known.
struct Harm {
  bool measured = false;
  bool proxy = false;  // measured on another model
  double ppl_change_percent = 0;
  std::string model;  // of the row; empty for f16
  int64_t context = 0;
  std::string text;  // of the row, and how much of it
  int64_t tokens = 0;
  std::string key_profile;  // the text of its profile; empty = measured without one
  bool after_rope = false;  // keys were coded after RoPE by transforms of it
  bool calibrated = false;  // a model that counts measured the pair with a profile: keys are coded by one
  // More than ppl_change_percent where a model that counts measured other pairs, but not this one, and takes
  // those worse. Pairs are compared, shown and drawn by compared_percent().
  double expected_percent = 0;
  std::string expected_of;  // that model
  bool resembles = true;    // a proxy that resembles the asked model
  bool own_format = false;  // the only format that the engine has for the model: there is nothing to choose

  double compared_percent() const { return std::max(ppl_change_percent, expected_percent); }
};

// CSV with a header line; the columns are named as in QualityRow with pair_k and pair_v. Lines that start
// with # are comments. An error names line and column.
absl::StatusOr<std::vector<QualityRow>> ParseQualityCsv(const std::string& csv, const std::string& file_name);

// The rows built into the program.
const std::vector<QualityRow>& BuiltInQuality();

// What is known of harm for one model: its own rows; without them, if proxies are accepted, those of the
// measured models that resemble it (key_traits.h), and if none does, of all. Of several models and texts the
// worst counts. With a profile of the keys a model's rows with a profile count for the pairs that have such,
// and for the others those without; else only the latter. Of calibrated types the rows count whose keys were
// coded as the profile does it. Made once per plan; Find is a pure function then.
class HarmTable {
 public:
  HarmTable(const std::vector<QualityRow>& rows, const ModelGeometry& model, const std::string& window_policy,
            bool accept_proxy, const CalibratedKeys* keys = nullptr);

  // At a context: of each model the rows nearest to it. Pairs of the same bytes count as one.
  Harm Find(const TypePair& pair, int64_t context) const;

  // In what the asked model differs from every measured one; empty when one resembles it or is it.
  const std::string& differences() const { return differences_; }

 private:
  struct Measured {
    std::string pair;  // as stored: names of the same bytes are one
    int64_t context;
    double percent;
    std::string text;
    int64_t tokens;
    std::string key_profile;
    bool after_rope;
  };
  struct Model {
    std::string name;
    bool own = false;
    bool resembles = true;
    std::vector<Measured> rows;
  };
  const Model* Own() const;
  // Of each model and pair: rows with a profile, where there are some.
  void PreferCalibrated();
  // Of one model: the worst of the rows nearest in context; nullptr when it has none of the pair.
  static const Measured* Nearest(const Model& model, const std::string& pair, int64_t context);
  // How much worse `model` takes the pairs that both measured; 0 when there are too few.
  static double Ratio(const Model& model, const Model& other);

  std::vector<Model> models_;  // those that count
  std::string differences_;
  std::vector<std::vector<double>> ratios_;  // of models_, row over column
};

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
