#include "daemon/metrics/http_request.h"

#include <random>

#include "gtest/gtest.h"

namespace kvtide::metrics {
namespace {

// The request, which is expected to be whole and good.
HttpRequest Take(std::string bytes) {
  const auto request = TakeHttpRequest(&bytes);
  EXPECT_TRUE(request.ok() && request->has_value()) << request.status();
  EXPECT_EQ(bytes, "");
  return request.ok() && request->has_value() ? **request : HttpRequest();
}

TEST(HttpRequest, AsScrapersWriteThem) {
  const HttpRequest prometheus = Take(
      "GET /metrics?x=1 HTTP/1.1\r\nHost: a:9464\r\nAccept: text/plain\r\nAccept-Encoding: gzip\r\n\r\n");
  EXPECT_EQ(prometheus.method, "GET");
  EXPECT_EQ(prometheus.path, "/metrics");
  EXPECT_TRUE(prometheus.keeps_alive && prometheus.takes_gzip);
  const HttpRequest old = Take("HEAD / HTTP/1.0\r\n\r\n");
  EXPECT_FALSE(old.keeps_alive || old.takes_gzip);
  EXPECT_FALSE(Take("GET / HTTP/1.1\r\nconnection:  Close \r\n\r\n").keeps_alive);
  EXPECT_TRUE(Take("GET / HTTP/1.0\r\nConnection: keep-alive\r\nContent-Length: 0\r\n\r\n").keeps_alive);
  EXPECT_TRUE(Take("GET / HTTP/1.1\r\nACCEPT-ENCODING: zstd, GZIP;q=0.5\r\n\r\n").takes_gzip);
  EXPECT_FALSE(Take("GET / HTTP/1.1\r\nAccept-Encoding: gzip;q=0, deflate\r\n\r\n").takes_gzip);
  EXPECT_FALSE(Take("GET / HTTP/1.1\r\nAccept-Encoding: xgzip\r\n\r\n").takes_gzip);
}

TEST(HttpRequest, OneAtATimeAndWholeOnesOnly) {
  const std::string one = "GET /a HTTP/1.1\r\nA: b\r\n\r\n";
  std::string two = one + "GET /b HTTP/1.1\r\n\r\nGET";
  EXPECT_EQ((*TakeHttpRequest(&two))->path, "/a");
  EXPECT_EQ((*TakeHttpRequest(&two))->path, "/b");
  EXPECT_EQ(*TakeHttpRequest(&two), std::nullopt);
  EXPECT_EQ(two, "GET");
  for (size_t i = 0; i < one.size(); i++) {
    std::string part = one.substr(0, i);
    EXPECT_EQ(*TakeHttpRequest(&part), std::nullopt) << i;
  }
}

TEST(HttpRequest, WhatIsNoneIsRefused) {
  for (std::string bytes :
       {"\r\n\r\n", "GET /\r\n\r\n", "GET / HTTP/2.0\r\n\r\n", "GET  / HTTP/1.1\r\n\r\n",
        " / HTTP/1.1\r\n\r\n", "GET / HTTP/1.1\r\nno colon\r\n\r\n", "GET / HTTP/1.1\r\n: no name\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\n",
        "GET / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"})
    EXPECT_EQ(TakeHttpRequest(&bytes).status().code(), absl::StatusCode::kInvalidArgument) << bytes;
  std::string large = "GET / HTTP/1.1\r\nA: " + std::string(kMostRequestBytes, 'x');
  EXPECT_EQ(TakeHttpRequest(&large).status().code(), absl::StatusCode::kResourceExhausted);
  large += "\r\n\r\n";
  EXPECT_EQ(TakeHttpRequest(&large).status().code(), absl::StatusCode::kResourceExhausted);
}

// Anything, made of what requests are made of: an answer, and never more taken than there is.
TEST(HttpRequest, Anything) {
  const std::string words[] = {"GET",
                               " ",
                               "/",
                               "HTTP/1.",
                               "1",
                               "\r\n",
                               "\r",
                               "\n",
                               ":",
                               "gzip",
                               ";q=",
                               "0",
                               ",",
                               "Accept-Encoding",
                               "Content-Length",
                               std::string(1, '\0'),
                               "\xff"};
  std::mt19937 random(1);
  for (int round = 0; round < 20000; round++) {
    std::string bytes;
    for (int i = 0; i < 24; i++) bytes += words[random() % std::size(words)];
    const size_t before = bytes.size();
    const auto request = TakeHttpRequest(&bytes);
    EXPECT_LE(bytes.size(), before);
    if (request.ok() && request->has_value()) {
      EXPECT_LT(bytes.size(), before);
    }
  }
}

}  // namespace
}  // namespace kvtide::metrics
