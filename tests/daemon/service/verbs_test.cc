#include "daemon/service/verbs.h"

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/service/handlers.h"
#include "gtest/gtest.h"
#include "kernels/cpu/cpu_backend.h"

namespace kvtide::service {
namespace {

grpc::ByteBuffer Bytes(const std::string& text, size_t piece = 7) {
  std::vector<grpc::Slice> slices;
  for (size_t at = 0; at < text.size(); at += piece) slices.emplace_back(text.substr(at, piece));
  return grpc::ByteBuffer(slices.data(), slices.size());
}

v1::SessionRequest Append(const std::string& request_id, const std::string& traceparent) {
  v1::SessionRequest request;
  request.set_request_id(17);
  request.mutable_append()->set_sequence_id(4711);
  request.mutable_append()->add_layers()->mutable_k()->set_data(std::string(5000, 'x'));
  request.set_x_request_id(request_id);
  request.set_traceparent(traceparent);
  return request;
}

TEST(SessionHead, WhatStandsAroundTheCall) {
  const SessionHead head = ReadSessionHead(Bytes(Append("chat-17", "00-a").SerializeAsString()));
  ASSERT_NE(head.verb, nullptr);
  EXPECT_STREQ(head.verb->method, "Append");
  EXPECT_EQ(head.request_id, 17u);
  EXPECT_EQ(head.x_request_id, "chat-17");
  EXPECT_EQ(head.traceparent, "00-a");
  // In whatever order they are written.
  v1::SessionRequest names;
  names.set_x_request_id("chat-17");
  const SessionHead other =
      ReadSessionHead(Bytes(names.SerializeAsString() + Append("", "00-b").SerializeAsString()));
  EXPECT_STREQ(other.verb->method, "Append");
  EXPECT_EQ(other.request_id, 17u);
  EXPECT_EQ(other.x_request_id, "chat-17");
  EXPECT_EQ(other.traceparent, "00-b");
}

// The thread that reads it looks after sockets: it takes no long texts, and does not walk through a message
// of millions of fields.
TEST(SessionHead, IsShortWhateverTheMessageIs) {
  const std::string good = Append("", "").SerializeAsString();
  EXPECT_EQ(
      ReadSessionHead(Bytes(Append(std::string(1 << 20, 'x'), "00-c").SerializeAsString())).x_request_id, "");
  EXPECT_EQ(ReadSessionHead(Bytes(Append(std::string(1 << 20, 'x'), "00-c").SerializeAsString())).traceparent,
            "00-c");
  std::string many;
  for (int i = 0; i < 100; i++) many += "\x08\x01";
  EXPECT_EQ(ReadSessionHead(Bytes(many + good)).verb, nullptr);
  EXPECT_EQ(ReadSessionHead(Bytes(absl::StrCat("\x0b", good))).verb, nullptr) << "a group";
  EXPECT_EQ(ReadSessionHead(Bytes("")).verb, nullptr);
  EXPECT_EQ(ReadSessionHead(Bytes("\xff\xff\xff")).verb, nullptr);
  for (size_t cut = 1; cut < 60; cut++) ReadSessionHead(Bytes(good.substr(0, cut), cut));
}

// A request waits in the lane of its verb. One that would become another call there is refused.
TEST(SessionRequest, CarriesOneCall) {
  const std::unique_ptr<Backend> backend = MakeCpuBackend({.threads = 1});
  CacheOptions options;
  options.tiers = {{"device", backend.get(), size_t{1} << 20, false, {}}};
  options.background_moves = false;
  const auto cache = KvCache::Create(options).value();
  Handlers handlers(cache.get(), ServiceOptions());
  SessionOwned owned;
  v1::SessionRequest info, stats;
  info.mutable_get_server_info();
  stats.mutable_get_stats();
  const auto serve = [&](const std::string& text) {
    grpc::ByteBuffer request = Bytes(text), answer;
    SequenceId sequence = 0;
    return ServeSessionRequest(&handlers, ReadSessionHead(request).verb, &request, Call(), &answer, &sequence,
                               &owned);
  };
  EXPECT_TRUE(serve(info.SerializeAsString()).ok());
  EXPECT_TRUE(serve(stats.SerializeAsString()).ok());
  std::string padding;
  for (int i = 0; i < 6; i++) padding += "\x08\x01";
  // The last of several counts, and what stands before it is not seen.
  const absl::Status two = serve(info.SerializeAsString() + padding + padding + stats.SerializeAsString());
  EXPECT_EQ(two.code(), absl::StatusCode::kInvalidArgument) << two;
}

}  // namespace
}  // namespace kvtide::service
