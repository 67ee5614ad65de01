// How a model makes its keys. What coding a cache costs depends on that more than on the size of the model:
// a norm bounds keys, biases give them channels far from zero.
#pragma once

#include <string>
#include <vector>

#include "planner/model/geometry.h"

namespace kvtide::planner {

// Of the family that a catalogue name, model_type or architecture begins with; unknown for others.
KeyTraits KeyTraitsOfFamily(const std::string& name);

// What is compared between models.
struct KeyShape {
  int head_dim = 0;  // of the first layer with heads; 0 = unknown, or a latent
  int group = 0;     // query heads per KV head; 0 = unknown
  KeyTraits traits;
};
KeyShape KeyShapeOf(const ModelGeometry& model);

// In what `model` differs from `measured`, in words; empty when it resembles it: head dims within a factor of
// 2, groups of query heads within a factor of 4, norm and biases alike. What is unknown does not differ.
std::vector<std::string> Differences(const KeyShape& model, const KeyShape& measured);

}  // namespace kvtide::planner
