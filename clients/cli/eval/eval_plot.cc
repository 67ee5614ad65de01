#include "clients/cli/eval/eval_plot.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace kvtide::cli {
namespace {

std::string Escaped(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '&') {
      out += "&amp;";
    } else if (c == '<') {
      out += "&lt;";
    } else if (c == '>') {
      out += "&gt;";
    } else {
      out += c;
    }
  }
  return out;
}

// Bits from left to right, harm upwards on a scale of decades.
class Plot {
 public:
  static constexpr int kWidth = 860, kHeight = 540, kLeft = 80, kRight = 30, kTop = 56, kBottom = 60;

  Plot(const std::vector<PlotPoint>& points, std::string harm_axis) : harm_axis_(std::move(harm_axis)) {
    for (const PlotPoint& point : points) {
      most_bits_ = std::max(most_bits_, std::ceil(point.bits));
      lowest_ = std::min(lowest_, std::floor(std::log10(Harm(point))));
      highest_ = std::max(highest_, std::ceil(std::log10(Harm(point))));
    }
    if (lowest_ >= highest_) highest_ = lowest_ + 1;
  }

  static double Harm(const PlotPoint& point) { return std::max(point.harm, 1e-7); }
  double X(double bits) const { return kLeft + bits / most_bits_ * (kWidth - kLeft - kRight); }
  double Y(double harm) const {
    const double share = (std::log10(harm) - lowest_) / (highest_ - lowest_);
    return kHeight - kBottom - share * (kHeight - kTop - kBottom);
  }

  std::string Axes() const {
    std::string svg;
    for (int bits = 0; bits <= static_cast<int>(most_bits_); bits += most_bits_ > 10 ? 2 : 1) {
      absl::StrAppendFormat(&svg, "<line class='grid' x1='%.1f' y1='%d' x2='%.1f' y2='%d'/>\n", X(bits), kTop,
                            X(bits), kHeight - kBottom);
      absl::StrAppendFormat(&svg, "<text x='%.1f' y='%d' text-anchor='middle'>%d</text>\n", X(bits),
                            kHeight - kBottom + 18, bits);
    }
    for (int decade = static_cast<int>(lowest_); decade <= static_cast<int>(highest_); ++decade) {
      const double y = Y(std::pow(10.0, decade));
      absl::StrAppendFormat(&svg, "<line class='grid' x1='%d' y1='%.1f' x2='%d' y2='%.1f'/>\n", kLeft, y,
                            kWidth - kRight, y);
      absl::StrAppendFormat(&svg, "<text x='%d' y='%.1f' text-anchor='end'>1e%d</text>\n", kLeft - 8, y + 4,
                            decade);
    }
    absl::StrAppendFormat(&svg, "<text x='%d' y='%d' text-anchor='middle'>true bits per value</text>\n",
                          (kLeft + kWidth - kRight) / 2, kHeight - 16);
    absl::StrAppendFormat(
        &svg, "<text x='20' y='%d' text-anchor='middle' transform='rotate(-90 20 %d)'>%s</text>\n",
        kHeight / 2, kHeight / 2, Escaped(harm_axis_));
    return svg;
  }

 private:
  const std::string harm_axis_;
  double most_bits_ = 1, lowest_ = 9, highest_ = -9;
};

// Places labels right of their points (left at the right edge), moved down until none lies on another.
class Labels {
 public:
  // Labels have to come from top to bottom.
  std::string Place(double x, double y, const std::string& text, const std::string& title) {
    constexpr double kCharacter = 6.6, kLine = 12;
    const double width = kCharacter * static_cast<double>(text.size());
    const bool right = x + 10 + width < Plot::kWidth;
    const double left = right ? x + 10 : x - 10 - width;
    double at = y + 4;
    bool moved = true;
    while (moved) {
      moved = false;
      for (const Box& box : boxes_) {
        if (left < box.left + box.width && box.left < left + width && std::abs(at - box.y) < kLine) {
          at = box.y + kLine;
          moved = true;
        }
      }
    }
    boxes_.push_back({left, width, at});
    std::string svg;
    if (at - y > kLine) {
      absl::StrAppendFormat(&svg, "<line x1='%.1f' y1='%.1f' x2='%.1f' y2='%.1f' stroke='#bbb'/>\n", x, y,
                            right ? left - 2 : left + width + 2, at - 4);
    }
    absl::StrAppendFormat(&svg, "<text x='%.1f' y='%.1f'>%s<title>%s</title></text>\n", left, at,
                          Escaped(text), Escaped(title));
    return svg;
  }

 private:
  struct Box {
    double left, width, y;
  };
  std::vector<Box> boxes_;
};

}  // namespace

std::string RenderHarmPlot(const std::string& title, const std::string& subtitle,
                           const std::string& harm_axis, const std::vector<PlotPoint>& points) {
  const Plot plot(points, harm_axis);
  std::string svg = absl::StrFormat(
      "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' viewBox='0 0 %d %d' "
      "font-family='sans-serif' "
      "font-size='12'>\n<style>.grid{stroke:#ddd}.front{fill:none;stroke:#1a7f37;stroke-width:1.5}</style>\n"
      "<rect width='100%%' height='100%%' fill='white'/>\n",
      Plot::kWidth, Plot::kHeight, Plot::kWidth, Plot::kHeight);
  absl::StrAppendFormat(&svg, "<text x='%d' y='22' font-size='15' font-weight='bold'>%s</text>\n",
                        Plot::kLeft, Escaped(title));
  absl::StrAppendFormat(&svg, "<text x='%d' y='40' fill='#555'>%s</text>\n", Plot::kLeft, Escaped(subtitle));
  svg += plot.Axes();
  std::string front;
  for (const PlotPoint& point : points) {
    if (point.front)
      absl::StrAppendFormat(&front, "%.1f,%.1f ", plot.X(point.bits), plot.Y(Plot::Harm(point)));
  }
  absl::StrAppend(&svg, "<polyline class='front' points='", front, "'/>\n");
  std::vector<PlotPoint> sorted = points;
  std::sort(sorted.begin(), sorted.end(),
            [](const PlotPoint& p, const PlotPoint& q) { return Plot::Harm(p) > Plot::Harm(q); });
  Labels labels;
  for (const PlotPoint& point : sorted) {
    const double x = plot.X(point.bits), y = plot.Y(Plot::Harm(point));
    svg += labels.Place(x, y, point.label, point.note);
    absl::StrAppendFormat(&svg, "<circle cx='%.1f' cy='%.1f' r='4' fill='%s'/>\n", x, y,
                          point.front ? "#1a7f37" : "#888");
  }
  return svg + "</svg>\n";
}

}  // namespace kvtide::cli
