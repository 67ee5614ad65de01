#include "daemon/ring/handshake.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <filesystem>
#include <iterator>
#include <span>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "gtest/gtest.h"

namespace kvtide::ring {
namespace {

using absl::StatusCode;

void ExpectError(const absl::Status& status, StatusCode code, const std::string& part) {
  EXPECT_EQ(status.code(), code) << status;
  EXPECT_TRUE(absl::StrContains(status.message(), part)) << status;
}

TEST(Handshake, AHelloIsCheckedFieldByField) {
  EXPECT_TRUE(CheckHello(Hello(), 7).ok());
  Hello same;
  same.generation = 7;
  same.layout = LayoutFingerprint();
  EXPECT_TRUE(CheckHello(same, 7).ok());
  Hello hello;
  hello.magic[0] = 'G';
  ExpectError(CheckHello(hello, 7), StatusCode::kInvalidArgument, "shared-memory protocol only");
  hello = Hello();
  hello.version++;
  ExpectError(CheckHello(hello, 7), StatusCode::kFailedPrecondition,
              absl::StrCat("version ", kProtocolVersion + 1));
  hello = Hello();
  hello.generation = 8;
  ExpectError(CheckHello(hello, 7), StatusCode::kFailedPrecondition, "has ended");
  hello = Hello();
  hello.layout = LayoutFingerprint() + 1;
  ExpectError(CheckHello(hello, 7), StatusCode::kFailedPrecondition, "blocks of this kvtided");
}

TEST(Handshake, ARefusalComesBackAsItIs) {
  Welcome welcome;
  EXPECT_TRUE(CheckWelcome(welcome).ok());
  SetText(absl::PermissionDeniedError("user 5 may not"), &welcome);
  ExpectError(CheckWelcome(welcome), StatusCode::kPermissionDenied, "user 5 may not");
  SetText(absl::InternalError(std::string(5000, 'x')), &welcome);
  EXPECT_EQ(CheckWelcome(welcome).message().size(), sizeof(welcome.text) - 1);
  for (char& c : welcome.text) c = 'y';  // without an end
  EXPECT_EQ(CheckWelcome(welcome).message().size(), sizeof(welcome.text));
  welcome = Welcome();
  welcome.version++;
  ExpectError(CheckWelcome(welcome), StatusCode::kFailedPrecondition,
              absl::StrCat("version ", kProtocolVersion + 1));
  welcome.magic[2] = 'x';
  ExpectError(CheckWelcome(welcome), StatusCode::kFailedPrecondition, "no kvtided");
}

TEST(Handshake, BytesAndADescriptorGoThroughASocket) {
  int ends[2], pipe_ends[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
  ASSERT_EQ(::pipe(pipe_ends), 0);
  Welcome sent, received;
  sent.generation = 42;
  ASSERT_TRUE(Send(ends[0], std::as_bytes(std::span(&sent, 1)), {&pipe_ends[1], 1}).ok());
  int fd = -1;
  ASSERT_TRUE(
      Receive(ends[1], std::as_writable_bytes(std::span(&received, 1)), absl::Now() + absl::Seconds(30), &fd)
          .ok());
  EXPECT_EQ(received.generation, 42u);
  ASSERT_GE(fd, 0);
  char byte = 'k';
  ASSERT_EQ(::write(fd, &byte, 1), 1);
  byte = 0;
  ASSERT_EQ(::read(pipe_ends[0], &byte, 1), 1);
  EXPECT_EQ(byte, 'k');
  EXPECT_FALSE(HungUp(ends[1]));
  // More descriptors than were asked for are closed, not kept.
  const int several[] = {pipe_ends[0], pipe_ends[1], pipe_ends[0]};
  ASSERT_TRUE(Send(ends[0], std::as_bytes(std::span(&sent, 1)), several).ok());
  int one = -1;
  const auto open_descriptors = [] {
    const std::filesystem::directory_iterator entries("/proc/self/fd");
    return std::distance(begin(entries), end(entries));
  };
  const auto before = open_descriptors();
  ASSERT_TRUE(
      Receive(ends[1], std::as_writable_bytes(std::span(&received, 1)), absl::Now() + absl::Seconds(30), &one)
          .ok());
  EXPECT_NE(::fcntl(one, F_GETFD), -1);
  EXPECT_EQ(open_descriptors(), before + 1);
  ::close(one);
  ExpectError(Receive(ends[1], std::as_writable_bytes(std::span(&received, 1)), absl::Now(), &one),
              StatusCode::kDeadlineExceeded, "says nothing");
  ::close(ends[0]);
  EXPECT_TRUE(HungUp(ends[1]));
  ExpectError(Receive(ends[1], std::as_writable_bytes(std::span(&received, 1)),
                      absl::Now() + absl::Seconds(30), &one),
              StatusCode::kUnavailable, "closed");
  for (const int end : {ends[1], fd, pipe_ends[0], pipe_ends[1]}) ::close(end);
}

}  // namespace
}  // namespace kvtide::ring
