// What the two reports of `kvtide eval` (with a model, of a captured file) have in common.
#pragma once

#include <algorithm>
#include <vector>

#include "clients/cli/eval/eval_layers.h"
#include "clients/cli/eval/eval_text.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {

// Sorts rows by bits, most first, then by harm(row), and marks those that no other row beats in both.
template <class Row, class Harm>
void SortAndMarkPareto(std::vector<Row>* rows, Harm harm) {
  std::sort(rows->begin(), rows->end(), [&](const Row& a, const Row& b) {
    return a.bits_per_value != b.bits_per_value ? a.bits_per_value > b.bits_per_value : harm(a) < harm(b);
  });
  for (Row& row : *rows) {
    row.pareto = std::none_of(rows->begin(), rows->end(), [&](const Row& other) {
      return other.bits_per_value <= row.bits_per_value && harm(other) <= harm(row) &&
             (other.bits_per_value < row.bits_per_value || harm(other) < harm(row));
    });
  }
}

inline nlohmann::ordered_json LayerErrorJson(const LayerError& e) {
  return {{"key_error", Rounded(e.key, 5)},
          {"value_error", Rounded(e.value, 5)},
          {"logit_error", Rounded(e.logit, 5)},
          {"output_error", Rounded(e.output, 5)},
          {"output_cosine", Rounded(e.output_cosine, 7)},
          {"weight_kld", Rounded(e.weight_kld, 5)},
          {"weight_top1", Rounded(e.weight_top1, 5)}};
}

// The errors of each layer, with its index.
inline nlohmann::ordered_json LayersJson(const std::vector<LayerError>& layers) {
  nlohmann::ordered_json json = nlohmann::ordered_json::array();
  for (size_t l = 0; l < layers.size(); ++l) {
    nlohmann::ordered_json layer = {{"layer", l}};
    layer.update(LayerErrorJson(layers[l]));
    json.push_back(std::move(layer));
  }
  return json;
}

// How a report was made, and room for its results.
template <class Report>
void AddConditions(const Report& report, nlohmann::ordered_json* json) {
  json->update({{"exact_window", report.window_policy},
                {"key_centring", report.key_centring},
                {"key_equalising", report.key_equalising},
                {"version", report.version},
                {"date", report.date},
                {"machine", report.machine},
                {"seconds", Rounded(report.seconds, 4)},
                {"results", nlohmann::ordered_json::array()}});
}

}  // namespace kvtide::cli
