// `kvtide calibrate --from-daemon`: what a real kvtided gathers from real clients of a real model is what
// `kvtide calibrate` gathers from the same tokens; its profile can be written, installed, and survives a
// restart.
#include <unistd.h>

#include <chrono>
#include <filesystem>
#include <limits>
#include <thread>

#include "clients/cli/bundled.h"
#include "clients/cli/calibrate/calibrate.h"
#include "clients/cli/calibrate/from_daemon.h"
#include "clients/cli/daemon_process.h"
#include "clients/cpp/calibration.h"
#include "clients/engine/capture_kv_store.h"
#include "clients/engine/daemon_kv_store.h"
#include "clients/engine/llama_model.h"
#include "clients/engine/local_kv_store.h"
#include "clients/engine/tokenizer.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::cli {
namespace {

using testing::HasSubstr;

constexpr int64_t kMiB = 1 << 20;
constexpr int kTokens = 2048, kContext = 512, kHeldBack = 256;
constexpr char kName[] = "tidelm-7m";

struct Ran {
  int exit_code = -1;
  std::string out, err;
};
// kvtide calibrate WORDS.
Ran Command(const std::string& words) {
  CLI::App app("kvtide");
  Ran ran;
  AddCalibrateCommand(app, &ran.exit_code);
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  try {
    app.parse("calibrate --no-progress " + words);
  } catch (const CLI::ParseError& error) {
    ran.err = error.what();
    ran.exit_code = 2;
  }
  ran.out = testing::internal::GetCapturedStdout();
  ran.err += testing::internal::GetCapturedStderr();
  return ran;
}

class CalibrateTrafficTest : public testing::Test {
 protected:
  ~CalibrateTrafficTest() override {
    store_.reset();
    daemon_.reset();
    std::filesystem::remove_all(folder_);
  }
  void SetUp() override {
    std::filesystem::create_directory(folder_);
    const std::string folder = *BundledModelFolder();
    auto model = engine::LlamaModel::Load(folder, pool_);
    auto tokenizer = engine::Tokenizer::Load(folder);
    ASSERT_TRUE(model.ok() && tokenizer.ok());
    model_ = *std::move(model);
    auto tokens = (*tokenizer)->EncodeText(*ReadTextFile(*BundledTextFile()));
    ASSERT_TRUE(tokens.ok());
    tokens_ = *std::move(tokens);
    tokens_.resize(kTokens);
    StartDaemon();
  }
  void StartDaemon() {
    DaemonOptions options;
    options.program = KVTIDE_DAEMON_PROGRAM;
    options.device_bytes = 32 * kMiB;
    options.host_bytes = 64 * kMiB;
    options.disk = folder_ + "/disk:256MiB";
    auto daemon = DaemonProcess::Start(options);
    ASSERT_TRUE(daemon.ok()) << daemon.status();
    daemon_ = *std::move(daemon);
  }
  std::unique_ptr<client::Client> Connect() { return *client::Client::Connect(daemon_->address()); }
  std::string FromDaemon(const std::string& words) {
    return "--from-daemon " + daemon_->address() + " --model " + kName + " " + words;
  }
  client::Calibration Status(client::Client& client) {
    const auto list = client::Calibrations(client).List(kName);
    EXPECT_TRUE(list.ok() && list->size() == 1) << list.status();
    return list.ok() && !list->empty() ? list->front() : client::Calibration();
  }

  // The windows of the text, one after the other, each from another client: the model runs on memory of its
  // own, and the daemon gets the same rows.
  void Feed() {
    const engine::KvGeometry geometry = model_->kv_geometry();
    engine::LocalKvStore exact(geometry, DataType::kF16, pool_);
    std::vector<float> hidden, out;
    for (int at = 0; at < kTokens; at += kContext) {
      const std::unique_ptr<client::Client> client = Connect();
      client::SequenceOptions options;
      options.pair = "q8_0/turbo4";
      auto remote = engine::DaemonKvStore::Create(*client, kName, geometry, options);
      ASSERT_TRUE(remote.ok()) << remote.status();
      const engine::SequenceId sequence = (*remote)->CreateSequence().value();
      absl::Status status;
      engine::CaptureKvStore both(
          exact, [&](int layer, int64_t start, int n, const float* q, const float* k, const float* v) {
            out.resize(static_cast<size_t>(n) * geometry.query_width());
            status.Update((*remote)->AppendAttend(sequence, layer, start, n, q, k, v, out.data()));
          });
      const engine::SequenceId own = both.CreateSequence().value();
      status.Update(model_->Forward(both, own, 0, {tokens_.data() + at, kContext}, &hidden));
      ASSERT_TRUE(status.ok()) << status;
      ASSERT_TRUE(both.Close(own).ok());
      // So that nothing is left out, however slow the machine.
      while (Status(*client).waiting_tokens > 0) std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
  }

  const std::string folder_ = testing::TempDir() + "/kvtide_traffic_" + std::to_string(getpid());
  ThreadPool pool_{2};
  std::unique_ptr<engine::LlamaModel> model_;
  std::vector<int32_t> tokens_;
  std::unique_ptr<DaemonProcess> daemon_;
  std::unique_ptr<engine::DaemonKvStore> store_;
};

TEST_F(CalibrateTrafficTest, TheProfileIsThatOfTheSameTokensAndIsUsedAfterARestartToo) {
  std::vector<engine::KeyTypeError> errors;
  CalibrateOptions calibrate;
  calibrate.text_file = *BundledTextFile();
  calibrate.tokens = kTokens;
  calibrate.context = kContext;
  calibrate.show_progress = false;
  const std::atomic<bool> go{false};
  const auto expected = Calibrate(calibrate, go, &errors);
  ASSERT_TRUE(expected.ok()) << expected.status();

  std::unique_ptr<client::Client> client = Connect();
  ASSERT_TRUE(client->RegisterModel(engine::ClientModel(kName, model_->kv_geometry())).ok());
  EXPECT_THAT(Command("--from-daemon " + daemon_->address()).out, HasSubstr("no model is being calibrated"));
  EXPECT_EQ(Command(FromDaemon("--wait")).exit_code, 2);
  const int summed = static_cast<int>(expected->tokens);
  const Ran started =
      Command(FromDaemon("--start --share 1 --held-back 256 --tokens " + std::to_string(summed + kHeldBack)));
  ASSERT_EQ(started.exit_code, 0) << started.err;
  EXPECT_THAT(started.out, HasSubstr("tidelm-7m of tenant default: gathering"));
  const Ran early = Command(FromDaemon("--out " + folder_ + "/early.profile"));
  EXPECT_EQ(early.exit_code, 2);
  EXPECT_THAT(early.err, HasSubstr("has 0 of"));

  // A sequence that is there before the profile keeps what it has.
  client::SequenceOptions tide;
  tide.pair = "tide3/turbo3";
  EXPECT_EQ(client->CreateSequence(kName, tide).status().code(), absl::StatusCode::kInvalidArgument);
  Feed();
  const std::string file = folder_ + "/traffic.profile";
  const Ran done = Command(FromDaemon("--wait --out " + file + " --install"));
  ASSERT_EQ(done.exit_code, 0) << done.err;
  EXPECT_THAT(done.out, HasSubstr("it is number 1 of this model"));
  EXPECT_THAT(done.out, HasSubstr("ready, installed"));
  const client::Calibration status = Status(*client);
  EXPECT_EQ(status.left_out_rows, 0);
  EXPECT_EQ(status.context, kContext);
  EXPECT_FALSE(status.after_rope);
  EXPECT_EQ(status.whole_layers, status.layers);

  // Sums, transforms, widths and errors: to the last bit.
  const auto profile = engine::ReadKeyProfile(file);
  ASSERT_TRUE(profile.ok()) << profile.status();
  EXPECT_EQ(profile->tokens, expected->tokens);
  EXPECT_EQ(profile->means, expected->means);
  EXPECT_EQ(profile->transforms, expected->transforms);
  EXPECT_EQ(profile->after_rope, expected->after_rope);
  EXPECT_EQ(profile->context, expected->context);
  EXPECT_TRUE(engine::CheckKeyProfile(*profile, model_->kv_geometry()).ok());
  ASSERT_EQ(status.errors.size(), errors.size());
  for (size_t i = 0; i < errors.size(); ++i) {
    EXPECT_EQ(status.errors[i].type, errors[i].type);
    EXPECT_EQ(status.errors[i].error, errors[i].error);
    EXPECT_EQ(status.errors[i].beside_error, errors[i].beside_error);
  }

  // New sequences have it, in this daemon and in the next one, with the same result as of the file.
  std::vector<float> hidden, again;
  const auto forward = [&](const engine::KvGeometry& geometry, const std::string& name,
                           client::SequenceId* id, std::vector<float>* out) {
    const std::unique_ptr<client::Client> own = Connect();
    client::SequenceOptions options = tide;
    options.exact_window = ExactWindow{0, 1};
    auto store = engine::DaemonKvStore::Create(*own, name, geometry, options);
    ASSERT_TRUE(store.ok()) << store.status();
    // Its own: the store closes those that it has made.
    const client::SequenceId sequence = own->CreateSequence(name, options).value();
    const absl::Status first = model_->Forward(**store, sequence, 0, {tokens_.data(), kContext - 100}, out);
    ASSERT_TRUE(first.ok()) << first;
    const absl::Status next =
        model_->Forward(**store, sequence, kContext - 100, {tokens_.data() + kContext - 100, 100}, out);
    ASSERT_TRUE(next.ok()) << next;
    if (id == nullptr) {
      ASSERT_TRUE(own->CloseSequence(sequence).ok());
    } else {
      const auto persisted = own->PersistSequences({{sequence}});
      ASSERT_TRUE(persisted.ok()) << persisted.status();
      *id = sequence;
    }
  };
  client::SequenceId kept = 0;
  forward(model_->kv_geometry(), kName, &kept, &hidden);
  engine::KvGeometry with = model_->kv_geometry();
  engine::UseKeyProfile(*profile, &with);
  forward(with, "with the file", nullptr, &again);
  EXPECT_EQ(hidden, again);
  client.reset();
  daemon_.reset();
  StartDaemon();
  client = Connect();
  EXPECT_EQ(client->ListSequences(kName)->size(), 1u);
  // It says so though nothing is calibrated here.
  const auto report = client::Calibrations(*client).Report(kName);
  ASSERT_TRUE(report.ok()) << report.status();
  EXPECT_TRUE(report->calibrations.empty());
  ASSERT_EQ(report->installed.size(), 1u);
  EXPECT_EQ(report->installed[0].model, kName);
  EXPECT_EQ(report->installed[0].revision, 1);
  EXPECT_EQ(report->installed[0].sequences, 1);
  forward(model_->kv_geometry(), kName, nullptr, &again);
  EXPECT_EQ(hidden, again);
  EXPECT_TRUE(client->CloseSequence(kept).ok());
  // A file is installed as well.
  const Ran file_installed = Command(FromDaemon("--install --profile " + file));
  EXPECT_EQ(file_installed.exit_code, 0) << file_installed.err;
  EXPECT_EQ(Command(FromDaemon("--stop")).exit_code, 2);  // nothing is calibrated here
}

TEST_F(CalibrateTrafficTest, JsonAndWhatIsWrong) {
  const std::unique_ptr<client::Client> client = Connect();
  EXPECT_THAT(Command(FromDaemon("--start")).err, HasSubstr("'tidelm-7m' is not registered"));
  client::Model plain = engine::ClientModel(kName, model_->kv_geometry());
  for (client::ModelLayer& layer : plain.layers) layer.rope.reset();
  ASSERT_TRUE(client->RegisterModel(plain).ok());
  const Ran json = Command(FromDaemon("--start --output json --tokens 4096"));
  EXPECT_EQ(json.exit_code, 0) << json.err;
  EXPECT_THAT(json.out, HasSubstr("\"state\": \"gathering\""));
  EXPECT_THAT(json.out, HasSubstr("\"after_rope\": true"));  // its RoPE is not known
  const Ran rope = Command(FromDaemon("--start --output json --rope-of " + *BundledModelFolder()));
  EXPECT_THAT(rope.out, HasSubstr("\"after_rope\": false")) << rope.err;
  EXPECT_THAT(Command(FromDaemon("--start --tokens 100")).err, HasSubstr("want at least 512"));
  EXPECT_THAT(Command(FromDaemon("--start --tenant nobody")).err, HasSubstr("is not registered"));
  EXPECT_THAT(Command(FromDaemon("--stop --wait")).err, HasSubstr("one of the two"));
  EXPECT_THAT(Command(FromDaemon("--text x")).err, HasSubstr("--from-daemon"));
  EXPECT_THAT(Command("--start").err, HasSubstr("--from-daemon"));
  EXPECT_THAT(Command("--tokens 100").err, HasSubstr("--text and --out, or --from-daemon"));
  EXPECT_EQ(Command("--from-daemon unix:/no/such.sock --timeout 0.2").exit_code, 1);
  EXPECT_EQ(Command(FromDaemon("--stop")).exit_code, 0);
}

}  // namespace
}  // namespace kvtide::cli
