#include "daemon/service/address.h"

#include <stdlib.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <filesystem>
#include <fstream>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

using ::testing::HasSubstr;

TEST(Address, ReadsUnixAndTcp) {
  const auto unix_socket = ParseAddress("unix:/run/kvtide/../kvtide/s.sock");
  ASSERT_TRUE(unix_socket.ok());
  EXPECT_EQ(unix_socket->unix_path, "/run/kvtide/s.sock");
  EXPECT_EQ(unix_socket->text, "unix:/run/kvtide/s.sock");
  EXPECT_EQ(ParseAddress("unix:///run/s")->unix_path, "/run/s");
  EXPECT_FALSE(unix_socket->OpenToNetwork());
  const auto tcp = ParseAddress("127.0.0.1:7600");
  ASSERT_TRUE(tcp.ok());
  EXPECT_EQ(tcp->host, "127.0.0.1");
  EXPECT_EQ(tcp->port, 7600);
  EXPECT_FALSE(tcp->OpenToNetwork());
  EXPECT_EQ(ParseAddress("[::1]:0")->host, "::1");
  EXPECT_FALSE(ParseAddress("[::1]:0")->OpenToNetwork());
  EXPECT_TRUE(ParseAddress("0.0.0.0:7600")->OpenToNetwork());
  EXPECT_TRUE(ParseAddress("[::]:7600")->OpenToNetwork());
}

TEST(Address, RefusesWhatIsNone) {
  for (const char* text :
       {"", "7600", ":7600", "host:", "host:port", "host:70000", "host:-1", "unix:", "unix://"}) {
    const auto address = ParseAddress(text);
    EXPECT_EQ(address.status().code(), absl::StatusCode::kInvalidArgument) << text;
  }
}

class Claim : public ::testing::Test {
 protected:
  Claim() : folder_(mkdtemp(name_)), address_(ParseAddress("unix:" + folder_ + "/made/s.sock").value()) {}
  ~Claim() override { std::filesystem::remove_all(folder_); }

  char name_[32] = "/tmp/kvtide-address-XXXXXX";
  const std::string folder_;
  const Address address_;
};

TEST_F(Claim, MakesTheFolderAndIsTakenOnce) {
  auto first = AddressClaim::Take(address_);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_TRUE(std::filesystem::is_directory(folder_ + "/made"));
  const auto second = AddressClaim::Take(address_);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_THAT(std::string(second.status().message()), HasSubstr("another kvtided"));
  first->reset();
  EXPECT_TRUE(AddressClaim::Take(address_).ok()) << "a claim is free again when its holder is gone";
}

// Who waits for the file of a socket, as scripts do, can connect when it is there.
TEST_F(Claim, ShowsNoFileBeforeItListens) {
  auto claim = AddressClaim::Hold(address_).value();
  EXPECT_FALSE(std::filesystem::exists(address_.unix_path));
  EXPECT_EQ(AddressClaim::Hold(address_).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_FALSE(*claim->Mend()) << "it is not missed before it was shown";
  ASSERT_TRUE(claim->Show().ok());
  const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::strcpy(name.sun_path, address_.unix_path.c_str());
  EXPECT_EQ(::connect(fd, reinterpret_cast<const sockaddr*>(&name), sizeof(name)), 0);
  ::close(fd);
  claim.reset();
  // Held or shown, nothing stays but the lock.
  claim = AddressClaim::Hold(address_).value();
  claim.reset();
  std::vector<std::string> left;
  for (const auto& entry : std::filesystem::directory_iterator(folder_ + "/made"))
    left.push_back(entry.path().filename());
  EXPECT_THAT(left, ::testing::ElementsAre("s.sock.lock"));
  // The longest path that a socket can have.
  const std::string longest =
      folder_ + "/" + std::string(sizeof(sockaddr_un::sun_path) - 2 - folder_.size(), 'x');
  claim = AddressClaim::Hold(ParseAddress("unix:" + longest).value()).value();
  EXPECT_TRUE(claim->Show().ok());
  EXPECT_TRUE(std::filesystem::exists(longest));
}

// A mistyped path is not made to exist.
TEST_F(Claim, MakesOneFolderOnly) {
  const auto claim = AddressClaim::Take(ParseAddress("unix:" + folder_ + "/no/such/s.sock").value());
  EXPECT_EQ(claim.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(claim.status().message()), HasSubstr("correct --listen"));
  EXPECT_FALSE(std::filesystem::exists(folder_ + "/no"));
}

TEST_F(Claim, MakesItsFileAgainWhenThatIsGone) {
  auto claim = AddressClaim::Take(address_).value();
  const auto connects = [&] {
    const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
    sockaddr_un name{};
    name.sun_family = AF_UNIX;
    std::strcpy(name.sun_path, address_.unix_path.c_str());
    const bool ok = ::connect(fd, reinterpret_cast<const sockaddr*>(&name), sizeof(name)) == 0;
    ::close(fd);
    return ok;
  };
  EXPECT_FALSE(*claim->Mend());
  const std::vector<int> sockets = claim->sockets();
  for (int round = 0; round < 3; round++) {
    std::filesystem::remove(address_.unix_path);
    EXPECT_FALSE(connects());
    EXPECT_TRUE(*claim->Mend());
    EXPECT_TRUE(connects());
    EXPECT_FALSE(*claim->Mend());
    EXPECT_EQ(claim->sockets(), sockets);
  }
  // The whole folder, with the lock in it: taken again as well.
  std::filesystem::remove_all(folder_ + "/made");
  EXPECT_TRUE(*claim->Mend());
  EXPECT_TRUE(connects());
  EXPECT_FALSE(AddressClaim::Take(address_).ok());
  // A file of somebody else stays, also at the end.
  std::filesystem::remove(address_.unix_path);
  std::ofstream(address_.unix_path) << "mine";
  EXPECT_FALSE(claim->Mend().ok());
  claim.reset();
  EXPECT_TRUE(std::filesystem::exists(address_.unix_path));
}

TEST_F(Claim, RefusesAFolderOfAnotherUser) {
  if (::geteuid() != 0) GTEST_SKIP() << "only root can give a folder away";
  std::filesystem::create_directories(folder_ + "/made");
  ASSERT_EQ(::chown((folder_ + "/made").c_str(), 12345, 12345), 0);
  const auto claim = AddressClaim::Take(address_);
  EXPECT_EQ(claim.status().code(), absl::StatusCode::kPermissionDenied);
  EXPECT_THAT(std::string(claim.status().message()), HasSubstr("uid 12345"));
}

TEST_F(Claim, LeavesFilesAlone) {
  std::filesystem::create_directories(folder_ + "/made");
  std::ofstream(address_.unix_path) << "precious";
  EXPECT_EQ(AddressClaim::Take(address_).status().code(), absl::StatusCode::kAlreadyExists);
  EXPECT_TRUE(std::filesystem::is_regular_file(address_.unix_path));
}

}  // namespace
}  // namespace kvtide::service
