#include "daemon/metrics/endpoint.h"

#include <arpa/inet.h>
#include <sys/socket.h>
#include <unistd.h>
#include <zlib.h>

#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace kvtide::metrics {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

// A connection to the endpoint, closed at the end.
class Peer {
 public:
  explicit Peer(int port) : fd_(socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0)) {
    sockaddr_in peer{};
    peer.sin_family = AF_INET;
    peer.sin_port = htons(static_cast<uint16_t>(port));
    inet_pton(AF_INET, "127.0.0.1", &peer.sin_addr);
    EXPECT_EQ(connect(fd_, reinterpret_cast<const sockaddr*>(&peer), sizeof(peer)), 0);
  }
  ~Peer() { close(fd_); }
  Peer(const Peer&) = delete;
  Peer& operator=(const Peer&) = delete;

  void Send(const std::string& text) {
    EXPECT_EQ(send(fd_, text.data(), text.size(), MSG_NOSIGNAL), static_cast<ssize_t>(text.size()));
  }
  // What comes until the endpoint closes the connection.
  std::string ReadToEnd() {
    std::string answer;
    char buffer[4096];
    for (ssize_t n; (n = recv(fd_, buffer, sizeof(buffer), 0)) > 0;)
      answer.append(buffer, static_cast<size_t>(n));
    return answer;
  }
  // What comes until `bytes` of it have.
  std::string Read(size_t bytes) {
    std::string answer(bytes, '\0');
    EXPECT_EQ(recv(fd_, answer.data(), bytes, MSG_WAITALL), static_cast<ssize_t>(bytes));
    return answer;
  }

 private:
  const int fd_;
};

// The answer to GET /metrics with these headers: its own, and its body.
std::pair<std::string, std::string> Get(int port, const std::string& headers) {
  Peer peer(port);
  peer.Send("GET /metrics HTTP/1.1\r\nHost: test\r\n" + headers + "Connection: close\r\n\r\n");
  const std::string answer = peer.ReadToEnd();
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

// However many connect and say nothing, or half of a request, and however long the endpoint would wait for
// them.
TEST(EndpointTest, SilentConnectionsKeepNobodyWaiting) {
  Endpoint::Limits limits;
  limits.connections = 8;
  limits.patience = limits.rest = absl::InfiniteDuration();
  const auto endpoint = Endpoint::Start(
      {"127.0.0.1", 0}, [] { return std::string("text\n"); }, limits);
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  const int port = (*endpoint)->port();
  std::vector<std::unique_ptr<Peer>> silent;
  for (int i = 0; i < 200; i++) {
    silent.push_back(std::make_unique<Peer>(port));
    if (i % 2 == 0) silent.back()->Send("GET /met");
  }
  for (int i = 0; i < 10; i++) EXPECT_EQ(Get(port, "").second, "text\n");
  EXPECT_EQ(silent.front()->ReadToEnd(), "") << "it has made way";
  EXPECT_EQ(Get(port, "").second, "text\n");
}

// Nor do those that take no answer, which is more than the sockets hold.
TEST(EndpointTest, DeafConnectionsKeepNobodyWaiting) {
  const std::string text(16 << 20, 'x');
  Endpoint::Limits limits;
  limits.connections = 4;
  limits.patience = limits.rest = absl::InfiniteDuration();
  const auto endpoint = Endpoint::Start(
      {"127.0.0.1", 0}, [&] { return text; }, limits);
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  std::vector<std::unique_ptr<Peer>> deaf;
  for (int i = 0; i < 6; i++) {
    deaf.push_back(std::make_unique<Peer>((*endpoint)->port()));
    deaf.back()->Send("GET /metrics HTTP/1.1\r\n\r\n");
  }
  EXPECT_EQ(Get((*endpoint)->port(), "").second, text);
}

TEST(EndpointTest, WhoSaysNothingIsLetGo) {
  Endpoint::Limits limits;
  limits.patience = absl::Milliseconds(20);
  limits.rest = absl::Milliseconds(20);
  const auto endpoint = Endpoint::Start(
      {"127.0.0.1", 0}, [] { return std::string("text\n"); }, limits);
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  Peer silent((*endpoint)->port()), half((*endpoint)->port()), resting((*endpoint)->port());
  half.Send("GET /met");
  resting.Send("GET /metrics HTTP/1.1\r\n\r\n");
  EXPECT_EQ(silent.ReadToEnd(), "");
  EXPECT_EQ(half.ReadToEnd(), "");
  EXPECT_THAT(resting.ReadToEnd(), HasSubstr("text"));
}

TEST(EndpointTest, OneConnectionAsksManyTimes) {
  int scrapes = 0;
  const auto endpoint = Endpoint::Start({"127.0.0.1", 0}, [&] { return std::to_string(scrapes++); });
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  Peer peer((*endpoint)->port());
  const std::string head =
      "HTTP/1.1 200 OK\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: 1\r\n\r\n";
  peer.Send("GET /metrics HTTP/1.1\r\n\r\n");
  EXPECT_EQ(peer.Read(head.size() + 1), head + "0");
  // Two in one piece, and one in three.
  peer.Send("GET /metrics?a=b HTTP/1.1\r\nHost: x\r\n\r\nGET /metrics HTTP/1.1\r\n\r\n");
  EXPECT_EQ(peer.Read(head.size() + 1), head + "1");
  EXPECT_EQ(peer.Read(head.size() + 1), head + "2");
  for (const char* piece : {"GET /met", "rics HTTP/1.1\r\n\r", "\n"}) peer.Send(piece);
  EXPECT_EQ(peer.Read(head.size() + 1), head + "3");
  peer.Send("HEAD /metrics HTTP/1.1\r\n\r\n");
  EXPECT_EQ(peer.Read(head.size()), head) << "its length, and no text";
  peer.Send("GET / HTTP/1.1\r\nConnection: close\r\n\r\n");
  EXPECT_THAT(peer.ReadToEnd(), AllOf(HasSubstr("404 Not Found"), HasSubstr("Connection: close")));
}

TEST(EndpointTest, WhatIsNoScrapeIsToldSo) {
  const auto endpoint = Endpoint::Start({"127.0.0.1", 0}, [] { return std::string("text\n"); });
  ASSERT_TRUE(endpoint.ok()) << endpoint.status();
  const auto ask = [&](const std::string& request) {
    Peer peer((*endpoint)->port());
    peer.Send(request);
    return peer.ReadToEnd();
  };
  EXPECT_THAT(ask("DELETE /metrics HTTP/1.0\r\n\r\n"), HasSubstr("405 Method Not Allowed"));
  EXPECT_THAT(ask("POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"), HasSubstr("400 Bad Request"));
  EXPECT_THAT(ask("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), HasSubstr("400 Bad Request"));
  EXPECT_THAT(ask("\x16\x03\x01\r\n\r\n"), HasSubstr("400 Bad Request"));
  EXPECT_THAT(ask("GET /metrics HTTP/1.1\r\nX: " + std::string(20 << 10, 'x')), HasSubstr("431 "));
  EXPECT_EQ(Get((*endpoint)->port(), "").second, "text\n");
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
