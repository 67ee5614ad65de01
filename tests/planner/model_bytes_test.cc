// Every catalogue row against bytes computed by hand from published geometry
// (tests/golden/planner/model_bytes.csv), and the published config.json of a model of every shape
// (model_configs.jsonl) against the same numbers.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "planner/csv.h"
#include "planner/model/catalogue.h"
#include "planner/model/config_json.h"

namespace kvtide::planner {
namespace {

constexpr int64_t kTokens = 65536;

std::string ReadGolden(const std::string& name) {
  std::ifstream file(std::string(KVTIDE_SOURCE_DIR) + "/tests/golden/planner/" + name);
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

// A line of model_configs.jsonl: name, repository, and the config as text, for Python writes numbers that
// JSON does not have.
struct Published {
  std::string model;
  std::string config;
};

std::vector<Published> PublishedConfigs() {
  std::vector<Published> published;
  std::istringstream lines(ReadGolden("model_configs.jsonl"));
  std::string line;
  while (std::getline(lines, line)) {
    const std::string key = "\"config\":";
    const size_t at = line.find(key);
    const nlohmann::json head = nlohmann::json::parse(line.substr(0, at - 1) + "}");
    published.push_back({head["model"], line.substr(at + key.size(), line.size() - at - key.size() - 1)});
  }
  return published;
}

struct Bytes {
  int64_t layers = 0, kv = 0, index = 0, state = 0;
  friend bool operator==(const Bytes&, const Bytes&) = default;
  friend std::ostream& operator<<(std::ostream& out, const Bytes& b) {
    return out << b.layers << " layers, " << b.kv << " B of KV, " << b.index << " B of index keys, "
               << b.state << " B of state";
  }
};

std::map<std::string, Bytes> Golden() {
  std::map<std::string, Bytes> golden;
  const auto rows = ParseCsv(ReadGolden("model_bytes.csv"), "model_bytes.csv", {"model", "kv_bytes"});
  EXPECT_TRUE(rows.ok()) << rows.status();
  for (const CsvRow& row : *rows) {
    golden[row.Text("model")] = {*row.Integer("layers"), *row.Integer("kv_bytes"),
                                 *row.Integer("index_bytes"), *row.Integer("state_bytes")};
  }
  return golden;
}

// f16, without any rounding of an engine.
Bytes BytesOf(const ModelGeometry& model) {
  Bytes bytes;
  bytes.layers = static_cast<int64_t>(model.layers.size());
  for (const LayerGroup& group : GroupLayers(model)) {
    const auto layers = static_cast<int64_t>(group.layers.size());
    int64_t tokens = (kTokens + group.compress - 1) / group.compress;
    if (group.window > 0) tokens = std::min<int64_t>(tokens, group.window);
    const int64_t cache = layers * 2 * group.n_kv_heads * (group.head_dim_k + group.head_dim_v) * tokens;
    (group.index_keys ? bytes.index : bytes.kv) += cache;
    bytes.state += layers * group.state_bytes;
  }
  return bytes;
}

TEST(ModelBytes, EveryCatalogueRowHasItsGoldenBytes) {
  const std::map<std::string, Bytes> golden = Golden();
  EXPECT_EQ(golden.size(), CatalogueModels().size());
  for (const ModelGeometry& model : CatalogueModels()) {
    ASSERT_TRUE(golden.count(model.name) > 0) << model.name;
    EXPECT_EQ(BytesOf(model), golden.at(model.name)) << model.name;
  }
}

TEST(ModelBytes, PublishedConfigsAreReadWholeAndAgreeWithTheCatalogue) {
  const std::map<std::string, Bytes> golden = Golden();
  int read = 0;
  for (const auto& [name, config] : PublishedConfigs()) {
    const auto model = GeometryFromConfigJson(config, name);
    ASSERT_TRUE(model.ok()) << name << ": " << model.status();
    EXPECT_EQ(BytesOf(*model), golden.at(name)) << name;
    EXPECT_TRUE(model->uncounted.empty()) << name << ": " << model->uncounted.front();
    // Parameters counted from widths against the published number: 3 %.
    const auto catalogue = FindModel(name);
    if (catalogue->params_total > 0) {
      EXPECT_NEAR(static_cast<double>(model->params_total) / static_cast<double>(catalogue->params_total),
                  1.0, 0.03)
          << name;
    }
    ++read;
  }
  EXPECT_GE(read, 24);
}

// Totals and active parameters that the makers publish, and what counting the widths of their configs gives.
TEST(ModelBytes, ParametersAreThoseThatMakersPublish) {
  struct Count {
    const char* model;
    double total, active;  // 10^9
  };
  const Count table[] = {{"DeepSeek-V3", 671, 37},
                         {"Kimi-K3", 2800, 104},
                         {"GLM-5", 744, 40},
                         {"MiniMax-M2.5", 229, 10},
                         {"Qwen3.5-397B-A17B", 397, 17},
                         {"Nemotron-3-Nano-30B-A3B", 31.6, 3.5},
                         {"Nemotron-3-Ultra-550B-A55B", 550, 55},
                         {"Llama4-Scout", 109, 17},
                         {"gpt-oss-20b", 20.9, 3.6},
                         {"Gemma4-26B-A4B", 25.2, 3.8},
                         {"Qwen3-30B-A3B", 30.5, 3.3},
                         {"Llama-3.3-Nemotron-Super-49B", 49.9, 0},
                         {"Llama3.1-8B", 8.03, 0}};
  std::map<std::string, ModelGeometry> models;
  for (const auto& [name, config] : PublishedConfigs()) models[name] = *GeometryFromConfigJson(config, name);
  for (const Count& published : table) {
    ASSERT_TRUE(models.count(published.model) > 0) << published.model;
    const ModelGeometry& model = models[published.model];
    EXPECT_NEAR(static_cast<double>(model.params_total) / 1e9 / published.total, 1.0, 0.03)
        << published.model;
    if (published.active > 0) {
      // gpt-oss: makers leave the embedding out.
      const double active = static_cast<double>(model.params_active) / 1e9;
      EXPECT_NEAR(active / published.active, 1.0, 0.18) << published.model;
    } else {
      EXPECT_EQ(model.params_active, 0) << published.model;
    }
  }
}

TEST(ModelBytes, NumbersThatOnlyPythonWritesAreRead) {
  const auto model = GeometryFromConfigJson(
      R"({"num_hidden_layers":2,"num_attention_heads":2,"hidden_size":256,"head_dim":128,"num_key_value_heads":2,)"
      R"("note":"Infinity \" NaN","time_step_limit":[0.0,Infinity],"other":-Infinity,"third":NaN})",
      "python");
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_EQ(model->layers.size(), 2u);
}

// One field that changes the cache and is not known stops the reader, whatever family it belongs to.
TEST(ModelBytes, UnknownFieldsStopByName) {
  const std::vector<Published> published = PublishedConfigs();
  size_t next = 0;
  for (const char* field : {"use_cla", "index_kpool", "kv_compression_ratio", "shared_kv_groups"}) {
    nlohmann::json config = nlohmann::json::parse(published[next++].config);
    (config.contains("text_config") ? config["text_config"] : config)[field] = 4;
    const auto model = GeometryFromConfigJson(config.dump(), "changed");
    EXPECT_THAT(std::string(model.status().message()), ::testing::HasSubstr(field));
    const auto ignored = GeometryFromConfigJson(config.dump(), "changed", {true});
    ASSERT_TRUE(ignored.ok()) << ignored.status();
    EXPECT_THAT(ignored->uncounted, ::testing::Contains(::testing::HasSubstr(field)));
  }
}

}  // namespace
}  // namespace kvtide::planner
