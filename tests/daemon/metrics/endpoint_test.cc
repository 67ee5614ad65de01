#include "daemon/metrics/endpoint.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>
#include <zlib.h>

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::metrics {
namespace {

using testing::HasSubstr;
using testing::Not;

// The answer to GET /metrics with these headers: its own, and its body.
std::pair<std::string, std::string> Get(int port, const std::string& headers) {
  sockaddr_in peer{};
  peer.sin_family = AF_INET;
  peer.sin_port = htons(static_cast<uint16_t>(port));
  inet_pton(AF_INET, "127.0.0.1", &peer.sin_addr);
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  EXPECT_EQ(connect(fd, reinterpret_cast<const sockaddr*>(&peer), sizeof(peer)), 0);
  const std::string request =
      "GET /metrics HTTP/1.1\r\nHost: test\r\n" + headers + "Connection: close\r\n\r\n";
  EXPECT_EQ(send(fd, request.data(), request.size(), 0), static_cast<ssize_t>(request.size()));
  std::string answer;
  char buffer[4096];
  for (ssize_t n; (n = recv(fd, buffer, sizeof(buffer), 0)) > 0;)
    answer.append(buffer, static_cast<size_t>(n));
  close(fd);
  const size_t end = answer.find("\r\n\r\n");
  return {answer.substr(0, end), end == std::string::npos ? "" : answer.substr(end + 4)};
}

std::string Gunzip(const std::string& packed, size_t most) {
  std::string text(most, '\0');
  z_stream stream{};
  EXPECT_EQ(inflateInit2(&stream, MAX_WBITS + 16), Z_OK);
  stream.next_in = reinterpret_cast<Bytef*>(const_cast<char*>(packed.data()));
  stream.avail_in = static_cast<uInt>(packed.size());
  stream.next_out = reinterpret_cast<Bytef*>(text.data());
  stream.avail_out = static_cast<uInt>(text.size());
  EXPECT_EQ(inflate(&stream, Z_FINISH), Z_STREAM_END);
  text.resize(stream.total_out);
  inflateEnd(&stream);
  return text;
}

TEST(EndpointTest, CompressesWhatIsAskedForCompressed) {
  std::string text;
  for (int i = 0; i < 3000; i++)
    text += "kvtide_rpc_requests_total{method=\"m" + std::to_string(i) + "\"} 0\n";
  const auto endpoint = Endpoint::Start({"127.0.0.1", 0}, [&] { return text; });
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  const auto [plain_head, plain] = Get((*endpoint)->port(), "");
  EXPECT_THAT(plain_head, HasSubstr("HTTP/1.1 200 OK"));
  EXPECT_THAT(plain_head, HasSubstr("Content-Length: " + std::to_string(text.size())));
  EXPECT_THAT(plain_head, Not(HasSubstr("Content-Encoding")));
  EXPECT_EQ(plain, text);
  const auto [head, packed] = Get((*endpoint)->port(), "Accept-Encoding: zstd, gzip;q=1.0\r\n");
  EXPECT_THAT(head, HasSubstr("Content-Encoding: gzip"));
  EXPECT_LT(packed.size(), text.size() / 5);
  EXPECT_EQ(Gunzip(packed, text.size() + 1), text);
}

TEST(EndpointTest, GzipOfAnything) {
  std::string text;
  for (const size_t size : {0, 1, 1000, 300000}) {
    while (text.size() < size) text.push_back(static_cast<char>(text.size() * 2654435761u >> 24));
    EXPECT_EQ(Gunzip(Gzip(text), text.size() + 1), text);
  }
}

}  // namespace
}  // namespace kvtide::metrics
