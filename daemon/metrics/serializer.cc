#include "daemon/metrics/serializer.h"

#include <charconv>
#include <cmath>
#include <limits>
#include <string_view>

#include "absl/strings/str_cat.h"
#include "kernels/base/check.h"

namespace kvtide::metrics {
namespace {

using prometheus::ClientMetric;
using prometheus::MetricType;

void AppendNumber(double value, std::string* text) {
  if (std::isnan(value)) {
    text->append("NaN");
  } else if (std::isinf(value)) {
    text->append(value < 0 ? "-Inf" : "+Inf");
  } else if (constexpr double kExact = 1e15; std::abs(value) < kExact && value == std::trunc(value)) {
    absl::StrAppend(text, static_cast<int64_t>(value));
  } else {
    // As %g: bounds of buckets are labels, which must stay what they are: 0.0001, not 1e-04.
    char digits[32];
    text->append(digits,
                 std::to_chars(digits, digits + sizeof(digits), value, std::chars_format::general).ptr);
  }
}

// Backslashes and line ends, in labels quotes too.
void AppendEscaped(std::string_view from, bool label, std::string* text) {
  for (const char c : from) {
    if (c == '\n') {
      text->append("\\n");
    } else {
      if (c == '\\' || (label && c == '"')) text->push_back('\\');
      text->push_back(c);
    }
  }
}

// "name_suffix{labels,le="bound"} "; a bound below no number is none.
constexpr double kNoBound = -std::numeric_limits<double>::infinity();
void AppendName(std::string_view name, std::string_view suffix,
                const std::vector<ClientMetric::Label>& labels, double bound, std::string* text) {
  text->append(name).append(suffix);
  char before = '{';
  for (const ClientMetric::Label& label : labels) {
    text->push_back(before);
    text->append(label.name).append("=\"");
    AppendEscaped(label.value, true, text);
    text->push_back('"');
    before = ',';
  }
  if (bound != kNoBound) {
    text->push_back(before);
    text->append("le=\"");
    AppendNumber(bound, text);
    text->push_back('"');
    before = ',';
  }
  text->append(before == ',' ? "} " : " ");
}

void AppendSample(std::string_view name, std::string_view suffix, const ClientMetric& metric, double bound,
                  double value, std::string* text) {
  AppendName(name, suffix, metric.label, bound, text);
  AppendNumber(value, text);
  if (metric.timestamp_ms != 0) absl::StrAppend(text, " ", metric.timestamp_ms);
  text->push_back('\n');
}

void AppendHistogram(std::string_view name, const ClientMetric& metric, std::string* text) {
  const ClientMetric::Histogram& histogram = metric.histogram;
  const auto count = static_cast<double>(histogram.sample_count);
  AppendSample(name, "_count", metric, kNoBound, count, text);
  AppendSample(name, "_sum", metric, kNoBound, histogram.sample_sum, text);
  double last = 0;
  for (const ClientMetric::Bucket& bucket : histogram.bucket) {
    last = bucket.upper_bound;
    AppendSample(name, "_bucket", metric, last, static_cast<double>(bucket.cumulative_count), text);
  }
  // The format wants a last bucket that has all.
  if (!std::isinf(last))
    AppendSample(name, "_bucket", metric, std::numeric_limits<double>::infinity(), count, text);
}

const char* TypeName(MetricType type) {
  switch (type) {
    case MetricType::Counter:
      return "counter";
    case MetricType::Gauge:
      return "gauge";
    case MetricType::Histogram:
      return "histogram";
    default:
      break;
  }
  KVTIDE_CHECK(false, "a family is no gauge, counter or histogram");
  return "";
}

}  // namespace

std::string Serialize(const std::vector<prometheus::MetricFamily>& families) {
  std::string text;
  text.reserve(size_t{256} << 10);
  for (const prometheus::MetricFamily& family : families) {
    text.append("# HELP ").append(family.name).push_back(' ');
    AppendEscaped(family.help, false, &text);
    absl::StrAppend(&text, "\n# TYPE ", family.name, " ", TypeName(family.type), "\n");
    for (const ClientMetric& metric : family.metric) {
      if (family.type == MetricType::Histogram) {
        AppendHistogram(family.name, metric, &text);
      } else {
        AppendSample(family.name, "", metric, kNoBound,
                     family.type == MetricType::Counter ? metric.counter.value : metric.gauge.value, &text);
      }
    }
  }
  return text;
}

}  // namespace kvtide::metrics
