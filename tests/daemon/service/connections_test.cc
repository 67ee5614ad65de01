#include "daemon/service/connections.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include "gtest/gtest.h"

namespace kvtide::service {
namespace {

// Who has hung up has ended, and so has a connection whose descriptor is closed here or somebody else's by
// now.
TEST(Connections, KnowWhoHasEnded) {
  Connections connections;
  int pair[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, pair), 0);
  const auto connection = connections.Add(pair[0]);
  EXPECT_FALSE(connections.HasEnded(*connection));
  ASSERT_EQ(::write(pair[1], "x", 1), 1);
  EXPECT_FALSE(connections.HasEnded(*connection)) << "it speaks";
  ::close(pair[1]);
  EXPECT_TRUE(connections.HasEnded(*connection));

  int other[2];
  ASSERT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, other), 0);
  ASSERT_EQ(::dup2(other[0], pair[0]), pair[0]);
  EXPECT_TRUE(connections.HasEnded(*connection)) << "its descriptor is another socket's";
  const auto next = connections.Add(pair[0]);
  EXPECT_TRUE(connections.HasEnded(*connection));
  EXPECT_FALSE(connections.HasEnded(*next));
  for (const int fd : {pair[0], other[0], other[1]}) ::close(fd);
  EXPECT_TRUE(connections.HasEnded(*next));
  EXPECT_TRUE(connections.HasEnded(Connection())) << "that stands for those that have gone";
}

}  // namespace
}  // namespace kvtide::service
