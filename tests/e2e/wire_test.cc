// What no well-behaved client sends: garbage on the socket, messages that are none, tensors that lie about
// themselves; and the standard services that clients of any language expect.
#include <arpa/inet.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "gmock/gmock.h"
#include "grpcpp/create_channel.h"
#include "grpcpp/generic/generic_stub.h"
#include "gtest/gtest.h"
#include "kvtide/v1/kv_cache_service.grpc.pb.h"
#include "tests/e2e/test_daemon.h"

namespace kvtide::e2e {
namespace {

using ::testing::HasSubstr;

int ConnectTo(const std::string& path) {
  const int fd = ::socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un name{};
  name.sun_family = AF_UNIX;
  std::memcpy(name.sun_path, path.c_str(), path.size() + 1);
  EXPECT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&name), sizeof(name)), 0);
  return fd;
}

// Sends, and reads until the other side closes or is silent for a second.
std::string Exchange(int fd, const std::string& text) {
  timeval patience{1, 0};
  ::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
  size_t sent = 0;
  while (sent < text.size()) {
    const ssize_t n = ::send(fd, text.data() + sent, text.size() - sent, MSG_NOSIGNAL);
    if (n <= 0) break;
    sent += static_cast<size_t>(n);
  }
  std::string answer;
  char buffer[4096];
  for (ssize_t n; answer.size() < (1 << 20) && (n = ::recv(fd, buffer, sizeof(buffer), 0)) > 0;) {
    answer.append(buffer, static_cast<size_t>(n));
  }
  ::close(fd);
  return answer;
}

std::shared_ptr<grpc::Channel> ChannelTo(const TestDaemon& daemon) {
  return grpc::CreateChannel(daemon.address(), grpc::InsecureChannelCredentials());
}

// One unary call with bytes as they are.
grpc::Status CallRaw(const TestDaemon& daemon, const std::string& method, const std::string& bytes) {
  grpc::GenericStub stub(ChannelTo(daemon));
  grpc::CompletionQueue queue;
  grpc::ClientContext context;
  grpc::Slice slice(bytes);
  const grpc::ByteBuffer request(&slice, 1);
  grpc::ByteBuffer response;
  grpc::Status status;
  auto call = stub.PrepareUnaryCall(&context, method, request, &queue);
  call->StartCall();
  call->Finish(&response, &status, nullptr);
  void* tag = nullptr;
  bool ok = false;
  queue.Next(&tag, &ok);
  return status;
}

TEST(Wire, GarbageBytesDoNotHurt) {
  const auto daemon = TestDaemon::Start();
  std::string noise(100000, '\0');
  uint32_t state = 12345;
  for (char& c : noise) c = static_cast<char>((state = state * 1664525u + 1013904223u) >> 24);
  Exchange(ConnectTo(daemon->socket_path()), noise);
  Exchange(ConnectTo(daemon->socket_path()), "GET / HTTP/1.1\r\nHost: x\r\n\r\n");
  Exchange(ConnectTo(daemon->socket_path()), "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + noise);
  Exchange(ConnectTo(daemon->socket_path()), "");
  // Not a protobuf message; an unknown method.
  EXPECT_FALSE(CallRaw(*daemon, "/kvtide.v1.KvCacheService/Append", "\xff\xff\xff\xff").ok());
  EXPECT_EQ(CallRaw(*daemon, "/kvtide.v1.KvCacheService/Nonsense", "").error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
  ASSERT_TRUE(daemon->Alive());
  EXPECT_TRUE(daemon->Connect()->GetStats().ok());
}

TEST(Wire, TensorsThatLieAreRefused) {
  const auto daemon = TestDaemon::Start();
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  const auto sequence = client->CreateSequence("small");
  ASSERT_TRUE(sequence.ok());
  const auto stub = v1::KvCacheService::NewStub(ChannelTo(*daemon));
  const auto append = [&](void (*change)(v1::Tensor*)) {
    v1::AppendRequest request;
    request.set_sequence_id(*sequence);
    v1::LayerTokens* layer = request.add_layers();
    for (v1::Tensor* tensor : {layer->mutable_k(), layer->mutable_v()}) {
      tensor->set_dtype(v1::DATA_TYPE_F32);
      for (int64_t dimension : {3, kKvHeads, kDim}) tensor->add_shape(dimension);
      tensor->set_data(std::string(3 * kKvHeads * kDim * 4, '\0'));
    }
    change(layer->mutable_k());
    v1::AppendResponse response;
    grpc::ClientContext context;
    return stub->Append(&context, request, &response);
  };
  const struct {
    void (*change)(v1::Tensor*);
    const char* message;
  } kCases[] = {
      {[](v1::Tensor* t) { t->clear_dtype(); }, "k: dtype is not set"},
      {[](v1::Tensor* t) { t->set_dtype(static_cast<v1::DataType>(77)); }, "unknown dtype 77"},
      {[](v1::Tensor* t) { t->set_dtype(v1::DATA_TYPE_F16); }, "data has 1536 bytes"},
      {[](v1::Tensor* t) { t->mutable_data()->pop_back(); }, "data has 1535 bytes"},
      {[](v1::Tensor* t) { t->clear_data(); }, "data has 0 bytes"},
      {[](v1::Tensor* t) { t->set_shape(0, 0); }, "at least one token"},
      {[](v1::Tensor* t) { t->set_shape(0, -3); }, "at least one token"},
      {[](v1::Tensor* t) { t->set_shape(0, int64_t{1} << 62); }, "data has"},
      {[](v1::Tensor* t) { t->clear_shape(); }, "the shape is []"},
  };
  for (const auto& c : kCases) {
    const grpc::Status status = append(c.change);
    EXPECT_EQ(status.error_code(), grpc::StatusCode::INVALID_ARGUMENT) << c.message;
    EXPECT_THAT(status.error_message(), HasSubstr(c.message));
  }
  const grpc::Status good = append([](v1::Tensor*) {});
  EXPECT_TRUE(good.ok()) << good.error_message();
}

TEST(Wire, AttendsInTheAskedTypes) {
  const auto daemon = TestDaemon::Start();
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  const auto sequence = client->CreateSequence("small", {.pair = "f16/f16"});
  ASSERT_TRUE(client->Append(*sequence, 0, Tokens(1, 0, 70).layers).ok());
  const auto stub = v1::KvCacheService::NewStub(ChannelTo(*daemon));
  const std::vector<float> q = Rows(2, 0, 1, kHeads);
  std::vector<float> results[3];
  const v1::DataType kTypes[] = {v1::DATA_TYPE_F32, v1::DATA_TYPE_F16, v1::DATA_TYPE_BF16};
  for (int i = 0; i < 3; i++) {
    v1::AttendRequest request;
    request.mutable_options()->set_output_dtype(kTypes[i]);
    v1::AttendItem* item = request.add_items();
    item->set_sequence_id(*sequence);
    item->mutable_q()->set_dtype(kTypes[i]);
    for (int64_t dimension : {1, kHeads, kDim}) item->mutable_q()->add_shape(dimension);
    if (i == 0) {
      item->mutable_q()->set_data(q.data(), q.size() * 4);
    } else {
      std::vector<uint16_t> narrow;
      for (float x : q) narrow.push_back(i == 1 ? F32ToF16(x) : F32ToBf16(x));
      item->mutable_q()->set_data(narrow.data(), narrow.size() * 2);
    }
    v1::AttendResponse response;
    grpc::ClientContext context;
    const grpc::Status status = stub->Attend(&context, request, &response);
    ASSERT_TRUE(status.ok()) << status.error_message();
    const v1::Tensor& output = response.results(0).output();
    EXPECT_EQ(output.dtype(), kTypes[i]);
    EXPECT_EQ(response.results(0).lse().dtype(), v1::DATA_TYPE_F32);
    TensorView view{output.data().data(), i == 0   ? DataType::kF32
                                          : i == 1 ? DataType::kF16
                                                   : DataType::kBf16};
    for (size_t j = 0; j < q.size(); j++) results[i].push_back(view.At(j));
  }
  EXPECT_LT(LargestDifference(results[0], results[1]), 2e-3);
  EXPECT_LT(LargestDifference(results[0], results[2]), 2e-2);
  EXPECT_GT(LargestDifference(results[0], results[2]), 0);
}

TEST(Wire, ASessionRefusesAnEmptyCallAndGoesOn) {
  const auto daemon = TestDaemon::Start();
  const auto stub = v1::KvCacheService::NewStub(ChannelTo(*daemon));
  grpc::ClientContext context;
  const auto stream = stub->Session(&context);
  v1::SessionRequest request;
  request.set_request_id(1);
  ASSERT_TRUE(stream->Write(request));
  request.set_request_id(2);
  request.mutable_get_stats();
  ASSERT_TRUE(stream->Write(request));
  v1::SessionResponse response;
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.request_id(), 1u);
  EXPECT_EQ(response.error().code(), grpc::StatusCode::INVALID_ARGUMENT);
  ASSERT_TRUE(stream->Read(&response));
  EXPECT_EQ(response.request_id(), 2u);
  EXPECT_TRUE(response.has_get_stats());
  stream->WritesDone();
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_TRUE(stream->Finish().ok());
}

TEST(Wire, TheSocketIsForOwnerAndGroupAndReflectionAnswers) {
  const auto daemon = TestDaemon::Start();
  struct stat info {};
  ASSERT_EQ(::stat(daemon->socket_path().c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0660u);
  ASSERT_EQ(::stat((daemon->folder() + "/run").c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0750u);
  // A stream without requests: the service is there and ends it well.
  EXPECT_NE(
      CallRaw(*daemon, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "").error_code(),
      grpc::StatusCode::UNIMPLEMENTED);
}

TEST(Wire, MetricsTellWhatHappened) {
  const auto daemon = TestDaemon::Start({"--metrics-address", "127.0.0.1:0"});
  const auto client = daemon->Connect();
  ASSERT_TRUE(client->RegisterModel(SmallModel()).ok());
  const auto sequence = client->CreateSequence("small", {.pair = "f16/f16"});
  ASSERT_TRUE(client->Append(*sequence, 0, Tokens(1, 0, 100).layers).ok());
  EXPECT_FALSE(client->CreateSequence("nobody").ok());
  const std::string address = daemon->metrics_address();
  const size_t colon = address.rfind(':');
  ASSERT_NE(colon, std::string::npos) << daemon->ready_line();
  sockaddr_in name{};
  name.sin_family = AF_INET;
  name.sin_port = htons(static_cast<uint16_t>(std::stoi(address.substr(colon + 1))));
  ::inet_pton(AF_INET, address.substr(0, colon).c_str(), &name.sin_addr);
  const int fd = ::socket(AF_INET, SOCK_STREAM, 0);
  ASSERT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&name), sizeof(name)), 0);
  const std::string text = Exchange(fd, "GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
  EXPECT_THAT(text, HasSubstr("200 OK"));
  EXPECT_THAT(text, HasSubstr("kvtide_sequences 1"));
  EXPECT_THAT(text, HasSubstr("kvtide_appended_tokens_total 100"));
  EXPECT_THAT(text, HasSubstr("method=\"Append\""));
  EXPECT_THAT(text, HasSubstr("NOT_FOUND"));
}

}  // namespace
}  // namespace kvtide::e2e
