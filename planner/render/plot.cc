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

// The distance of ticks that gives at most `most` of them: 1, 2 or 5 times a power of ten.
double TickStep(double range, int most) {
  const double power = std::pow(10.0, std::floor(std::log10(range / most)));
  for (double step : {1.0, 2.0, 5.0}) {
    if (range / (step * power) <= most) return step * power;
  }
  return 10 * power;
}

void DrawFrame(const Axes& axes, const std::string& title, const std::string& unit, std::string* svg) {
  absl::StrAppendFormat(
      svg, "<rect x=\"%d\" y=\"%d\" width=\"%d\" height=\"%d\" fill=\"none\" stroke=\"#999\"/>\n", kLeft,
      axes.top, kWidth - kLeft - kRight, axes.height);
  Text(svg, kLeft, axes.top - 10, "start", title);
  const double step = TickStep(axes.y_max, 6);
  for (int i = 0; i * step <= axes.y_max; ++i) {
    const double value = i * step;
    absl::StrAppendFormat(svg, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"#eee\"/>\n", kLeft,
                          kWidth - kRight, axes.Y(value), axes.Y(value));
    Text(svg, kLeft - 8, axes.Y(value) + 4, "end", absl::StrFormat("%.6g %s", value, unit));
  }
  for (int power = static_cast<int>(std::ceil(axes.x_min - 1e-9)); power <= axes.x_max + 1e-9; ++power) {
    const double context = std::ldexp(1.0, power);
    Text(svg, axes.X(context), axes.top + axes.height + 18, "middle",
         FormatTokens(static_cast<int64_t>(context)));
  }
}

// A name to stand at the right end of a line.
struct Label {
  double y;
  std::string text;
  const char* color;
};

// Writes labels beside the ends of their lines, moved apart where lines end close together.
void DrawLabels(const Axes& axes, std::vector<Label> labels, std::string* svg) {
  constexpr double kLine = 14;
  std::sort(labels.begin(), labels.end(), [](const Label& a, const Label& b) { return a.y < b.y; });
  double bottom = axes.top - kLine;
  std::vector<double> places;
  for (const Label& label : labels) {
    bottom = std::max(label.y, bottom + kLine);
    places.push_back(bottom);
  }
  // What ran over the lower edge moves up again.
  double limit = axes.top + axes.height;
  for (size_t i = places.size(); i-- > 0; limit = places[i] - kLine) places[i] = std::min(places[i], limit);
  for (size_t i = 0; i < labels.size(); ++i) {
    absl::StrAppendFormat(svg, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"%s\"/>\n",
                          kWidth - kRight, kWidth - kRight + 8, labels[i].y, places[i], labels[i].color);
    absl::StrAppendFormat(svg, "<text x=\"%d\" y=\"%.1f\" fill=\"%s\">%s</text>\n", kWidth - kRight + 11,
                          places[i] + 4, labels[i].color, Escape(labels[i].text));
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

// Context lengths of the asked range, evenly on a log scale; for a single one, from 1K or half of it up to
// it.
std::vector<int64_t> SampleContexts(const PlanRequest& request) {
  const auto [low, high] =
      std::minmax_element(request.workload.contexts.begin(), request.workload.contexts.end());
  int64_t first = *low, last = *high;
  if (first == last) first = std::min<int64_t>(1024, last / 2 + 1);
  first = std::max<int64_t>(request.workload.shared_prefix_tokens + 1, first);
  last = std::max(last, first + 1);
  std::vector<int64_t> contexts;
  for (int i = 0; i < kSamples; ++i) {
    const double power =
        std::log2(static_cast<double>(first)) +
        (std::log2(static_cast<double>(last)) - std::log2(static_cast<double>(first))) * i / (kSamples - 1);
    contexts.push_back(std::clamp<int64_t>(std::llround(std::exp2(power)), first, last));
  }
  return contexts;
}

// Pairs with a curve: those that can run, measured ones first, one of those with equal bytes and harm (bf16
// lies on f16), at most kMaxCurves.
std::vector<size_t> PickCurves(const ContextPlan& context) {
  std::vector<size_t> picked;
  const auto drawn = [&](const Candidate& candidate) {
    return std::any_of(picked.begin(), picked.end(), [&](size_t other) {
      const Candidate& there = context.candidates[other];
      return there.total_bytes == candidate.total_bytes && there.harm.measured == candidate.harm.measured &&
             there.harm.compared_percent() == candidate.harm.compared_percent();
    });
  };
  for (bool measured : {true, false}) {
    for (size_t i = 0; i < context.candidates.size() && picked.size() < kMaxCurves; ++i) {
      const Candidate& candidate = context.candidates[i];
      if (candidate.total_bytes > 0 && candidate.harm.measured == measured && !drawn(candidate))
        picked.push_back(i);
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
      harm = std::max(harm, context.candidates[i].harm.compared_percent());
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
  DrawFrame(memory,
            absl::StrCat("Device memory: ", plan.model_name, " in ", plan.engine_name, " on ",
                         request.device.count > 1 ? absl::StrCat(request.device.count, " x ") : "",
                         request.device.name),
            request.device.count > 1 ? "GiB per GPU" : "GiB", &svg);
  DrawFrame(quality, "Change of perplexity: dashed per pair, solid for the pair that is chosen", "%", &svg);

  const ContextPlan& end = plan.contexts.back();
  std::vector<Label> memory_labels, harm_labels;
  absl::StrAppend(&svg, "<g clip-path=\"url(#m)\">\n");
  // The first pair, f16, is drawn last: nothing lies on it.
  for (size_t n = curves.size(); n-- > 0;) {
    const Candidate& last = end.candidates[curves[n]];
    std::vector<Point> points;
    for (const ContextPlan& context : plan.contexts) {
      points.push_back(
          {static_cast<double>(context.context), GiB(context.candidates[curves[n]].total_bytes)});
    }
    DrawCurve(memory, points, kColors[n], !last.harm.measured, &svg);
    memory_labels.push_back({std::max<double>(memory.Y(points.back().y), memory.top),
                             absl::StrCat(last.asked.Name(), last.harm.measured ? "" : " (not measured)"),
                             kColors[n]});
  }
  absl::StrAppend(&svg, "</g>\n");
  const double line = memory.Y(GiB(plan.device_budget_bytes));
  absl::StrAppendFormat(
      &svg, "<line x1=\"%d\" x2=\"%d\" y1=\"%.1f\" y2=\"%.1f\" stroke=\"black\" stroke-width=\"1.5\"/>\n",
      kLeft, kWidth - kRight, line, line);
  memory_labels.push_back({line, absl::StrCat("device ", FormatBytes(plan.device_budget_bytes)), "black"});
  DrawLabels(memory, memory_labels, &svg);

  std::vector<Point> chosen;
  for (const ContextPlan& context : plan.contexts) {
    if (context.chosen < 0) continue;
    chosen.push_back(
        {static_cast<double>(context.context), context.candidates[context.chosen].harm.compared_percent()});
  }
  for (size_t n = curves.size(); n-- > 0;) {
    const Candidate& last = end.candidates[curves[n]];
    if (!last.harm.measured) continue;
    std::vector<Point> points;
    for (const ContextPlan& context : plan.contexts) {
      points.push_back(
          {static_cast<double>(context.context), context.candidates[curves[n]].harm.compared_percent()});
    }
    DrawCurve(quality, points, kColors[n], true, &svg);
    harm_labels.push_back({quality.Y(points.back().y), last.asked.Name(), kColors[n]});
  }
  if (!chosen.empty()) DrawCurve(quality, chosen, "black", false, &svg);
  DrawLabels(quality, harm_labels, &svg);
  return svg + "</svg>\n";
}

}  // namespace kvtide::planner
