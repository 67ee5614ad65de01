// The commands as a user runs them: exit codes, messages, files.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <sstream>
#include <string>
#include <vector>

#include "clients/engine/key_profile.h"
#include "kernels/format/tide.h"

namespace kvtide {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

struct Ran {
  int code = -1;
  std::string out;  // both streams
};

Ran Kvtide(const std::string& args, const std::string& environment = "") {
  FILE* pipe = popen((environment + " " + KVTIDE_PLAN_CLI + " " + args + " 2>&1 < /dev/null").c_str(), "r");
  Ran ran;
  char piece[4096];
  while (size_t n = fread(piece, 1, sizeof(piece), pipe)) ran.out.append(piece, n);
  const int status = pclose(pipe);
  ran.code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  return ran;
}

const char* const kGemma =
    "plan --model gemma-4-26b-a4b --weights q4_0 --device 'RTX 5080' --engine llama.cpp --context 32768 ";

TEST(PlanCli, ExitCodesSayWhetherItFits) {
  EXPECT_EQ(Kvtide(kGemma).code, 0);
  EXPECT_EQ(Kvtide("plan --model llama-3.1-8b --weights 8GiB --device vram=10GiB,bandwidth=448,host=64GiB "
                   "--context 131072")
                .code,
            3);
  EXPECT_EQ(Kvtide("plan --model llama-3.1-8b --weights 8GiB --device vram=10GiB --context 131072").code, 4);
  EXPECT_EQ(Kvtide("plan --model no-such-model --device vram=10GiB").code, 2);
  EXPECT_EQ(Kvtide("plan --nonsense").code, 2);
  EXPECT_EQ(Kvtide("plan --help").code, 0);
}

// Words of other programs for the same things.
TEST(PlanCli, WordsOfOtherEngines) {
  const std::string llama =
      "plan --model llama3.1:8b --weights q4_k_m --device 'RTX 4090' --output llama-args ";
  EXPECT_THAT(
      Kvtide(llama + "--engine ollama num_ctx=16384 OLLAMA_KV_CACHE_TYPE=q8_0 OLLAMA_NUM_PARALLEL=2").out,
      HasSubstr("-c 32768 -np 2 -ngl 999 -ctk q8_0 -ctv q8_0"));
  EXPECT_THAT(Kvtide(llama + "--engine llama-server --num-ctx 8192").out, HasSubstr("-c 8192"));
  const std::string server = "plan --model meta-llama/Llama-3.1-8B-Instruct --weights bf16 --device H100 ";
  EXPECT_THAT(Kvtide(server + "--engine vllm --max-model-len 32768 --max-num-seqs 4 --output vllm-args").out,
              HasSubstr("--max-model-len 32768 --max-num-seqs 4"));
  const std::string sglang =
      Kvtide(server +
             "--engine sglang --context-length 32768 --max-running-requests 4 --mem-fraction-static 0.8 "
             "--page-size 16 --kv-cache-dtype auto --output sglang-args")
          .out;
  EXPECT_THAT(sglang,
              HasSubstr("--context-length 32768 --max-running-requests 4 --kv-cache-dtype auto --tp-size 1"));
  EXPECT_THAT(sglang, HasSubstr("--page-size 16"));
  EXPECT_THAT(sglang, HasSubstr("--mem-fraction-static 0.800"));
  EXPECT_THAT(Kvtide("plan --list pairs").out, HasSubstr("sglang: f16/f16 bf16/bf16 fp8/fp8"));
}

TEST(PlanCli, CardsAreCountedOnce) {
  const std::string plan = "plan --model llama-3.1-8b --engine vllm --context 8192 --output json ";
  EXPECT_EQ(Kvtide(plan + "--device '2x RTX 4090' --gpus 2").code, 0);
  for (const char* contradiction :
       {"--device '2x RTX 4090' --gpus 4", "--device 2xH100 --gpus 1", "--device H100 --gpus 0"})
    EXPECT_EQ(Kvtide(plan + contradiction).code, 2) << contradiction;
}

TEST(PlanCli, MessagesNameTheFlag) {
  EXPECT_THAT(Kvtide("plan --device vram=10GiB").out, HasSubstr("--model is missing"));
  EXPECT_THAT(Kvtide("plan --model llama-3.1-8b --device vram=x").out,
              HasSubstr("--device: device 'vram=x': 'x' is not a size"));
  EXPECT_THAT(Kvtide("plan --model llama-3.1-8b --device vram=9GiB --context 8Q").out,
              HasSubstr("--context: '8Q'"));
  EXPECT_THAT(Kvtide("plan --model llama-3.1-8b --device vram=9GiB --engine tgi").out,
              HasSubstr("vllm, sglang, kvtide"));
  EXPECT_THAT(Kvtide("plan --model llama-3.1-8b --device vram=9GiB --output xml").out,
              HasSubstr("known: table, json"));
  EXPECT_THAT(Kvtide("plan --model llama-3.1-8b --device vram=9GiB --max-ppl-increase lots").out,
              HasSubstr("--max-ppl-increase"));
  EXPECT_THAT(Kvtide("plan --model llama-3.1-8b --device vram=9GiB --exact-window 3").out,
              HasSubstr("FIRST+LAST"));
  EXPECT_THAT(Kvtide("plan --model /no/such/file.gguf --device vram=9GiB").out,
              HasSubstr("--model: /no/such/file.gguf: cannot be opened"));
}

TEST(PlanCli, HelpHasExamples) {
  EXPECT_THAT(Kvtide("plan --help").out, HasSubstr("kvtide plan --model gemma-4-26b-a4b"));
}

TEST(PlanCli, OutputToAPipeHasNoColours) { EXPECT_THAT(Kvtide(kGemma).out, Not(HasSubstr("\x1b["))); }

TEST(PlanCli, JsonIsJsonAndRangesDouble) {
  const Ran ran = Kvtide(
      "plan --model gemma-4-26b-a4b --weights q4_0 --device 'RTX 5080' --context 4K..32K --output json");
  const auto json = nlohmann::json::parse(ran.out, nullptr, false);
  ASSERT_FALSE(json.is_discarded()) << ran.out;
  EXPECT_EQ(json["contexts"].size(), 4u);
}

TEST(PlanCli, EngineFlags) {
  EXPECT_EQ(Kvtide(std::string(kGemma) + "--output llama-args").out,
            "-c 32768 -np 1 -ngl 999 -ctk f16 -ctv f16 -fa on -ub 512 -fit off\n");
  EXPECT_EQ(Kvtide(std::string(kGemma) + "--output vllm-args").code, 2);
}

TEST(PlanCli, AnAnswerThatCannotBeWrittenIsExitCodeOne) {
  if (!std::filesystem::exists("/dev/full")) GTEST_SKIP() << "no /dev/full";
  for (const char* command :
       {"plan --model llama-3.1-8b --device 'RTX 4090' --output json", "plan --list models"}) {
    const int status =
        std::system((std::string(KVTIDE_PLAN_CLI) + " " + command + " > /dev/full 2> /dev/null").c_str());
    EXPECT_EQ(WEXITSTATUS(status), 1) << command;
  }
}

TEST(PlanCli, BareNumbersAreRefusedWithASuggestion) {
  const Ran weights = Kvtide("plan --model llama-3.1-8b --weights 16 --device 'RTX 4090'");
  EXPECT_EQ(weights.code, 2);
  EXPECT_THAT(weights.out, AllOf(HasSubstr("--weights"), HasSubstr("16GiB")));
  EXPECT_THAT(Kvtide("plan --model llama-3.1-8b --device vram=24").out, HasSubstr("24GiB"));
  EXPECT_EQ(Kvtide("plan --model llama-3.1-8b --device 'RTX 4090' --used 0").code, 0);
}

TEST(PlanCli, WithoutWeightsAModelIsTakenAsPublishedAndSaysSo) {
  const Ran ran = Kvtide("plan --model llama-3.1-8b --device 'RTX 4090' --context 8K");
  EXPECT_EQ(ran.code, 0);
  EXPECT_THAT(ran.out, AllOf(HasSubstr("weights 15.0 GiB"), HasSubstr("bf16, as nothing was said")));
}

TEST(PlanCli, TypesAreNamedAsTheyAre) {
  const Ran ran = Kvtide(std::string(kGemma) + "--pairs q8");
  EXPECT_EQ(ran.code, 2);
  EXPECT_THAT(ran.out, HasSubstr("did you mean q8_0?"));
}

TEST(PlanCli, LlamaServersOwnWords) {
  const std::string model =
      "plan --model llama-3.1-8b --weights q4_k_m --device 'RTX 4090' --engine llama.cpp ";
  const auto json = [&](const std::string& words) {
    const Ran ran = Kvtide(model + words + " --output json");
    EXPECT_EQ(ran.code, 0) << ran.out;
    return nlohmann::json::parse(ran.out);
  };
  const auto four = json("-c 8192");
  EXPECT_EQ(four["concurrency"], 4);
  EXPECT_EQ(four["contexts"][0]["pairs"][0]["kv_bytes"], 1 << 30);  // 8192 cells, shared
  const auto divided = json("-c 8192 -np 2");
  EXPECT_EQ(divided["concurrency"], 2);
  EXPECT_EQ(divided["contexts"][0]["pairs"][0]["kv_bytes"], 1 << 30);
  const auto quantised = json("-c 8192 -np 2 -kvu -ctk q8_0 -ctv q8_0 -ub 256");
  EXPECT_EQ(quantised["contexts"][0]["pairs"][0]["pair"], "q8_0/q8_0");
  EXPECT_THAT(Kvtide(model + "-c 8192").out, HasSubstr("-c 8192 shared by 4 slots"));
  EXPECT_THAT(Kvtide(model + "--context 8K --concurrency 4").out,
              HasSubstr("llama-server -c 32768 -np 4 -kvu"));
  EXPECT_EQ(Kvtide("plan --model llama-3.1-8b --device 'RTX 4090' --engine vllm -c 8192").code, 2);
}

TEST(PlanCli, TheDefaultAnswerIsShort) {
  const Ran ran = Kvtide("plan --model llama-3.1-8b --weights q4_k_m --device 'RTX 4090'");
  EXPECT_LE(std::count(ran.out.begin(), ran.out.end(), '\n'), 24) << ran.out;
  const Ran one = Kvtide(kGemma);
  EXPECT_LE(std::count(one.out.begin(), one.out.end(), '\n'), 20) << one.out;
  EXPECT_THAT(one.out, AllOf(HasSubstr("tokens/s"), HasSubstr("memory: "), HasSubstr("none")));
}

TEST(PlanCli, FourSlotsOfEightThousandTokensFitGemmaOnA5080) {
  const Ran ran = Kvtide(
      "plan --model gemma-4-26b-a4b --weights q4_0 --device 'RTX 5080' --engine llama.cpp --context 8192 "
      "--concurrency 4 --pairs f16/f16");
  EXPECT_EQ(ran.code, 0) << ran.out;
}

TEST(PlanCli, ThreeGpusForThirtyTwoHeadsAreRefused) {
  const Ran ran = Kvtide("plan --model llama-3.1-8b --device 'RTX 4090' --gpus 3 --engine vllm");
  EXPECT_EQ(ran.code, 2);
  EXPECT_THAT(ran.out, AllOf(HasSubstr("vllm refuses 3 GPUs"), HasSubstr("use 2 or 4")));
  EXPECT_EQ(Kvtide("plan --model llama-3.1-8b --device 'RTX 4090' --gpus 3 --engine llama.cpp").code, 0);
}

TEST(PlanCli, VllmQueuesWhatDoesNotFit) {
  const Ran ran = Kvtide(
      "plan --model llama-3.1-8b --weights bf16 --device 'RTX 4090' --engine vllm --context 8K --concurrency "
      "64");
  EXPECT_EQ(ran.code, 3) << ran.out;
  EXPECT_THAT(ran.out, AllOf(HasSubstr("at once"), HasSubstr("wait in the queue"),
                             HasSubstr("maximum concurrency for 8192 tokens per request")));
}

TEST(PlanCli, ExplainMatrixAndLists) {
  EXPECT_THAT(Kvtide(std::string(kGemma) + "--pairs q8_0/pq4 --explain").out, HasSubstr("5440 B per cell"));
  EXPECT_THAT(Kvtide(std::string(kGemma) + "--matrix --build auto").out,
              HasSubstr("q8_0/turbo4             512 dequantise"));
  EXPECT_THAT(Kvtide("plan --list models").out, HasSubstr("Kimi-K2"));
  EXPECT_THAT(Kvtide("plan --list devices").out, HasSubstr("RTX 5080"));
  EXPECT_THAT(Kvtide("plan --list pairs").out, HasSubstr("kvtide: f16/f16"));
  EXPECT_EQ(Kvtide("plan --list everything").code, 2);
}

TEST(PlanCli, PlotVerifyAndFleetUseFiles) {
  const std::filesystem::path folder =
      std::filesystem::path(::testing::TempDir()) / ("kvtide_plan_cli_" + std::to_string(getpid()));
  std::filesystem::create_directories(folder);
  const std::string plot = (folder / "plan.svg").string(), log = (folder / "llama.log").string(),
                    mix = (folder / "mix.csv").string();
  EXPECT_EQ(Kvtide(std::string(kGemma) + "--plot " + plot).code, 0);
  EXPECT_GT(std::filesystem::file_size(plot), 1000u);
  EXPECT_EQ(Kvtide(std::string(kGemma) + "--plot /no/such/folder/x.svg").code, 1);
  std::ofstream(log) << "llama_kv_cache:      CUDA0 KV buffer size =   940.00 MiB\n";
  const Ran verify = Kvtide(
      "plan verify --model gemma-4-26b-a4b --device 'RTX 5080' --engine llama.cpp --context 32768 --pairs "
      "f16/f16 --log " +
      log);
  EXPECT_EQ(verify.code, 0) << verify.out;
  EXPECT_THAT(verify.out, HasSubstr("+0.0%"));
  std::ofstream(log) << "llama_kv_cache:      CUDA0 KV buffer size =   640.00 MiB\n";
  const std::string off =
      "plan verify --model gemma-4-26b-a4b --device 'RTX 5080' --engine llama.cpp --context 32768 --pairs "
      "f16/f16 "
      "--log " +
      log;
  EXPECT_EQ(Kvtide(off).code, 0);
  EXPECT_EQ(Kvtide(off + " --tolerance 10%").code, 5);
  EXPECT_EQ(
      Kvtide("plan verify --model gemma-4-26b-a4b --device 'RTX 5080' --context 32768 --pairs f16/f16").code,
      2);
  std::ofstream(mix)
      << "name,context_tokens,output_tokens,turns,think_s,rate_per_s\nchat,8192,300,5,30,0.2\n";
  const std::string fleet =
      "fleet --model llama-3.1-8b --weights q4_k_m --device 'RTX 4090' --pair q8_0/turbo4 --duration 600 "
      "--mix ";
  EXPECT_THAT(Kvtide(fleet + mix).out, HasSubstr("host hit"));
  EXPECT_EQ(Kvtide(fleet + mix + " --output json").code, 0);
  EXPECT_EQ(Kvtide(fleet + "/no/such.csv").code, 2);
  std::filesystem::remove_all(folder);
}

TEST(PlanCli, AutoAsksTheDriverAndTheCatalogueForTheRest) {
  const std::string library = std::string("LD_LIBRARY_PATH=") + KVTIDE_FAKE_NVML;
  const Ran ran =
      Kvtide("plan --model llama-3.1-8b --weights bf16 --device auto --context 32K --output json", library);
  ASSERT_EQ(ran.code, 0) << ran.out;
  const auto device = nlohmann::json::parse(ran.out)["device"];
  EXPECT_EQ(device["name"], "NVIDIA H200");
  EXPECT_EQ(device["vram_bytes"], 150754820096);
  EXPECT_EQ(device["in_use_bytes"], 1 << 30);
  EXPECT_EQ(device["bandwidth_gb_s"], 4800);  // the catalogue's; the driver has no such number
  EXPECT_EQ(device["pcie_gb_s"], 64);
  const Ran changed = Kvtide(
      "plan --model llama-3.1-8b --weights bf16 --device auto,count=2,host=64GiB --context 32K --output json",
      library);
  ASSERT_EQ(changed.code, 0) << changed.out;
  EXPECT_EQ(nlohmann::json::parse(changed.out)["device"]["count"], 2);
}

TEST(PlanCli, AutoPlansForEachKindOfGpu) {
  const std::string environment = std::string("KVTIDE_FAKE_GPUS=3 LD_LIBRARY_PATH=") + KVTIDE_FAKE_NVML;
  const std::string plan = "plan --model llama-3.1-8b --weights bf16 --context 32K --concurrency 8 --device ";
  const Ran table = Kvtide(plan + "auto", environment);
  EXPECT_EQ(table.code, 0) << table.out;
  EXPECT_THAT(table.out, AllOf(HasSubstr("GPU 0, 1 of 3: NVIDIA H200, 140.4 GiB, 1.00 GiB in use"),
                               HasSubstr("GPU 2 of 3: NVIDIA H200, 140.4 GiB, 100.0 GiB in use")));
  const auto in_use = [&](const std::string& device) {
    const Ran ran = Kvtide(plan + device + " --output json", environment);
    return nlohmann::json::parse(ran.out.substr(ran.out.find('{')))["device"]["in_use_bytes"]
               .get<int64_t>() >>
           30;
  };
  EXPECT_EQ(in_use("auto"), 100) << "what fits on the fullest fits on all";
  EXPECT_EQ(in_use("auto:1"), 1);
  EXPECT_EQ(in_use("auto:2,host=64GiB"), 100);
  const Ran none = Kvtide(plan + "auto:3", environment);
  EXPECT_EQ(none.code, 2);
  EXPECT_THAT(none.out, HasSubstr("no GPU '3'; this machine has 3"));
}

// A profile of a model with these layers, as `kvtide calibrate` writes it; with transforms that change
// nothing.
std::string WriteProfile(const std::string& name, int layers, int kv_heads, int head_dim, bool transforms) {
  engine::KeyProfile profile;
  profile.model = "m";
  profile.text = "manual.txt";
  profile.tokens = 16384;
  profile.kv_heads = kv_heads;
  profile.head_dim = head_dim;
  const auto heads = static_cast<size_t>(kv_heads), dim = static_cast<size_t>(head_dim);
  std::vector<float> unit(heads * dim * dim, 0.0f);
  for (size_t i = 0; i < heads * dim; ++i) unit[i * dim + i % dim] = 1;
  for (int l = 0; l < layers; ++l) {
    profile.means.emplace_back(heads * dim, 0.5f);
    if (!transforms) continue;
    KeyTransforms& layer = profile.transforms.emplace_back();
    layer.frequencies.assign(dim / 2, 0.01f);
    layer.centres.assign(heads * dim, 0.5f);
    layer.matrices = unit;
    for (size_t h = 0; h < heads; ++h)
      for (const int bits : kTideBits)  // the lowest has a unit less than groups
        layer.widths.insert(layer.widths.end(), dim / kTideGroup, static_cast<uint8_t>(bits == 1 ? 0 : 2));
  }
  const std::string path = ::testing::TempDir() + "/kvtide_" + std::to_string(getpid()) + "_" + name;
  EXPECT_TRUE(engine::WriteKeyProfile(path, profile).ok());
  return path;
}

TEST(PlanCli, AProfileOfTheKeysIsReadAndNamed) {
  const std::string file = WriteProfile("smollm2.profile", 30, 3, 64, true);
  const std::string plan =
      "plan --model smollm2-135m --weights q4_k_m --context 8192 --device "
      "'CPU EPYC 9654,ram=8GiB' --all --profile ";
  const Ran ran = Kvtide(plan + file);
  EXPECT_EQ(ran.code, 0) << ran.out;
  EXPECT_THAT(ran.out, AllOf(HasSubstr("tide3/turbo3"), HasSubstr("SmolLM2-135M, calibrated"),
                             HasSubstr("smollm2.profile (16384 tokens of manual.txt)"),
                             HasSubstr("profile of the keys")));
  const Ran json = Kvtide(plan + file + " --output json");
  const auto parsed = nlohmann::json::parse(json.out);
  EXPECT_EQ(parsed["key_profile"]["text"], "manual.txt");
  EXPECT_EQ(parsed["key_profile"]["transforms"], true);
  const Ran other = Kvtide("plan --model llama-3.1-8b --weights q4_0 --device 'RTX 3060' --profile " + file);
  EXPECT_EQ(other.code, 2);
  EXPECT_THAT(other.out, AllOf(HasSubstr("--profile"), HasSubstr("30 layers of 3 KV heads of 64"),
                               HasSubstr("kvtide calibrate")));
  const Ran vllm = Kvtide(plan + file + " --engine vllm");
  EXPECT_EQ(vllm.code, 2);
  EXPECT_THAT(vllm.out, HasSubstr("--profile is an option of kvtide"));
  const Ran missing = Kvtide(plan + "/no/such.profile");
  EXPECT_EQ(missing.code, 2);
  EXPECT_THAT(missing.out, AllOf(HasSubstr("--profile"), HasSubstr("/no/such.profile")));
  std::filesystem::remove(file);
}

TEST(PlanCli, QualityFilesAreRead) {
  const std::string file = ::testing::TempDir() + "/kvtide_quality_" + std::to_string(getpid()) + ".csv";
  std::ofstream(file) << "model,text,tokens,context,pair_k,pair_v,window_policy,ppl_change_percent,kld_mean,"
                         "kld_p99,top1_agreement,bits_per_value,version,date\n"
                         "Llama3.1-8B,text,1,4096,turbo2,turbo2,default,0.0001,0,0,1,2.1,0,2026-11-22\n";
  const std::string args =
      "plan --model llama-3.1-8b --weights 4GiB --device vram=7GiB --context 32768 --own-quality-only "
      "--output csv --quality ";
  EXPECT_THAT(Kvtide(args + file).out, HasSubstr("turbo2/turbo2,turbo2/turbo2,1,1,"));
  EXPECT_EQ(Kvtide(args + "/no/such.csv").code, 2);
  std::filesystem::remove(file);
}

}  // namespace
}  // namespace kvtide
