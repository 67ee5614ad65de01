// A plot of harm against bits as SVG: one point per pair, harm on a scale of decades, the Pareto front as a
// line. Pure functions.
#pragma once

#include <string>
#include <vector>

namespace kvtide::cli {

struct PlotPoint {
  std::string label;
  std::string note;  // shown under the pointer
  double bits = 0;
  double harm = 0;
  bool front = false;
};

// The points of the front from left to right or from right to left.
std::string RenderHarmPlot(const std::string& title, const std::string& subtitle,
                           const std::string& harm_axis, const std::vector<PlotPoint>& points);

}  // namespace kvtide::cli
