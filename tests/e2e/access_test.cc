// Who may call a real daemon, and what of others' is there for them.
#include <signal.h>
#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>

#include "absl/strings/match.h"
#include "absl/time/clock.h"
#include "clients/cpp/pool.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using ::testing::AllOf;
using ::testing::Contains;
using ::testing::ContainsRegex;
using ::testing::Ge;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::Pair;

class OtherUsers : public ::testing::Test {
 protected:
  void SetUp() override {
    if (::geteuid() != 0) GTEST_SKIP() << "needs to become somebody else";
  }
  // A daemon whose sockets' files are open to everybody, so that a refusal is its own.
  void Start(const std::vector<std::string>& arguments) {
    daemon_ = TestDaemon::Start(arguments);
    const std::string socket = daemon_->socket_path();
    ASSERT_EQ(std::system(("chmod 755 " + daemon_->folder() + " " + daemon_->folder() + "/run && chmod 666 " +
                           socket + " " + socket + ".ring")
                              .c_str()),
              0);
  }
  // Runs as another user; what `run` returns.
  template <class Run>
  int As(uid_t user, Run run) {
    const pid_t child = ::fork();
    if (child == 0) ::_exit(::setuid(user) == 0 ? run() : 99);
    return WaitForExit(child, 60);
  }
  // `kvtide status` over gRPC as another user of another group; its exit code and words.
  std::pair<int, std::string> StatusAs(const std::string& user, const std::string& group) {
    const std::string folder = MakeFolder();
    const int code =
        WaitForExit(StartProgram({"/usr/bin/setpriv", "--reuid", user, "--regid", "65534", "--groups", group,
                                  Program("kvtide"), "status", "--address", daemon_->address()},
                                 folder + "/log"),
                    60);
    const std::string words = ReadWhole(folder + "/log");
    EXPECT_EQ(std::system(("rm -r " + folder).c_str()), 0);
    return {code, words};
  }

  std::unique_ptr<TestDaemon> daemon_;
};

TEST_F(OtherUsers, AreToldThatTheyMayNotCallUnlessTheyAreNamed) {
  if (::access("/usr/bin/setpriv", X_OK) != 0) GTEST_SKIP() << "needs setpriv";
  Start({"--allow", "uid:4321", "--allow", "gid:777=acme"});
  const auto [refused, words] = StatusAs("1234", "1234");
  EXPECT_NE(refused, 0);
  EXPECT_THAT(words, AllOf(HasSubstr("user 1234 may not use this kvtided"), HasSubstr("--allow uid:1234")));
  EXPECT_THAT(daemon_->Log(), HasSubstr("code=PERMISSION_DENIED"));
  EXPECT_EQ(StatusAs("4321", "1").first, 0);
  EXPECT_EQ(StatusAs("1234", "777").first, 0) << "by one of its groups";
  EXPECT_TRUE(daemon_->Connect()->GetStats().ok());
}

// Two users, two tenants, over shared memory; root sees both.
TEST_F(OtherUsers, SeeNothingOfEachOther) {
  Start({"--allow", "uid:1001=acme", "--allow", "uid:1002=other"});
  const auto make = [&] {
    auto pool = Pool::Connect("shm:" + daemon_->address());
    if (!pool.ok() || !(*pool)->RegisterModel(SmallModel()).ok()) return 1;
    const auto sequence = (*pool)->CreateSequence("small", {.persistence = client::Persistence::kNone});
    if (!sequence.ok() || !(*pool)->Append(*sequence, 0, Tokens(1, 0, 70).layers).ok()) return 2;
    // Its own is all that it sees; another tenant's it may not even name.
    const auto list = (*pool)->ListSequences();
    if (!list.ok() || list->size() != 1 || list->front().tenant != "acme") return 3;
    if (!absl::IsPermissionDenied((*pool)->CreateSequence("small", {.tenant = "other"}).status())) return 4;
    return 0;
  };
  EXPECT_EQ(As(1001, make), 0);
  // A sequence of acme that root keeps open, and another tenant looks for it.
  const auto root = Pool::Connect("shm:" + daemon_->address());
  ASSERT_TRUE(root.ok()) << root.status();
  ASSERT_TRUE((*root)->RegisterModel(SmallModel()).ok());
  const auto sequence = (*root)->CreateSequence("small", {.tenant = "acme"});
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  const auto look = [&](bool owner) {
    auto pool = Pool::Connect("shm:" + daemon_->address());
    if (!pool.ok()) return 1;
    const auto list = (*pool)->ListSequences();
    if (!list.ok() || list->size() != (owner ? 1u : 0u)) return 2;
    const absl::Status cut = (*pool)->TruncateSequence(*sequence, 0);
    if (owner ? !cut.ok() : !absl::IsNotFound(cut)) return 3;
    const absl::Status forked = (*pool)->ForkSequence(*sequence).status();
    if (owner ? !forked.ok() : !absl::IsNotFound(forked)) return 4;
    if (!owner && !absl::IsNotFound((*pool)->CloseSequence(*sequence))) return 5;
    return 0;
  };
  EXPECT_EQ(As(1002, [&] { return look(false); }), 0);
  EXPECT_EQ(As(1001, [&] { return look(true); }), 0);
  EXPECT_TRUE((*root)->CloseSequence(*sequence).ok());
}

// Certificates and tokens, in a folder of their own; `openssl` makes them as an operator would.
class Network : public ::testing::Test {
 protected:
  Network() : folder_(MakeFolder()) {}
  ~Network() override { EXPECT_EQ(std::system(("rm -r " + folder_).c_str()), 0); }
  std::string File(const std::string& name) const { return folder_ + "/" + name; }
  void Write(const std::string& name, const std::string& text) const { std::ofstream(File(name)) << text; }
  void Shell(const std::string& command) const {
    ASSERT_EQ(std::system(("cd " + folder_ + " && (" + command + ") > shell.log 2>&1").c_str()), 0)
        << ReadWhole(File("shell.log"));
  }
  void MakeCa(const std::string& name) const {
    Shell("openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=" + name +
          " -keyout " + name + ".key -out " + name + ".pem");
  }
  // NAME.pem and NAME.key, signed by `ca`, for `common_name` and localhost.
  void MakeCertificate(const std::string& ca, const std::string& name, const std::string& common_name) const {
    Write(name + ".ext", "subjectAltName=DNS:localhost,IP:127.0.0.1\n");
    Shell("openssl req -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -subj '/CN=" + common_name +
          "' -keyout " + name + ".key -out " + name + ".csr && openssl x509 -req -in " + name + ".csr -CA " +
          ca + ".pem -CAkey " + ca + ".key -CAcreateserial -days 2 -extfile " + name + ".ext -out " + name +
          ".pem");
  }
  // A line of a token file.
  std::string TokenLine(const std::string& token, const std::string& rest) const {
    Shell("printf %s '" + token + "' | sha256sum | cut -d ' ' -f 1 > sum");
    std::string sum = ReadWhole(File("sum"));
    sum.resize(64);
    Write(token, token + "\n");  // as a client has it
    return "sha256:" + sum + " " + rest + "\n";
  }
  void Start(std::vector<std::string> arguments) {
    arguments.insert(arguments.begin(), {"--listen", "localhost:0"});
    daemon_ = TestDaemon::Start(arguments);
    const std::string& line = daemon_->ready_line();
    const size_t at = line.find("localhost:");
    ASSERT_NE(at, std::string::npos) << line;
    address_ = line.substr(at, line.find_first_of(" ,", at) - at);
  }
  absl::StatusOr<std::unique_ptr<Client>> Connect(const client::Credentials& credentials,
                                                  bool unix = false) const {
    client::ClientOptions options;
    options.wait_for_daemon = false;
    options.connect_timeout = absl::Seconds(30);
    options.credentials = credentials;
    return Client::Connect(unix ? daemon_->address() : address_, options);
  }
  // Why a first call fails, or OK.
  absl::Status Ask(const client::Credentials& credentials) const {
    const auto client = Connect(credentials);
    return client.ok() ? (*client)->GetStats().status() : client.status();
  }

  const std::string folder_;
  std::unique_ptr<TestDaemon> daemon_;
  std::string address_;
};

TEST_F(Network, CertificatesNameTheTenantAndAreReplacedWithoutARestart) {
  MakeCa("ca");
  MakeCa("stranger");
  MakeCertificate("ca", "server", "kvtided");
  MakeCertificate("ca", "acme", "acme");
  MakeCertificate("ca", "ops", "Operations, Inc.");
  MakeCertificate("stranger", "forged", "acme");
  Start({"--server-cert", File("server.pem"), "--server-key", File("server.key"), "--client-ca",
         File("ca.pem"), "--allow", "cert:Operations, Inc.=default:admin"});
  const auto with = [&](const std::string& name) {
    return client::Credentials{File("ca.pem"), File(name + ".pem"), File(name + ".key"), ""};
  };
  const auto acme = Connect(with("acme")).value();
  ASSERT_TRUE(acme->RegisterModel(SmallModel()).ok());
  const auto sequence = acme->CreateSequence("small");
  ASSERT_TRUE(sequence.ok()) << sequence.status();
  EXPECT_EQ(acme->ListSequences()->at(0).tenant, "acme");
  const auto ops = Connect(with("ops")).value();
  EXPECT_EQ(ops->ListSequences()->size(), 1u) << "an admin sees all";
  // Who has no certificate, one of another CA, or no TLS, is told so; the others go on.
  EXPECT_FALSE(Ask({File("ca.pem"), "", "", ""}).ok());
  EXPECT_FALSE(Ask(with("forged")).ok());
  EXPECT_THAT(std::string(Ask({File("stranger.pem"), File("acme.pem"), File("acme.key"), ""}).message()),
              HasSubstr("is --tls-ca the CA of its certificate"));
  EXPECT_THAT(std::string(Ask({}).message()), HasSubstr("it may want TLS; give --tls-ca"));
  EXPECT_EQ(Ask({"", File("acme.pem"), File("acme.key"), ""}).code(), absl::StatusCode::kInvalidArgument);
  // Another CA for both ends: within seconds, the old one counts no more for who connects.
  MakeCertificate("stranger", "server", "kvtided");
  Shell("cp stranger.pem ca.pem");
  MakeCertificate("stranger", "late", "late");
  absl::Status late;
  for (int i = 0; i < 120; i++) {
    late = Ask(with("late"));
    if (late.ok()) break;
    absl::SleepFor(absl::Milliseconds(250));
  }
  EXPECT_TRUE(late.ok()) << late;
  EXPECT_EQ(acme->ListSequences()->size(), 1u) << "a connection that stands goes on";
  EXPECT_THAT(daemon_->Log(), ContainsRegex("connections refused=[0-9]+ .*reasons=\"plaintext=[0-9]"));
  EXPECT_EQ(daemon_->Stop(), 0);
}

// Who renews a certificate and forgets its key finds a daemon that serves, and says so.
TEST_F(Network, ACertificateThatDoesNotFitIsNotUsedAndIsTold) {
  MakeCa("ca");
  MakeCertificate("ca", "server", "kvtided");
  MakeCertificate("ca", "other", "kvtided");
  MakeCertificate("ca", "acme", "acme");
  Start({"--server-cert", File("server.pem"), "--server-key", File("server.key"), "--client-ca",
         File("ca.pem")});
  const client::Credentials acme{File("ca.pem"), File("acme.pem"), File("acme.key"), ""};
  ASSERT_TRUE(Ask(acme).ok());
  const auto says = [&](const std::string& words) {
    for (int i = 0; i < 300 && !absl::StrContains(daemon_->Log(), words); i++)
      absl::SleepFor(absl::Milliseconds(100));
    return absl::StrContains(daemon_->Log(), words);
  };
  EXPECT_TRUE(says("trouble=certificate problem=\"the server certificate "))
      << "those of this test end tomorrow";
  Shell("cp other.pem server.pem");
  EXPECT_TRUE(says("is not that of the certificate")) << daemon_->Log();
  absl::SleepFor(absl::Seconds(6));  // gRPC looks every five
  EXPECT_TRUE(Ask(acme).ok()) << "the one from before is used";
  Shell("cp other.key server.key");
  EXPECT_TRUE(Ask(acme).ok());
  EXPECT_EQ(daemon_->Stop(), 0);
}

TEST_F(Network, TokensNameTheTenantExpireAndAreReadAgain) {
  const std::string acme = TokenLine("token-of-acme", "acme"),
                    old = TokenLine("token-of-old", "old until=2026-01-01T00:00:00Z");
  Write("tokens", "# test\n" + acme + old + TokenLine("token-of-ops", "default:admin"));
  Start({"--tokens", File("tokens")});
  const auto with = [&](const std::string& token) { return client::Credentials{"", "", "", File(token)}; };
  const auto client = Connect(with("token-of-acme")).value();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  ASSERT_TRUE(client->CreateSequence("small").ok());
  EXPECT_EQ(client->ListSequences()->at(0).tenant, "acme");
  EXPECT_EQ(Connect(with("token-of-ops")).value()->ListSequences()->size(), 1u);
  EXPECT_THAT(std::string(Ask(with("token-of-old")).message()), HasSubstr("'old' has expired at 2026-01-01"));
  EXPECT_EQ(Ask(with("token-of-old")).code(), absl::StatusCode::kUnauthenticated);
  Write("wrong", "guess");
  EXPECT_EQ(Ask(with("wrong")).code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(std::string(Ask({}).message()), HasSubstr("calls over TCP need a token"));
  // On the Unix socket the kernel says who it is; a token may say more.
  EXPECT_EQ(Connect({}, true).value()->ListSequences()->size(), 1u);
  // A session under way ends when its token is taken back, others come in, without a restart.
  client::ClientOptions options;
  options.session = true;
  options.credentials = with("token-of-acme");
  const auto session = Client::Connect(address_, options).value();
  EXPECT_EQ(session->ListSequences()->size(), 1u);
  Write("tokens", TokenLine("token-of-new", "new"));
  ASSERT_EQ(::kill(daemon_->pid(), SIGHUP), 0);
  absl::Status answer;
  for (int i = 0; i < 200; i++) {
    answer = Ask(with("token-of-new"));
    if (answer.ok()) break;
    absl::SleepFor(absl::Milliseconds(50));
  }
  EXPECT_TRUE(answer.ok()) << answer;
  EXPECT_EQ(session->ListSequences().status().code(), absl::StatusCode::kUnauthenticated);
  EXPECT_EQ(client->ListSequences().status().code(), absl::StatusCode::kUnauthenticated);
  // A file with a mistake changes nothing, and no token is ever in the log.
  Write("tokens", "sha256:12 acme\n");
  ASSERT_EQ(::kill(daemon_->pid(), SIGHUP), 0);
  for (int i = 0; i < 200 && !absl::StrContains(daemon_->Log(), "tokens stay as they were"); i++)
    absl::SleepFor(absl::Milliseconds(50));
  EXPECT_TRUE(Ask(with("token-of-new")).ok());
  EXPECT_THAT(daemon_->Log(),
              AllOf(HasSubstr("tokens, line 1"), Not(HasSubstr("token-of")), HasSubstr("reloaded tokens=1")));
  EXPECT_EQ(daemon_->Stop(), 0);
}

// Quotas of one tenant hold nobody else up, and say what would free them. Tenants come with tokens over the
// Unix socket.
TEST_F(Network, AQuotaIsOneTenantsOwn) {
  Write("tokens", TokenLine("token-of-acme", "acme") + TokenLine("token-of-other", "other"));
  Start({"--tokens", File("tokens"), "--quota", "acme:sequences=2,models=1,device=64KiB,host=0",
         "--metrics-address", "127.0.0.1:0"});
  const auto acme = Connect({"", "", "", File("token-of-acme")}, true).value();
  const auto other = Connect({"", "", "", File("token-of-other")}, true).value();
  for (const auto* client : {&acme, &other}) ASSERT_TRUE((*client)->RegisterModel(SmallModel()).ok());
  EXPECT_THAT(std::string(acme->RegisterModel(SmallModel("another")).message()), HasSubstr("its quota is 1"));
  const auto first = acme->CreateSequence("small", {.pair = "f16/f16"}),
             second = acme->CreateSequence("small");
  ASSERT_TRUE(first.ok() && second.ok());
  const absl::Status third = acme->CreateSequence("small").status();
  EXPECT_EQ(third.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(third.message()),
              HasSubstr("tenant 'acme' has 2 sequences, and its quota is 2; close some"));
  ASSERT_TRUE(acme->Append(*first, 0, Tokens(1, 0, 64).layers).ok());
  EXPECT_THAT(std::string(acme->Append(*first, 64, Tokens(1, 64, 1).layers).status().message()),
              HasSubstr("65536 of 65536 bytes taken in tier 'device'"));
  for (int i = 0; i < 5; i++) {
    const auto sequence = other->CreateSequence("small", {.pair = "f16/f16"});
    ASSERT_TRUE(sequence.ok()) << sequence.status();
    EXPECT_TRUE(other->Append(*sequence, 0, Tokens(2, 0, 100).layers).ok());
  }
  EXPECT_EQ(acme->ListSequences()->size(), 2u);
  ASSERT_TRUE(acme->CloseSequence(*second).ok());
  EXPECT_TRUE(acme->CreateSequence("small").ok());
  // A name of another tenant is refused before anything happens.
  EXPECT_EQ(acme->CreateSequence("small", {.tenant = "other"}).status().code(),
            absl::StatusCode::kPermissionDenied);
  // Every refusal counts once, by what it was for; that a sequence is another tenant's only the daemon knows.
  const absl::Status foreign = other->Append(*first, 0, Tokens(1, 0, 1).layers).status();
  const absl::Status unknown = other->Append(4711, 0, Tokens(1, 0, 1).layers).status();
  EXPECT_EQ(foreign.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(unknown.code(), absl::StatusCode::kNotFound);
  Write("token-of-nobody", "token-of-nobody\n");
  EXPECT_EQ(Ask({"", "", "", File("token-of-nobody")}).code(), absl::StatusCode::kUnauthenticated);
  const auto refused = other->GetStats()->refused;
  EXPECT_THAT(refused, AllOf(Contains(Pair("quota", 3)), Contains(Pair("permission", 1)),
                             Contains(Pair("other_tenant", 1)), Contains(Pair("not_found", 1)),
                             Contains(Pair("unauthenticated", Ge(1)))));
  EXPECT_THAT(daemon_->Log(), HasSubstr("reason=quota message="));
}

TEST_F(Network, ConnectionsOfOneTenantHaveALimit) {
  const auto daemon = TestDaemon::Start({"--quota", "default:connections=2"});
  const auto first = daemon->Connect(), second = daemon->Connect();
  const auto third =
      Client::Connect(daemon->address(), {.connect_timeout = absl::Seconds(3), .wait_for_daemon = false});
  EXPECT_EQ(third.status().code(), absl::StatusCode::kResourceExhausted) << third.status();
  EXPECT_THAT(std::string(third.status().message()), HasSubstr("as many connections as its quota allows, 2"));
  EXPECT_TRUE(first->GetStats().ok());
}

TEST_F(Network, NobodyListensBeyondLoopbackWithoutTlsAndNames) {
  MakeCa("ca");
  MakeCertificate("ca", "server", "kvtided");
  MakeCertificate("ca", "other", "kvtided");
  const std::vector<std::string> open = {"--listen",          "0.0.0.0:0", "--device",      "cpu",
                                         "--device-memory",   "4MiB",      "--host-memory", "0",
                                         "--metrics-address", "off"};
  const auto run = [&](const std::vector<std::string>& more) {
    std::vector<std::string> arguments = open;
    arguments.insert(arguments.end(), more.begin(), more.end());
    const TestDaemon::Result result = TestDaemon::RunToEnd(arguments);
    EXPECT_EQ(result.exit_code, 2) << result.output;
    return result.output;
  };
  EXPECT_THAT(run({}), HasSubstr("open to the network without TLS"));
  EXPECT_THAT(run({"--server-cert", File("server.pem"), "--server-key", File("server.key")}),
              HasSubstr("callers need not say who they are"));
  EXPECT_THAT(run({"--server-cert", File("server.pem")}), HasSubstr("come together"));
  EXPECT_THAT(run({"--server-cert", File("server.pem"), "--server-key", File("other.key")}),
              HasSubstr("is not that of the certificate"));
  EXPECT_THAT(run({"--server-cert", File("none.pem"), "--server-key", File("server.key")}),
              HasSubstr("No such file"));
  EXPECT_THAT(run({"--client-ca", File("ca.pem")}), HasSubstr("needs --server-cert"));
  EXPECT_THAT(run({"--tokens", File("none")}), HasSubstr("cannot read the tokens"));
  const auto asked = TestDaemon::Start({"--listen", "0.0.0.0:0", "--allow-insecure-tcp"});
  EXPECT_THAT(asked->Log(), HasSubstr("open to the network, by --allow-insecure-tcp"));
}

// Limits, log level and watermarks follow the file without a restart, by the verb and by SIGHUP; admins only.
TEST(Reload, LimitsAndLogLevelFollowTheFile) {
  const std::string folder = MakeFolder(), file = folder + "/kvtided.json";
  std::ofstream(file)
      << R"({"log_level": "warning", "quota": ["default:sequences=1"], "allow": ["tcp=guest"]})";
  const auto daemon = TestDaemon::Start({"--config", file, "--listen", "127.0.0.1:0", "--log-level", ""});
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  ASSERT_TRUE(client->CreateSequence("small", {}).ok());
  EXPECT_EQ(client->CreateSequence("small", {}).status().code(), absl::StatusCode::kResourceExhausted);
  std::ofstream(file) << R"({"log_level": "debug", "quota": ["default:sequences=3"], "high_watermark": 0.7,
                             "low_watermark": 0.6, "max_sequences": 2, "idle_seconds": 77})";
  auto changes = client->ReloadConfig();
  ASSERT_TRUE(changes.ok()) << changes.status();
  EXPECT_THAT(changes->changed, testing::UnorderedElementsAre("log_level", "quota", "max_sequences",
                                                              "high_watermark", "low_watermark"));
  EXPECT_THAT(changes->needs_restart, testing::UnorderedElementsAre("idle_seconds", "allow"));
  EXPECT_TRUE(client->CreateSequence("small", {}).ok()) << "the quota has grown";
  const absl::Status full = client->CreateSequence("small", {}).status();
  EXPECT_THAT(std::string(full.message()), HasSubstr("max_sequences")) << full;
  EXPECT_EQ(client->GetServerInfo()->max_sequences, 2);
  const auto running = client->GetConfig();
  ASSERT_TRUE(running.ok()) << running.status();
  EXPECT_EQ(running->file, file);
  for (const client::ConfigValue& value : running->values) {
    if (value.name == "low_watermark") {
      EXPECT_EQ(value.value + value.source, "0.6file");
    }
  }
  // What is not good changes nothing, and both say why.
  std::ofstream(file) << R"({"log_level": "loud"})";
  EXPECT_THAT(std::string(client->ReloadConfig().status().message()),
              HasSubstr("log_level \"loud\" is unknown"));
  EXPECT_THAT(daemon->Log(), HasSubstr("the configuration stays as it was: log_level"));
  EXPECT_THAT(daemon->Log(),
              HasSubstr("trouble=config problem=\"the settings from before are used: log_level"));
  std::ofstream(file) << R"({"log_level": "info", "quota": ["default:sequences=2"]})";
  ASSERT_EQ(::kill(daemon->pid(), SIGHUP), 0);
  for (int i = 0; i < 500 && !absl::StrContains(daemon->Log(), "trouble=config is over"); i++)
    absl::SleepFor(absl::Milliseconds(20));
  EXPECT_THAT(daemon->Log(), HasSubstr("reloaded changed=\"log_level quota max_sequences"));
  EXPECT_THAT(daemon->Log(), HasSubstr("trouble=config is over"));
  // Not for everybody.
  const size_t at = daemon->ready_line().find("127.0.0.1:");
  ASSERT_NE(at, std::string::npos) << daemon->ready_line();
  const auto guest =
      Client::Connect(daemon->ready_line().substr(at, daemon->ready_line().find_first_of(" ,", at) - at));
  ASSERT_TRUE(guest.ok()) << guest.status();
  EXPECT_EQ((*guest)->GetConfig().status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_EQ((*guest)->ReloadConfig().status().code(), absl::StatusCode::kPermissionDenied);
  std::filesystem::remove_all(folder);
}

}  // namespace
}  // namespace kvtide::e2e
