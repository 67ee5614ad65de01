#include "daemon/service/health.h"

#include <string>
#include <utility>

#include "absl/strings/string_view.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/wire_format_lite.h"
#include "grpcpp/support/proto_buffer_reader.h"
#include "grpcpp/support/slice.h"

namespace kvtide::service {
namespace {

// HealthCheckRequest has one field, the service's name as text, with number 1. False: it is malformed.
bool ReadRequest(grpc::ByteBuffer* bytes, std::string* service) {
  using google::protobuf::internal::WireFormatLite;
  constexpr int kService = 1;
  grpc::ProtoBufferReader reader(bytes);
  if (!reader.status().ok()) return bytes->Length() == 0;
  google::protobuf::io::CodedInputStream stream(&reader);
  while (const uint32_t tag = stream.ReadTag()) {
    if (tag == WireFormatLite::MakeTag(kService, WireFormatLite::WIRETYPE_LENGTH_DELIMITED)) {
      uint32_t size = 0;
      if (!stream.ReadVarint32(&size) || !stream.ReadString(service, static_cast<int>(size))) return false;
    } else if (!WireFormatLite::SkipField(&stream, tag)) {
      return false;
    }
  }
  return stream.ConsumedEntireMessage();
}

bool IsOurs(absl::string_view service) { return service.empty() || service == "kvtide.v1.KvCacheService"; }

grpc::Status Malformed() {
  return {grpc::StatusCode::INVALID_ARGUMENT, "the request is no grpc.health.v1.HealthCheckRequest"};
}

// HealthCheckResponse: the status as number 1.
grpc::ByteBuffer Response(Health::Status status) {
  const char bytes[] = {0x08, static_cast<char>(status)};
  const grpc::Slice slice(bytes, sizeof(bytes));
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace

class Health::CheckCall final : public Rpc::Reactions {
 public:
  CheckCall(Health* health, Rpc* rpc) : health_(health), rpc_(rpc) {}

  void Start() { rpc_->Read(&request_); }
  void OnReadDone(bool ok) override {
    std::string service;
    if (!ok || !ReadRequest(&request_, &service)) {
      rpc_->Finish(Malformed());
    } else if (!IsOurs(service)) {
      rpc_->Finish({grpc::StatusCode::NOT_FOUND, "this kvtided has no service " + service});
    } else {
      const MutexLock lock(health_->mutex_);
      rpc_->WriteAndFinish(Response(health_->status_));
    }
  }
  void OnWriteDone(bool) override {}
  void OnCancel() override {}
  void OnDone() override { delete this; }

 private:
  Health* const health_;
  Rpc* const rpc_;
  grpc::ByteBuffer request_;
};

// Tells the status once, and again whenever it has changed, until the client goes. One write at a time.
class Health::WatchCall final : public Rpc::Reactions {
 public:
  WatchCall(Health* health, Rpc* rpc) : health_(health), rpc_(rpc) {}

  void Start() { rpc_->Read(&request_); }
  void OnReadDone(bool ok) override {
    std::string service;
    if (!ok || !ReadRequest(&request_, &service)) {
      rpc_->Finish(Malformed());
      return;
    }
    const MutexLock lock(health_->mutex_);
    known_ = IsOurs(service);
    health_->watches_.insert(this);
    rpc_->SendInitialMetadata();
    Go();
  }
  void OnWriteDone(bool ok) override {
    const MutexLock lock(health_->mutex_);
    writing_ = false;
    gone_ = gone_ || !ok;
    Go();
  }
  void OnCancel() override {
    const MutexLock lock(health_->mutex_);
    gone_ = true;
    if (health_->watches_.contains(this)) Go();
  }
  void OnDone() override {
    {
      const MutexLock lock(health_->mutex_);
      health_->watches_.erase(this);
    }
    delete this;
  }

  // What is to be done next, if anything. The mutex of health_ is held.
  void Go() ABSL_NO_THREAD_SAFETY_ANALYSIS {
    if (writing_ || finished_) return;
    const Status status = known_ ? health_->status_ : Status::kServiceUnknown;
    if (gone_) {
      finished_ = true;
      rpc_->Finish(grpc::Status::CANCELLED);
    } else if (status != told_) {
      told_ = status;
      writing_ = true;
      answer_ = Response(status);
      rpc_->Write(answer_);
    }
  }

 private:
  Health* const health_;
  Rpc* const rpc_;
  grpc::ByteBuffer request_, answer_;
  bool known_ = false, writing_ = false, gone_ = false, finished_ = false;
  Status told_{};
};

bool Health::Begin(Rpc* rpc) {
  const std::string& method = rpc->context()->method();
  if (method == "/grpc.health.v1.Health/Check") {
    auto* const call = new CheckCall(this, rpc);
    rpc->Bind(call);
    call->Start();
  } else if (method == "/grpc.health.v1.Health/Watch") {
    auto* const call = new WatchCall(this, rpc);
    rpc->Bind(call);
    call->Start();
  } else {
    return false;
  }
  return true;
}

void Health::SetServing(bool serving) {
  const MutexLock lock(mutex_);
  status_ = serving ? Status::kServing : Status::kNotServing;
  for (WatchCall* watch : watches_) watch->Go();
}

}  // namespace kvtide::service
