#include "planner/render/plot.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/status.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

constexpr int kWidth = 960, kMemoryHeight = 420, kHarmHeight = 220, kLeft = 90, kRight = 190, kTop = 50,
              kGap = 60;
constexpr int kSamples = 48;
constexpr size_t kMaxCurves = 10;
const char* const kColors[] = {"#1b6ca8", "#d1495b", "#2e933c", "#edae49", "#6a4c93",
                               "#00798c", "#8d5524", "#5c5c5c", "#c2185b", "#455a64"};

std::string Escape(const std::string& text) {
  std::string escaped;
  for (char c : text) {
    if (c == '<')
      escaped += "&lt;";
    else if (c == '>')
      escaped += "&gt;";
    else if (c == '&')
      escaped += "&amp;";
    else
      escaped += c;
  }
  return escaped;
}

struct Axes {
  double x_min, x_max, y_max;
  int top, height;
  double X(double context) const {
    return kLeft + (std::log2(context) - x_min) / (x_max - x_min) * (kWidth - kLeft - kRight);
  }
  double Y(double value) const { return top + height - value / y_max * height; }
};

void Text(std::string* svg, double x, double y, const std::string& anchor, const std::string& text) {
  absl::StrAppendFormat(svg, "<text x=\"%.1f\" y=\"%.1f\" text-anchor=\"%s\">%s</text>\n", x, y, anchor,
                        Escape(text));
}

void DrawFrame(const Axes& axes, const std::string& title, const std::string& unit, std::string* svg) {
  absl::StrAppendFormat(
      svg, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"none\" stroke=\"#999\"/>\n", kLeft,
      axes.top, kWidth - kLeft - kRight, axes.height);
  Text(svg, kLeft, axes.top - 10, "start", title);
  for (int i = 0; i <= 4; ++i) {
    const double value = axes.y_max * i / 4;
    absl::StrAppendFormat(svg, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#eee\"/>\n", kLeft,
                          kWidth - kRight, axes.Y(value), axes.Y(value));
    Text(svg, kLeft - 8, axes.Y(value) + 4, "end", absl::StrFormat("%.4g %s", value, unit));
  }
  for (int power = static_cast<int>(std::ceil(axes.x_min)); power <= axes.x_max; ++power) {
    const double context = std::ldexp(1.0, power);
    Text(svg, axes.X(context), axes.top + axes.height + 18, "middle",
         FormatTokens(static_cast<int64_t>(context)));
  }
}

struct Point {
  double x, y;
};

void DrawCurve(const Axes& axes, const std::vector<Point>& points, const char* color, bool dashed,
               std::string* svg) {
  absl::StrAppendFormat(svg, "<polyline fill=\"none\" stroke=\"%s\" stroke-width=\"2\"%s points=\"", color,
                        dashed ? " stroke-dasharray=\"6 4\"" : "");
  for (const Point& point : points)
    absl::StrAppendFormat(svg, "%.1f,%.1f ", axes.X(point.x), axes.Y(point.y));
  absl::StrAppend(svg, "\"/>\n");
}

// Context lengths from 1K to the largest of interest, evenly on a log scale.
std::vector<int64_t> SampleContexts(const PlanRequest& request) {
  int64_t last = *std::max_element(request.workload.contexts.begin(), request.workload.contexts.end());
  last = std::max(last, request.model.max_context > 0 ? std::min(request.model.max_context, 4 * last) : last);
  const int64_t first =
      std::max<int64_t>(request.workload.shared_prefix_tokens + 1, std::min<int64_t>(1024, last / 2 + 1));
  last = std::max(last, first + 1);
  std::vector<int64_t> contexts;
  for (int i = 0; i < kSamples; ++i) {
    const double power =
        std::log2(static_cast<double>(first)) +
        (std::log2(static_cast<double>(last)) - std::log2(static_cast<double>(first))) * i / (kSamples - 1);
    contexts.push_back(std::max<int64_t>(first, std::llround(std::exp2(power))));
  }
  return contexts;
}

// Pairs with a curve: those that can run, measured ones first, at most kMaxCurves.
std::vector<size_t> PickCurves(const ContextPlan& context) {
  std::vector<size_t> picked;
  for (bool measured : {true, false}) {
    for (size_t i = 0; i < context.candidates.size() && picked.size() < kMaxCurves; ++i) {
      const Candidate& candidate = context.candidates[i];
      if (candidate.total_bytes > 0 && candidate.harm.measured == measured) picked.push_back(i);
    }
  }
  return picked;
}

double GiB(int64_t bytes) { return static_cast<double>(bytes) / kGiB; }

}  // namespace

absl::StatusOr<std::string> RenderSvg(const PlanRequest& request) {
  PlanRequest sampled = request;
  if (request.workload.contexts.empty())
    return absl::InvalidArgumentError("context: give at least one context length");
  sampled.workload.contexts = SampleContexts(request);
  KVTIDE_ASSIGN_OR_RETURN(const Plan plan, MakePlan(sampled));
  const std::vector<size_t> curves = PickCurves(plan.contexts.back());

  const double x_min = std::log2(static_cast<double>(sampled.workload.contexts.front()));
  const double x_max = std::log2(static_cast<double>(sampled.workload.contexts.back()));
  double most = GiB(plan.device_budget_bytes), harm = 0.1;
  for (const ContextPlan& context : plan.contexts) {
    for (size_t i : curves) {
      most =
          std::max(most, std::min(GiB(context.candidates[i].total_bytes), 3 * GiB(plan.device_budget_bytes)));
      harm = std::max(harm, context.candidates[i].harm.ppl_change_percent);
    }
  }
  const Axes memory{x_min, x_max, most * 1.05, kTop, kMemoryHeight};
  const Axes quality{x_min, x_max, harm * 1.1, kTop + kMemoryHeight + kGap, kHarmHeight};

  std::string svg = absl::StrFormat(
      "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"%d\" height=\"%d\" font-family=\"sans-serif\" "
      "font-size=\"12\">\n"
      "<rect width=\"100%%\" height=\"100%%\" fill=\"white\"/>\n"
      "<clipPath id=\"m\"><rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\"/></clipPath>\n",
      kWidth, kTop + kMemoryHeight + kGap + kHarmHeight + 40, kLeft, kTop, kWidth - kLeft - kRight,
      kMemoryHeight);
  DrawFrame(
      memory,
      absl::StrCat("Device memory: ", plan.model_name, " in ", plan.engine_name, " on ", request.device.name),
      "GiB", &svg);
  DrawFrame(quality, "Change of perplexity: dashed per pair, solid for the pair that is chosen", "%", &svg);

  absl::StrAppend(&svg, "<g clip-path=\"url(#m)\">\n");
  for (size_t n = 0; n < curves.size(); ++n) {
    std::vector<Point> points;
    for (const ContextPlan& context : plan.contexts) {
      points.push_back(
          {static_cast<double>(context.context), GiB(context.candidates[curves[n]].total_bytes)});
    }
    DrawCurve(memory, points, kColors[n], !plan.contexts.back().candidates[curves[n]].harm.measured, &svg);
  }
  absl::StrAppend(&svg, "</g>\n");
  const double line = memory.Y(GiB(plan.device_budget_bytes));
  absl::StrAppendFormat(
      &svg, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"black\" stroke-width=\"1.5\"/>\n",
      kLeft, kWidth - kRight, line, line);
  Text(&svg, kWidth - kRight + 6, line + 4, "start",
       absl::StrCat("device ", FormatBytes(plan.device_budget_bytes)));

  std::vector<Point> chosen;
  for (const ContextPlan& context : plan.contexts) {
    if (context.chosen < 0) continue;
    chosen.push_back(
        {static_cast<double>(context.context), context.candidates[context.chosen].harm.ppl_change_percent});
  }
  for (size_t n = 0; n < curves.size(); ++n) {
    std::vector<Point> points;
    const Harm& known = plan.contexts.back().candidates[curves[n]].harm;
    for (const ContextPlan& context : plan.contexts) {
      points.push_back(
          {static_cast<double>(context.context), context.candidates[curves[n]].harm.ppl_change_percent});
    }
    if (known.measured) DrawCurve(quality, points, kColors[n], true, &svg);
    const double y = kTop + 40 + 18.0 * static_cast<double>(n);
    absl::StrAppendFormat(&svg, "<rect x=\"%d\" y=\"%.1f\" width=\"12\" height=\"4\" fill=\"%s\"/>\n",
                          kWidth - kRight + 8, y - 6, kColors[n]);
    Text(&svg, kWidth - kRight + 26, y, "start",
         absl::StrCat(plan.contexts.back().candidates[curves[n]].asked.Name(),
                      known.measured ? "" : " (not measured)"));
  }
  if (!chosen.empty()) DrawCurve(quality, chosen, "black", false, &svg);
  return svg + "</svg>\n";
}

}  // namespace kvtide::planner
