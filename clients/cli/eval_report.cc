#include "clients/cli/eval_report.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "clients/cli/table.h"
#include "nlohmann/json.hpp"

namespace kvtide::cli {
namespace {

using nlohmann::ordered_json;

bool IsYardstick(const EvalRow& row) { return row.pair == "f16/f16"; }

// Numbers with the digits that mean something.
double Rounded(double x, int digits) {
  if (x == 0 || !std::isfinite(x)) return x;
  const double unit = std::pow(10.0, digits - 1 - static_cast<int>(std::floor(std::log10(std::abs(x)))));
  return std::round(x * unit) / unit;
}

ordered_json RowJson(const EvalRow& row) {
  ordered_json json = {{"pair", row.pair},
                       {"perplexity", Rounded(row.perplexity, 8)},
                       {"change_percent", Rounded(row.change_percent, 6)},
                       {"kld_mean", Rounded(row.kld_mean, 6)},
                       {"kld_p99", Rounded(row.kld_p99, 3)},
                       {"top1_agreement", Rounded(row.top1_agreement, 6)},
                       {"bits_per_value", Rounded(row.bits_per_value, 6)},
                       {"pareto", row.pareto}};
  for (size_t l = 0; l < row.layers.size(); ++l) {
    json["layers"].push_back({{"layer", l},
                              {"key_error", Rounded(row.layers[l].key, 5)},
                              {"value_error", Rounded(row.layers[l].value, 5)},
                              {"logit_error", Rounded(row.layers[l].logit, 5)}});
  }
  for (const NeedleScore& needle : row.needles) {
    json["needles"].push_back({{"depth", Rounded(needle.depth, 4)},
                               {"asked", needle.asked},
                               {"found", needle.found},
                               {"log_likelihood", Rounded(needle.log_likelihood, 5)}});
  }
  return json;
}

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

// A cell of a CSV line: quoted when it has to be.
std::string CsvCell(const std::string& text) {
  if (text.find_first_of(",\"\n") == std::string::npos) return text;
  std::string out = "\"";
  for (const char c : text) out += c == '"' ? "\"\"" : std::string(1, c);
  return out + "\"";
}

// Bits from left to right, divergence upwards on a scale of decades.
class Plot {
 public:
  static constexpr int kWidth = 860, kHeight = 540, kLeft = 80, kRight = 30, kTop = 56, kBottom = 60;

  explicit Plot(const std::vector<const EvalRow*>& rows) {
    for (const EvalRow* row : rows) {
      most_bits_ = std::max(most_bits_, std::ceil(row->bits_per_value));
      lowest_ = std::min(lowest_, std::floor(std::log10(Harm(*row))));
      highest_ = std::max(highest_, std::ceil(std::log10(Harm(*row))));
    }
    if (lowest_ >= highest_) highest_ = lowest_ + 1;
  }

  static double Harm(const EvalRow& row) { return std::max(row.kld_mean, 1e-7); }
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
        &svg,
        "<text x='20' y='%d' text-anchor='middle' transform='rotate(-90 20 %d)'>mean divergence from "
        "f16, nats per token</text>\n",
        kHeight / 2, kHeight / 2);
    return svg;
  }

 private:
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

void SortAndMark(std::vector<EvalRow>* rows) {
  std::sort(rows->begin(), rows->end(), [](const EvalRow& a, const EvalRow& b) {
    return a.bits_per_value != b.bits_per_value ? a.bits_per_value > b.bits_per_value
                                                : a.kld_mean < b.kld_mean;
  });
  for (EvalRow& row : *rows) {
    row.pareto = std::none_of(rows->begin(), rows->end(), [&](const EvalRow& other) {
      return other.bits_per_value <= row.bits_per_value && other.kld_mean <= row.kld_mean &&
             (other.bits_per_value < row.bits_per_value || other.kld_mean < row.kld_mean);
    });
  }
}

std::string RenderTable(const EvalReport& report, const Terminal& terminal) {
  const bool needles = std::any_of(report.rows.begin(), report.rows.end(),
                                   [](const EvalRow& r) { return !r.needles.empty(); });
  std::vector<Table::Column> columns = {
      {"pair", Align::kLeft}, {"bits/value"}, {"vs f16"},    {"perplexity"}, {"change"},
      {"mean KLD"},           {"p99 KLD"},    {"same top-1"}};
  if (needles) columns.push_back({"needles"});
  columns.push_back({"", Align::kLeft});
  Table table(columns);
  for (const EvalRow& row : report.rows) {
    std::vector<std::string> cells = {
        row.pair,
        absl::StrFormat("%.3f", row.bits_per_value),
        absl::StrFormat("%.2fx", 16 / row.bits_per_value),
        absl::StrFormat("%.4f", row.perplexity),
        IsYardstick(row) ? "" : absl::StrFormat("%+.3f %%", row.change_percent),
        IsYardstick(row) ? "" : absl::StrFormat("%.2e", row.kld_mean),
        IsYardstick(row) ? "" : absl::StrFormat("%.2e", row.kld_p99),
        IsYardstick(row) ? "" : absl::StrFormat("%.2f %%", 100 * row.top1_agreement)};
    if (needles) {
      int64_t asked = 0, found = 0;
      for (const NeedleScore& needle : row.needles) {
        asked += needle.asked;
        found += needle.found;
      }
      cells.push_back(absl::StrCat(found, "/", asked));
    }
    cells.push_back(row.pareto ? "* Pareto" : "");
    table.AddRow(std::move(cells), row.pareto ? Paint::kGreen : Paint::kPlain);
  }
  return absl::StrCat(
      report.model, " on ", report.text, ": ", report.windows, " windows of ", report.context,
      " tokens, exact window ", report.window_policy, ", key centring ", report.key_centring, "\n",
      table.Render(terminal),
      terminal.Painted(
          "Bits count everything that the daemon holds for a sequence of this length. KLD: divergence from "
          "f16's prediction, nats per token.\n",
          Paint::kDim));
}

std::string RenderJson(const EvalReport& report) {
  ordered_json json = {{"model", report.model},
                       {"parameters", report.parameters},
                       {"text", report.text},
                       {"tokens", report.tokens},
                       {"windows", report.windows},
                       {"context", report.context},
                       {"chunk", report.chunk},
                       {"exact_window", report.window_policy},
                       {"key_centring", report.key_centring},
                       {"key_equalising", report.key_equalising},
                       {"version", report.version},
                       {"date", report.date},
                       {"machine", report.machine},
                       {"seconds", Rounded(report.seconds, 4)},
                       {"results", ordered_json::array()}};
  for (const EvalRow& row : report.rows) json["results"].push_back(RowJson(row));
  return json.dump(1) + "\n";
}

std::string RenderCsv(const EvalReport& report) {
  std::string csv =
      "model,text,tokens,context,pair_k,pair_v,window_policy,ppl_change_percent,kld_mean,kld_p99,top1_"
      "agreement,"
      "bits_per_value,version,date\n";
  for (const EvalRow& row : report.rows) {
    if (IsYardstick(row)) continue;
    const size_t slash = row.pair.find('/');
    absl::StrAppend(&csv, CsvCell(report.model), ",", CsvCell(report.text), ",", report.tokens, ",",
                    report.context, ",", row.pair.substr(0, slash), ",", row.pair.substr(slash + 1), ",",
                    report.window_policy, ",");
    absl::StrAppendFormat(&csv, "%.4f,%.4g,%.3g,%.5f,%.4f,%s,%s\n", row.change_percent, row.kld_mean,
                          row.kld_p99, row.top1_agreement, row.bits_per_value, report.version, report.date);
  }
  return csv;
}

std::string RenderSvg(const EvalReport& report) {
  std::vector<const EvalRow*> rows;
  for (const EvalRow& row : report.rows) {
    if (!IsYardstick(row)) rows.push_back(&row);
  }
  const Plot plot(rows);
  std::string svg = absl::StrFormat(
      "<svg xmlns='http://www.w3.org/2000/svg' width='%d' height='%d' viewBox='0 0 %d %d' "
      "font-family='sans-serif' "
      "font-size='12'>\n<style>.grid{stroke:#ddd}.front{fill:none;stroke:#1a7f37;stroke-width:1.5}</style>\n"
      "<rect width='100%%' height='100%%' fill='white'/>\n",
      Plot::kWidth, Plot::kHeight, Plot::kWidth, Plot::kHeight);
  absl::StrAppendFormat(
      &svg, "<text x='%d' y='22' font-size='15' font-weight='bold'>%s: harm against size</text>\n",
      Plot::kLeft, Escaped(report.model));
  absl::StrAppendFormat(
      &svg, "<text x='%d' y='40' fill='#555'>%s, %d windows of %d tokens, exact window %s</text>\n",
      Plot::kLeft, Escaped(report.text), report.windows, report.context, report.window_policy);
  svg += plot.Axes();
  std::string front;
  for (const EvalRow* row : rows) {
    if (row->pareto)
      absl::StrAppendFormat(&front, "%.1f,%.1f ", plot.X(row->bits_per_value), plot.Y(Plot::Harm(*row)));
  }
  absl::StrAppend(&svg, "<polyline class='front' points='", front, "'/>\n");
  std::sort(rows.begin(), rows.end(),
            [](const EvalRow* p, const EvalRow* q) { return Plot::Harm(*p) > Plot::Harm(*q); });
  Labels labels;
  for (const EvalRow* row : rows) {
    const double x = plot.X(row->bits_per_value), y = plot.Y(Plot::Harm(*row));
    svg += labels.Place(x, y, row->pair, absl::StrFormat("%+.3f %% perplexity", row->change_percent));
    absl::StrAppendFormat(&svg, "<circle cx='%.1f' cy='%.1f' r='4' fill='%s'/>\n", x, y,
                          row->pareto ? "#1a7f37" : "#888");
  }
  return svg + "</svg>\n";
}

}  // namespace kvtide::cli
