#include "daemon/metrics/serializer.h"

#include <cmath>
#include <cstring>
#include <limits>
#include <random>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "prometheus/histogram.h"
#include "prometheus/registry.h"
#include "prometheus/text_serializer.h"
#include "tests/daemon/metrics/exposition.h"

namespace kvtide::metrics {
namespace {

using testing::HasSubstr;

// What the library's own serializer says of the same families: types, names with their labels, values.
void ExpectAsTheLibrary(const std::vector<prometheus::MetricFamily>& families) {
  const Exposition own = ParseExposition(Serialize(families));
  const Exposition library = ParseExposition(prometheus::TextSerializer().Serialize(families));
  EXPECT_EQ(own.types, library.types);
  ASSERT_EQ(own.samples.size(), library.samples.size());
  for (const auto& [name, value] : library.samples) {
    ASSERT_TRUE(own.samples.count(name)) << name;
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(own.samples.at(name))) << name;
    } else {
      // The library rounds to 16 digits.
      EXPECT_NEAR(own.samples.at(name), value, std::abs(value) * 1e-15) << name;
    }
  }
}

TEST(Serializer, SaysWhatTheLibrarySays) {
  prometheus::Registry registry;
  auto& counters = prometheus::BuildCounter().Name("calls_total").Help("Calls.").Register(registry);
  auto& gauges = prometheus::BuildGauge().Name("level").Help("A \"B\".").Register(registry);
  auto& histograms = prometheus::BuildHistogram().Name("seconds").Help("Time.").Register(registry);
  std::mt19937_64 random(1);
  std::uniform_real_distribution<double> exponent(-12, 18);
  const prometheus::Histogram::BucketBoundaries bounds = {1e-9, 25e-6, 1e-4, 1e-3, 0.1, 2.5, 30, 1e5, 1e9};
  for (int i = 0; i < 200; i++) {
    const std::map<std::string, std::string> labels = {{"method", absl::StrCat("m", i)}, {"code", "OK"}};
    counters.Add(labels).Increment(std::floor(std::pow(10, exponent(random))));
    gauges.Add(labels).Set((i % 2 != 0 ? -1 : 1) * std::pow(10, exponent(random)));
    auto& histogram = histograms.Add(labels, bounds);
    for (int k = 0; k < 20; k++) histogram.Observe(std::pow(10, exponent(random)));
  }
  gauges.Add({}).Set(0);
  ExpectAsTheLibrary(registry.Collect());
}

TEST(Serializer, SpecialNumbersAndNames) {
  prometheus::Registry registry;
  auto& gauges = prometheus::BuildGauge().Name("level").Help("A\\B\nC \"D\".").Register(registry);
  gauges.Add({{"a", "nan"}}).Set(std::nan(""));
  gauges.Add({{"a", "inf"}}).Set(std::numeric_limits<double>::infinity());
  gauges.Add({{"a", "-inf"}}).Set(-std::numeric_limits<double>::infinity());
  gauges.Add({{"a", "q\"b\\c\nd"}}).Set(1);
  const std::string text = Serialize(registry.Collect());
  EXPECT_THAT(text, HasSubstr("# HELP level A\\\\B\\nC \"D\".\n# TYPE level gauge\n"));
  EXPECT_THAT(text, HasSubstr("level{a=\"nan\"} NaN\n"));
  EXPECT_THAT(text, HasSubstr("level{a=\"inf\"} +Inf\n"));
  EXPECT_THAT(text, HasSubstr("level{a=\"-inf\"} -Inf\n"));
  EXPECT_THAT(text, HasSubstr("level{a=\"q\\\"b\\\\c\\nd\"} 1\n"));
}

// A value comes back as it was, whatever it is.
TEST(Serializer, NumbersReadBackAsTheSame) {
  std::mt19937_64 random(2);
  prometheus::MetricFamily family;
  family.name = "x";
  family.type = prometheus::MetricType::Gauge;
  for (int i = 0; i < 2000; i++) {
    double value;
    do {
      const uint64_t bits = random();
      std::memcpy(&value, &bits, sizeof(value));
    } while (!std::isfinite(value));
    family.metric.resize(1);
    family.metric[0].gauge.value = value;
    EXPECT_EQ(ParseExposition(Serialize({family})).samples.at("x"), value);
  }
}

}  // namespace
}  // namespace kvtide::metrics
