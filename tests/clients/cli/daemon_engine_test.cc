// A real model on a real kvtided over a real socket: the demo's story, equality with the engine's own memory,
// and a short slice of the evaluation with values that are known.
#include <signal.h>
#include <unistd.h>

#include <chrono>
#include <cmath>
#include <filesystem>
#include <fstream>
#include <thread>

#include "clients/cli/bundled.h"
#include "clients/cli/calibrate/calibrate.h"
#include "clients/cli/daemon_process.h"
#include "clients/cli/demo/demo_run.h"
#include "clients/cli/eval/eval_run.h"
#include "clients/engine/daemon_kv_store.h"
#include "clients/engine/local_kv_store.h"
#include "clients/engine/sampler.h"
#include "clients/engine/tokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::cli {
namespace {

using engine::SequenceId;

constexpr int64_t kMiB = 1 << 20;

TEST(DemoTest, AForcedF16DemoSpillsToTheHostTierAndStaysExact) {
  DemoOptions options;
  options.daemon_program = KVTIDE_DAEMON_PROGRAM;
  options.context = 1024;
  options.generate = 16;
  options.device_bytes = 4 * kMiB;
  options.cache_type_k = "f16";
  options.narrate = options.show_progress = false;
  const auto report = RunDemo(options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->AllSame());
  EXPECT_EQ(report->steps.size(), 5u);
  EXPECT_EQ(report->stored_bytes, report->predicted_bytes);
  // 16 blocks of 384 KiB do not fit 4 MiB.
  ASSERT_EQ(report->tiers.size(), 2u);
  EXPECT_GT(report->tiers[1].blocks, 0);
  EXPECT_NEAR(report->perplexity, report->f16_perplexity, 1e-3 * report->f16_perplexity);
}

TEST(DemoTest, ACodedDemoHoldsExactlyThePlannedBytes) {
  DemoOptions options;
  options.daemon_program = KVTIDE_DAEMON_PROGRAM;
  options.context = 1024;
  options.generate = 8;
  options.cache_type_k = "q8_0";
  options.cache_type_v = "turbo4";
  options.narrate = options.show_progress = false;
  const auto report = RunDemo(options);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->AllSame());
  // Seven eighths of the second prompt are not computed, in the same daemon and in the next one.
  const DemoReuse& reuse = report->reuse;
  EXPECT_GE(reuse.shared_tokens, reuse.prompt_tokens * 3 / 4);
  ASSERT_EQ(reuse.ways.size(), 2u);
  for (const DemoReuse::Way& way : reuse.ways) {
    EXPECT_EQ(way.reused_tokens, reuse.shared_tokens);
    EXPECT_GT(way.seconds, 0);
    EXPECT_LT(way.seconds, reuse.computed_seconds);
    EXPECT_NEAR(way.perplexity, reuse.computed_perplexity, 0.01 * reuse.computed_perplexity);
  }
  EXPECT_EQ(reuse.ways[0].tier, "device");
  EXPECT_EQ(reuse.ways[1].tier, "disk");
  const std::string table = RenderDemoTable(*report, Terminal(false, false, 200));
  EXPECT_THAT(table,
              testing::ContainsRegex("first token +[0-9.]+ s in the same daemon instead of [0-9.]+ s"));
  EXPECT_THAT(table, testing::ContainsRegex("first token +[0-9.]+ s after a restart instead of [0-9.]+ s"));
  EXPECT_EQ(report->stored_bytes, report->predicted_bytes);
  EXPECT_EQ(report->tiers[1].blocks, 0);
  EXPECT_NEAR(report->perplexity, report->f16_perplexity, 0.005 * report->f16_perplexity);
}

TEST(DemoTest, SaysWhatIsWrong) {
  DemoOptions options;
  options.narrate = options.show_progress = false;
  options.daemon_program = "/no/such/kvtided";
  EXPECT_EQ(RunDemo(options).status().code(), absl::StatusCode::kNotFound);
  options.model_folder = "/no/such/model";
  EXPECT_THAT(std::string(RunDemo(options).status().message()), testing::HasSubstr("/no/such/model"));
  options.model_folder.clear();
  options.context = 1 << 20;
  EXPECT_THAT(std::string(RunDemo(options).status().message()), testing::HasSubstr("--context"));
}

// Greedy tokens with keys and values in the daemon in f16 equal those with them in this process, while blocks
// move.
TEST(DaemonKvStoreTest, GreedyTokensEqualThoseOfTheEnginesOwnMemory) {
  ThreadPool pool(2);
  const std::string folder = *BundledModelFolder();
  const auto tokenizer = engine::Tokenizer::Load(folder);
  const auto model = engine::LlamaModel::Load(folder, pool);
  ASSERT_TRUE(tokenizer.ok() && model.ok());
  std::vector<int32_t> prompt = *(*tokenizer)->Encode(ReadTextFile(*BundledTextFile())->substr(0, 2500));
  prompt.insert(prompt.begin(), 0);

  DaemonOptions daemon_options;
  daemon_options.program = KVTIDE_DAEMON_PROGRAM;
  daemon_options.device_bytes = 8 * kMiB;
  daemon_options.host_bytes = 32 * kMiB;
  const auto daemon = DaemonProcess::Start(daemon_options);
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  const auto client = client::Client::Connect((*daemon)->address());
  ASSERT_TRUE(client.ok()) << client.status();
  client::SequenceOptions f16;
  f16.pair = "f16/f16";
  const auto remote = engine::DaemonKvStore::Create(**client, "tidelm-7m", (*model)->kv_geometry(), f16);
  ASSERT_TRUE(remote.ok()) << remote.status();
  engine::LocalKvStore local((*model)->kv_geometry(), DataType::kF16, pool);

  // After token 20 everything is parked, after 40 it is brought back.
  const auto generate = [&](engine::KvStore& store, bool move) {
    const SequenceId sequence = store.CreateSequence().value();
    std::vector<float> hidden, logits(4096);
    std::vector<int32_t> tokens;
    absl::Status status = (*model)->Forward(store, sequence, 0, prompt, &hidden);
    for (int i = 0; i < 64 && status.ok(); ++i) {
      (*model)->Logits(hidden.data() + hidden.size() - 256, 1, logits.data());
      tokens.push_back(engine::ArgMax(logits));
      if (move && i == 20) status.Update((*client)->EvictSequences({{sequence}}).status());
      if (move && i == 40) status.Update((*client)->PrefetchSequences({{sequence}}).status());
      status.Update((*model)->Forward(store, sequence, static_cast<int64_t>(prompt.size()) + i,
                                      {&tokens.back(), 1}, &hidden));
    }
    EXPECT_TRUE(status.ok()) << status;
    EXPECT_TRUE(store.Close(sequence).ok());
    return tokens;
  };
  const std::vector<int32_t> expected = generate(local, false);
  ASSERT_EQ(expected.size(), 64u);
  EXPECT_EQ(generate(**remote, false), expected);
  EXPECT_EQ(generate(**remote, true), expected);
  const auto stats = (*client)->GetStats();
  ASSERT_TRUE(stats.ok());
  EXPECT_GT(stats->attended_blocks_below_first_tier, 0);
  EXPECT_EQ(stats->sequences, 0);
}

// What was durable when the daemon was killed goes on with the tokens that it would have had, and a prompt
// that begins as the killed one did is not computed again.
TEST(DaemonKvStoreTest, GreedyTokensGoOnAfterAKillAsIfNothingHadHappened) {
  ThreadPool pool(2);
  const std::string folder = *BundledModelFolder();
  const auto tokenizer = engine::Tokenizer::Load(folder);
  const auto model = engine::LlamaModel::Load(folder, pool);
  ASSERT_TRUE(tokenizer.ok() && model.ok());
  std::vector<int32_t> prompt = *(*tokenizer)->Encode(ReadTextFile(*BundledTextFile())->substr(0, 2500));
  prompt.insert(prompt.begin(), 0);
  const std::string disk = testing::TempDir() + "/kvtide_greedy_" + std::to_string(getpid());
  std::filesystem::create_directories(disk);
  DaemonOptions daemon_options;
  daemon_options.program = KVTIDE_DAEMON_PROGRAM;
  daemon_options.device_bytes = 32 * kMiB;
  daemon_options.host_bytes = 32 * kMiB;
  daemon_options.disk = disk + ":64MiB";
  std::unique_ptr<DaemonProcess> daemon;
  std::unique_ptr<client::Client> client;
  std::unique_ptr<engine::DaemonKvStore> store;
  std::vector<float> hidden, logits(4096);
  const auto start = [&](const std::string& pair) {
    daemon = DaemonProcess::Start(daemon_options).value();
    client = client::Client::Connect(daemon->address()).value();
    client::SequenceOptions options;
    options.pair = pair;
    store = engine::DaemonKvStore::Create(*client, "tidelm-7m", (*model)->kv_geometry(), options).value();
  };
  const auto append = [&](SequenceId sequence, size_t at, std::span<const int32_t> tokens) {
    const absl::Status status =
        (*model)->Forward(*store, sequence, static_cast<int64_t>(at), tokens, &hidden);
    ASSERT_TRUE(status.ok()) << status;
  };
  // `count` more tokens behind `at` of them, of which the last one was appended last.
  const auto generate = [&](SequenceId sequence, size_t at, int count) {
    std::vector<int32_t> tokens;
    for (int i = 0; i < count; ++i) {
      (*model)->Logits(hidden.data() + hidden.size() - 256, 1, logits.data());
      tokens.push_back(engine::ArgMax(logits));
      append(sequence, at + static_cast<size_t>(i), {&tokens.back(), 1});
    }
    return tokens;
  };
  for (const char* pair : {"f16/f16", "q8_0/turbo4"}) {
    SCOPED_TRACE(pair);
    start(pair);
    const SequenceId whole = store->CreateSequence().value();
    append(whole, 0, prompt);
    const std::vector<int32_t> expected = generate(whole, prompt.size(), 96);
    ASSERT_TRUE(store->Close(whole).ok());
    const SequenceId killed = store->CreateSequence().value();
    append(killed, 0, prompt);
    const std::vector<int32_t> before = generate(killed, prompt.size(), 40);
    ASSERT_TRUE(client->PersistSequences({{killed}}).ok());
    generate(killed, prompt.size() + 40, 7);  // which nobody has made durable
    kill(daemon->pid(), SIGKILL);
    store.reset();
    start(pair);
    const auto info = store->Describe(killed);
    ASSERT_TRUE(info.ok()) << info.status();
    ASSERT_EQ(info->tokens, static_cast<int64_t>(prompt.size()) + 40);
    // The last token once more, for what comes after it.
    ASSERT_TRUE(store->Truncate(killed, info->tokens - 1).ok());
    append(killed, prompt.size() + 39, {&before.back(), 1});
    std::vector<int32_t> all = before;
    const std::vector<int32_t> after = generate(killed, prompt.size() + 40, 56);
    all.insert(all.end(), after.begin(), after.end());
    EXPECT_EQ(all, expected);
    // Another sequence begins with it.
    const auto begun = store->Begin(prompt);
    ASSERT_TRUE(begun.ok()) << begun.status();
    EXPECT_GE(begun->tokens, 64 * 4);
    append(begun->sequence, static_cast<size_t>(begun->tokens),
           std::span(prompt).subspan(static_cast<size_t>(begun->tokens)));
    EXPECT_EQ(generate(begun->sequence, prompt.size(), 96), expected);
    for (const SequenceId sequence : {killed, begun->sequence}) ASSERT_TRUE(store->Close(sequence).ok());
    ASSERT_TRUE(client->UnregisterModel("tidelm-7m").ok());
    store.reset();
    client.reset();
    daemon.reset();
  }
  std::filesystem::remove_all(disk);
}

TEST(DaemonKvStoreTest, LargeChunksAreCutToTheMessageLimit) {
  ThreadPool pool(2);
  DaemonOptions daemon_options;
  daemon_options.program = KVTIDE_DAEMON_PROGRAM;
  daemon_options.device_bytes = 256 * kMiB;
  const auto daemon = DaemonProcess::Start(daemon_options);
  ASSERT_TRUE(daemon.ok()) << daemon.status();
  const auto client = client::Client::Connect((*daemon)->address());
  ASSERT_TRUE(client.ok()) << client.status();
  // 350 tokens of 3 x 64 heads of 256 floats are 66 MiB; a message may have 64.
  const engine::KvGeometry wide{1, 64, 64, 256, 0};
  client::SequenceOptions f16;
  f16.pair = "f16/f16";
  const auto remote = engine::DaemonKvStore::Create(**client, "wide", wide, f16);
  ASSERT_TRUE(remote.ok()) << remote.status();
  const int n = 350;
  const std::vector<float> q(n * wide.query_width(), 0.01f), k(n * wide.kv_width(), 0.5f),
      v(n * wide.kv_width(), 0.25f);
  std::vector<float> out(q.size());
  const SequenceId sequence = (*remote)->CreateSequence().value();
  const absl::Status status =
      (*remote)->AppendAttend(sequence, 0, 0, n, q.data(), k.data(), v.data(), out.data());
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ((*remote)->Describe(sequence)->tokens, n);
  for (const float x : out) ASSERT_NEAR(x, 0.25f, 1e-4f);
}

// Two windows of 1,024 tokens: the yardstick's value is frozen, the pairs keep the bounds of the full run,
// whose numbers are in tests/bench/results.
TEST(EvalDaemonTest, AShortSliceGivesTheKnownPerplexities) {
  EvalOptions options;
  options.daemon_program = KVTIDE_DAEMON_PROGRAM;
  options.pairs = {"q8_0/q8_0", "turbo4/turbo4", "turbo3/turbo3", "q4_0/q4_0"};
  options.windows = 2;
  options.context = 1024;
  options.layer_errors = false;
  options.show_progress = false;
  const std::atomic<bool> stop{false};
  for (const char* policy : {"none", "default"}) {
    options.window_policy = policy;
    const auto report = RunEval(options, stop);
    ASSERT_TRUE(report.ok()) << report.status();
    ASSERT_EQ(report->rows.size(), 5u);
    const bool none = options.window_policy == "none";
    for (const EvalRow& row : report->rows) {
      SCOPED_TRACE(row.pair + " " + policy);
      if (row.pair == "f16/f16") {
        EXPECT_NEAR(row.perplexity, 12.8363, 0.002);
        EXPECT_EQ(row.bits_per_value, 16);
      }
      if (row.pair == "q8_0/q8_0") {
        EXPECT_NEAR(row.change_percent, 0, 0.05);
      }
      if (row.pair == "turbo4/turbo4") {
        EXPECT_LT(row.change_percent, none ? 1.5 : 0.5);
      }
      if (row.pair == "q4_0/q4_0") {
        EXPECT_LT(row.change_percent, none ? 2.0 : 0.5);
      }
      if (row.pair == "turbo3/turbo3") {
        EXPECT_LT(row.change_percent, none ? 5.0 : 1.0);
        EXPECT_GT(row.kld_mean, none ? 0.01 : 0.001);
        EXPECT_NEAR(row.bits_per_value, none ? 3.125 : (13 * 3.125 + 3 * 16) / 16, 1e-9);
      }
    }
  }
}

// fp8 is what other servers store: rounded in this process, beside the pairs of the daemon.
TEST(EvalDaemonTest, MeasuresFp8BesideTheTypesOfThePools) {
  EvalOptions options;
  options.daemon_program = KVTIDE_DAEMON_PROGRAM;
  options.pairs = {"q8_0/q8_0", "fp8/fp8", "fp8_calibrated/fp8_calibrated"};
  options.windows = 1;
  options.context = 512;
  options.show_progress = false;
  const std::atomic<bool> stop{false};
  EXPECT_THAT(std::string(RunEval(options, stop).status().message()),
              testing::HasSubstr("--exact-window none"));
  options.window_policy = "none";
  const auto report = RunEval(options, stop);
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_EQ(report->rows.size(), 4u);
  double q8 = 0;
  for (const EvalRow& row : report->rows) {
    if (row.pair == "q8_0/q8_0") q8 = row.kld_mean;
  }
  for (const EvalRow& row : report->rows) {
    if (row.pair.substr(0, 3) != "fp8") continue;
    SCOPED_TRACE(row.pair);
    EXPECT_EQ(row.bits_per_value, 8);
    EXPECT_TRUE(row.layers.empty());
    EXPECT_GT(row.kld_mean, q8);  // 3 bits of mantissa against 7 bits of a group's largest
    EXPECT_LT(row.kld_mean, 0.1);
  }
}

TEST(EvalDaemonTest, ACalibratedProfileCentresKeys) {
  CalibrateOptions calibrate;
  calibrate.text_file = *BundledTextFile();
  calibrate.tokens = 1500;
  calibrate.context = 512;
  calibrate.means_only = true;  // too short a text for transforms
  calibrate.show_progress = false;
  const std::atomic<bool> go{false};
  std::vector<engine::KeyTypeError> errors;
  const auto profile = Calibrate(calibrate, go, &errors);
  ASSERT_TRUE(profile.ok()) << profile.status();
  // Three windows, the first block of each left out.
  EXPECT_EQ(profile->tokens, 1500 - 3 * 64);
  EvalOptions options;
  options.daemon_program = KVTIDE_DAEMON_PROGRAM;
  options.pairs = {"turbo3/turbo3"};
  options.windows = 1;
  options.context = 512;
  options.window_policy = "none";
  options.show_progress = false;
  const auto without = RunEval(options, go);
  ASSERT_TRUE(without.ok()) << without.status();
  options.profile_file = testing::TempDir() + "/kvtide_profile_eval_" + std::to_string(getpid());
  ASSERT_TRUE(engine::WriteKeyProfile(options.profile_file, *profile).ok());
  const auto with = RunEval(options, go);
  ASSERT_TRUE(with.ok()) << with.status();
  EXPECT_EQ(with->key_centring, "calibrated");
  EXPECT_EQ(with->rows[0].perplexity, without->rows[0].perplexity);  // f16
  EXPECT_NE(with->rows[1].perplexity, without->rows[1].perplexity);
  EXPECT_LT(with->rows[1].kld_mean, 1.5 * without->rows[1].kld_mean);
  // The layers see the same keys.
  EXPECT_LT(MeanError(with->rows[1].layers).logit, 1.05 * MeanError(without->rows[1].layers).logit);
  calibrate.tokens = 60;
  EXPECT_EQ(Calibrate(calibrate, go, &errors).status().code(), absl::StatusCode::kInvalidArgument);
  calibrate.tokens = 1500;
  EXPECT_EQ(Calibrate(calibrate, std::atomic<bool>{true}, &errors).status().code(),
            absl::StatusCode::kCancelled);
}

TEST(EvalDaemonTest, SaysThatItsDaemonDied) {
  EvalOptions options;
  options.daemon_program = KVTIDE_DAEMON_PROGRAM;
  options.pairs = {"turbo4/turbo4"};
  options.windows = 8;
  options.context = 4096;
  options.layer_errors = options.show_progress = false;
  const std::atomic<bool> go{false};
  absl::Status status;
  std::thread run([&] { status = RunEval(options, go).status(); });
  // The run's daemon is a child of a thread of this process.
  pid_t daemon = 0;
  while (daemon == 0) {
    for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
      std::ifstream in(task.path() / "children");
      pid_t child = 0;
      while (in >> child) {
        std::ifstream name("/proc/" + std::to_string(child) + "/comm");
        std::string text;
        if (name >> text && text.starts_with("kvtided")) daemon = child;
      }
    }
    std::this_thread::sleep_for(std::chrono::milliseconds(10));
  }
  std::this_thread::sleep_for(std::chrono::milliseconds(200));
  kill(daemon, SIGKILL);
  run.join();
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable) << status;
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("has died"));
}

TEST(EvalDaemonTest, StopsWhenAskedAndGoesOnFromItsState) {
  EvalOptions options;
  options.daemon_program = KVTIDE_DAEMON_PROGRAM;
  options.pairs = {"turbo4/turbo4"};
  options.windows = 2;
  options.context = 256;
  options.layer_errors = options.show_progress = false;
  options.state_file = testing::TempDir() + "/kvtide_eval_resume_" + std::to_string(getpid()) + ".json";
  std::remove(options.state_file.c_str());
  EXPECT_EQ(RunEval(options, std::atomic<bool>{true}).status().code(), absl::StatusCode::kCancelled);
  options.windows = 1;
  const std::atomic<bool> go{false};
  const auto one = RunEval(options, go);
  ASSERT_TRUE(one.ok()) << one.status();
  // More windows of the same text: the first one is not computed again, and the sum is that of a run of two.
  options.windows = 2;
  const auto two = RunEval(options, go);
  ASSERT_TRUE(two.ok()) << two.status();
  EvalOptions fresh = options;
  fresh.state_file.clear();
  const auto whole = RunEval(fresh, go);
  ASSERT_TRUE(whole.ok()) << whole.status();
  EXPECT_EQ(two->rows[0].perplexity, whole->rows[0].perplexity);
  EXPECT_NE(two->rows[0].perplexity, one->rows[0].perplexity);
  // Another text is another run.
  EvalOptions other = options;
  other.text_file = testing::TempDir() + "/kvtide_eval_other_" + std::to_string(getpid()) + ".txt";
  {
    std::ofstream text(other.text_file);
    for (int i = 0; i < 2000; ++i) text << "word " << i << " ";
  }
  EXPECT_EQ(RunEval(other, go).status().code(), absl::StatusCode::kFailedPrecondition);
  options.windows = 1;
  options.pairs = {"turbo4/turbo4", "turbo3/turbo3"};
  const auto more = RunEval(options, go);
  ASSERT_TRUE(more.ok()) << more.status();
  EXPECT_EQ(more->rows.size(), 3u);
}

}  // namespace
}  // namespace kvtide::cli
