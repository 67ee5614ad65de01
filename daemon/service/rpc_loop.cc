#include "daemon/service/rpc_loop.h"

#include <utility>

namespace kvtide::service {
namespace {

// Calls that gRPC can give away before one of them has asked for the next.
constexpr int kAwaited = 16;

}  // namespace

Rpc::Rpc() { context_.AsyncNotifyWhenDone(&done_); }

void Rpc::Bind(Reactions* reactions) {
  reactions_.store(reactions);
  if (cancelled_.load()) reactions->OnCancel();
}

void Rpc::Read(grpc::ByteBuffer* message) {
  refs_.fetch_add(1, std::memory_order_relaxed);
  stream_.Read(message, &read_);
}

void Rpc::SendInitialMetadata() {
  refs_.fetch_add(1, std::memory_order_relaxed);
  stream_.SendInitialMetadata(&other_);
}

void Rpc::Write(const grpc::ByteBuffer& message) {
  refs_.fetch_add(1, std::memory_order_relaxed);
  stream_.Write(message, &written_);
}

void Rpc::WriteAndFinish(const grpc::ByteBuffer& message) {
  stream_.WriteAndFinish(message, grpc::WriteOptions(), grpc::Status::OK, &finished_);
}

void Rpc::Finish(const grpc::Status& status) { stream_.Finish(status, &finished_); }

void Rpc::React(Event event, bool ok) {
  Reactions* const reactions = reactions_.load();
  switch (event) {
    case Event::kRead:
      reactions->OnReadDone(ok);
      break;
    case Event::kWritten:
      reactions->OnWriteDone(ok);
      break;
    case Event::kDone:
      if (context_.IsCancelled()) {
        cancelled_.store(true);
        // The call may be bound at this moment, in another thread; that one looks at the flag afterwards.
        if (Reactions* const now = reactions_.load(); now != nullptr) now->OnCancel();
      }
      break;
    case Event::kBegun:
    case Event::kOther:
      break;
  }
  Unref();
}

void Rpc::Unref() {
  if (refs_.fetch_sub(1, std::memory_order_acq_rel) != 1) return;
  reactions_.load()->OnDone();
  delete this;
}

RpcLoop::RpcLoop(grpc::ServerBuilder* builder, Begin begin)
    : begin_(std::move(begin)), queue_(builder->AddCompletionQueue()) {
  builder->RegisterAsyncGenericService(&service_);
}

RpcLoop::~RpcLoop() {
  queue_->Shutdown();
  for (std::thread& thread : threads_) thread.join();
  // Without threads, events may be left.
  void* tag = nullptr;
  bool ok = false;
  while (queue_->Next(&tag, &ok)) {
  }
}

void RpcLoop::Start(int threads) {
  for (int i = 0; i < kAwaited; i++) AwaitCall();
  for (int i = 0; i < threads; i++) threads_.emplace_back([this] { Run(); });
}

void RpcLoop::AwaitCall() {
  Rpc* const rpc = new Rpc;
  service_.RequestCall(&rpc->context_, &rpc->stream_, queue_.get(), queue_.get(), &rpc->begun_);
}

void RpcLoop::Run() {
  void* next = nullptr;
  for (bool ok = false; queue_->Next(&next, &ok);) {
    const Rpc::Tag tag = *static_cast<Rpc::Tag*>(next);
    if (tag.event != Rpc::Event::kBegun) {
      tag.rpc->React(tag.event, ok);
      continue;
    }
    if (!ok) {  // the server ends: no call will come
      delete tag.rpc;
      continue;
    }
    AwaitCall();
    begin_(tag.rpc);
    tag.rpc->React(tag.event, true);
  }
}

}  // namespace kvtide::service
