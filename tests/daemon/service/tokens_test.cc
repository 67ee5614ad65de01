#include "daemon/service/tokens.h"

#include <unistd.h>

#include <cstdlib>
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

// `printf %s TOKEN | sha256sum`
constexpr char kAbc[] = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";  // abc
constexpr char kEmpty[] = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

class TokensTest : public ::testing::Test {
 protected:
  TokensTest() : folder_(::mkdtemp(name_)) {}
  ~TokensTest() override { std::filesystem::remove_all(folder_); }
  void Write(const std::string& text) { std::ofstream(path()) << text; }
  std::string path() const { return folder_ + "/tokens"; }

  char name_[32] = "/tmp/kvtide-tokens-XXXXXX";
  const std::string folder_;
  const absl::Time now_ = absl::FromUnixSeconds(1'800'000'000);  // 2027-01-15
};

TEST_F(TokensTest, GivesTheTenantOfAToken) {
  Write(std::string("# ours\n\n") + kAbc + " acme until=2027-02-01T00:00:00Z\n" + kEmpty + "\tops:admin\n");
  const auto tokens = Tokens::Load(path());
  ASSERT_TRUE(tokens.ok()) << tokens.status();
  EXPECT_EQ((*tokens)->size(), 2u);
  const auto acme = (*tokens)->Identify("abc", now_);
  ASSERT_TRUE(acme.ok()) << acme.status();
  EXPECT_EQ((*acme)->tenant, "acme");
  EXPECT_FALSE((*acme)->admin);
  EXPECT_TRUE((*(*tokens)->Identify("", now_))->admin);
  EXPECT_EQ((*tokens)->Identify("abd", now_).status().code(), absl::StatusCode::kUnauthenticated);
  const auto late = (*tokens)->Identify("abc", now_ + absl::Hours(24 * 30));
  EXPECT_EQ(late.status().code(), absl::StatusCode::kUnauthenticated);
  EXPECT_THAT(std::string(late.status().message()), HasSubstr("expired at 2027-02-01T00:00:00"));
}

TEST_F(TokensTest, AWrongLineIsNamedAndNeverRepeated) {
  for (const std::string& line :
       {std::string("secret acme"), std::string("sha256:1234 acme"), std::string(kAbc),
        std::string(kAbc) + " a/b", std::string(kAbc) + " acme 2027-01-01",
        std::string(kAbc) + " acme until=tomorrow",
        std::string(kAbc) + " acme until=2027-02-01T00:00:00Z more",
        std::string(kAbc).substr(0, 70) + "g acme"}) {
    Write("# first\n" + line + "\n");
    const auto tokens = Tokens::Load(path());
    EXPECT_EQ(tokens.status().code(), absl::StatusCode::kInvalidArgument) << line;
    EXPECT_THAT(std::string(tokens.status().message()),
                AllOf(HasSubstr(path() + ", line 2: "), Not(HasSubstr("secret")), Not(HasSubstr("ba7816"))));
  }
  EXPECT_THAT(std::string(Tokens::Load(folder_ + "/none").status().message()), HasSubstr("No such file"));
  EXPECT_EQ(Tokens::Load(folder_).status().code(), absl::StatusCode::kNotFound) << "a folder";
}

TEST_F(TokensTest, AReloadTakesAllOrNothing) {
  Write(std::string(kAbc) + " acme\n");
  const auto tokens = Tokens::Load(path()).value();
  Write(std::string(kAbc) + " other\nnonsense\n");
  EXPECT_FALSE(tokens->Reload().ok());
  EXPECT_EQ((*tokens->Identify("abc", now_))->tenant, "acme");
  Write(std::string(kAbc) + " other\n");
  EXPECT_TRUE(tokens->Reload().ok());
  EXPECT_EQ((*tokens->Identify("abc", now_))->tenant, "other");
  Write("");
  EXPECT_TRUE(tokens->Reload().ok());
  EXPECT_FALSE(tokens->Identify("abc", now_).ok());
}

}  // namespace
}  // namespace kvtide::service
