// Real starts of llama-server against the planner: cache to the log's 0.01 MiB, compute buffer within 10 % or
// 4 MiB.
#include <gtest/gtest.h>

#include <cmath>
#include <fstream>
#include <sstream>

#include "absl/strings/numbers.h"
#include "absl/strings/str_split.h"
#include "planner/engines/llama_cpp.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

struct Start {
  std::string line, model, k, v, flash_attention;
  int64_t context = 0, slots = 0, ubatch = 0;
  bool swa_full = false, unified = false;
  double cache_mib = 0, compute_mib = 0;
};

std::vector<Start> Starts() {
  std::ifstream file(std::string(KVTIDE_SOURCE_DIR) + "/tests/golden/planner/llama_cpp_starts.tsv");
  std::vector<Start> starts;
  bool head = true;
  for (std::string line; std::getline(file, line);) {
    if (line.empty() || line[0] == '#') continue;
    if (head) {
      head = false;
      continue;
    }
    const std::vector<std::string> cells = absl::StrSplit(line, '\t');
    Start start;
    start.line = line;
    start.model = cells[0];
    start.k = cells[2];
    start.v = cells[3];
    start.flash_attention = cells[8];
    EXPECT_TRUE(absl::SimpleAtoi(cells[1], &start.context) && absl::SimpleAtoi(cells[4], &start.slots) &&
                absl::SimpleAtoi(cells[5], &start.ubatch) && absl::SimpleAtod(cells[10], &start.cache_mib) &&
                absl::SimpleAtod(cells[11], &start.compute_mib))
        << line;
    start.swa_full = cells[6] == "1";
    start.unified = cells[7] == "1" || start.slots == 1;
    starts.push_back(start);
  }
  return starts;
}

ModelGeometry Model(const std::string& name) {
  ModelGeometry model;
  model.name = name;
  const auto shape = [&](int heads, int64_t width, int64_t ff, int64_t vocab) {
    model.n_query_heads = heads;
    model.n_embd = width;
    model.n_ff = ff;
    model.n_vocab = vocab;
  };
  if (name == "tidelm") {
    model.layers.assign(6, {LayerKind::kFull, 2, 128, 128});
    shape(4, 256, 768, 4096);
  } else if (name == "smollm2") {
    model.layers.assign(30, {LayerKind::kFull, 3, 64, 64});
    shape(9, 576, 1536, 49152);
  } else {
    for (int i = 0; i < 18; ++i) {
      LayerGeometry layer{LayerKind::kSliding, 1, 256, 256, 512};
      if (i % 6 == 5) layer = {LayerKind::kFull, 1, 256, 256};
      model.layers.push_back(layer);
    }
    shape(4, 640, 2048, 262144);
  }
  return model;
}

TEST(LlamaCppStarts, CacheAndComputeBufferAsLogged) {
  const std::vector<Start> starts = Starts();
  ASSERT_EQ(starts.size(), 76u);
  int compared = 0;
  for (const Start& start : starts) {
    if (start.cache_mib == 0) continue;  // did not come up
    const ModelGeometry model = Model(start.model);
    EngineOptions options;
    options.engine = Engine::kLlamaCpp;
    options.total_context = true;
    options.unified = start.unified;
    options.ubatch = static_cast<int>(start.ubatch);
    options.swa_full = start.swa_full;
    options.flash_attention = start.flash_attention != "off";
    const auto sizer = MakeKvSizer(options, model, GroupLayers(model), {start.k, start.v});
    ASSERT_TRUE(sizer.ok()) << sizer.status();
    const KvLoad load{start.context, start.slots, 0};
    const double cache = static_cast<double>((*sizer)->Bytes(load).Cache()) / kMiB;
    EXPECT_NEAR(cache, start.cache_mib, 0.011) << start.line;
    const double compute = static_cast<double>(LlamaCppComputeBytes(model, options, 1, load)) / kMiB;
    EXPECT_LE(std::fabs(compute - start.compute_mib), std::max(0.1 * start.compute_mib, 4.0))
        << compute << " for " << start.line;
    if (start.flash_attention != "off") {
      EXPECT_NEAR(compute, start.compute_mib, 0.7) << start.line;
    }
    ++compared;
  }
  EXPECT_EQ(compared, 75);
}

}  // namespace
}  // namespace kvtide::planner
