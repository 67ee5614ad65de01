// Every row of tests/golden/planner/kv_bytes.csv to the byte, from the built-in catalogue.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <map>
#include <sstream>

#include "absl/strings/str_split.h"
#include "planner/csv.h"
#include "planner/engines/kv_sizer.h"
#include "planner/model/catalogue.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

std::string ReadGolden() {
  std::ifstream file(KVTIDE_SOURCE_DIR "/tests/golden/planner/kv_bytes.csv");
  std::stringstream text;
  text << file.rdbuf();
  return text.str();
}

std::map<std::string, std::string> Conditions(const std::string& text) {
  std::map<std::string, std::string> conditions;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ';'))) {
    const size_t equals = part.find('=');
    conditions[part.substr(0, equals)] = equals == std::string::npos ? "" : part.substr(equals + 1);
  }
  return conditions;
}

TEST(GoldenBytes, EveryRowMatchesToTheByte) {
  const auto rows = ParseCsv(ReadGolden(), "kv_bytes.csv",
                             {"model", "type_k", "type_v", "context_tokens", "kv_mib", "conditions"});
  ASSERT_TRUE(rows.ok()) << rows.status();
  ASSERT_EQ(rows->size(), 226u);
  int rewritten = 0;
  for (const CsvRow& row : *rows) {
    SCOPED_TRACE(row.place());
    auto conditions = Conditions(row.Text("conditions"));
    ASSERT_EQ(conditions["engine"], "llama.cpp");
    const auto model = FindModel(row.Text("model"));
    ASSERT_TRUE(model.ok()) << model.status();
    EngineOptions options;
    options.engine = Engine::kLlamaCpp;
    options.ubatch = std::stoi(conditions["ubatch"]);
    options.unified = conditions["unified"] == "1";
    options.swa_full = conditions["swa"] == "full";
    options.rewrites = conditions["rewrites"] != "none";
    TypePair pair{row.Text("type_k"), row.Text("type_v")};
    // Rewritten rows give the types after the rewrite; ask for those before it.
    if (options.rewrites) pair.k = "turbo3", ++rewritten;
    const auto sizer = MakeKvSizer(options, *model, GroupLayers(*model), pair);
    ASSERT_TRUE(sizer.ok()) << sizer.status();
    EXPECT_EQ((*sizer)->effective().k, row.Text("type_k"));
    const int64_t sequences = std::stoll(conditions["n_seq"]);
    const int64_t cells = *row.Integer("context_tokens");  // of all sequences together
    ASSERT_EQ(cells % sequences, 0);
    const KvBytes bytes = (*sizer)->Bytes({cells / sequences, sequences, 0});
    const double expected = *row.Number("kv_mib") * static_cast<double>(kMiB);
    ASSERT_EQ(expected, std::floor(expected));
    EXPECT_EQ(bytes.Cache(), static_cast<int64_t>(expected));
    const bool beyond = conditions.count("beyond_max_context") > 0;
    EXPECT_EQ(beyond, cells / sequences > model->max_context);
  }
  EXPECT_EQ(rewritten, 3);
}

}  // namespace
}  // namespace kvtide::planner
