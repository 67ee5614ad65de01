#include "daemon/service/rpc_loop.h"

#include <chrono>
#include <utility>

namespace kvtide::service {
namespace {

// Calls that gRPC can give away before one of them has asked for the next.
constexpr int kAwaited = 16;
// A helper that finds nothing to do for so long sleeps until it is called.
constexpr std::chrono::milliseconds kBreath{5};

}  // namespace

Rpc::Rpc(std::atomic<int>* living) : living_(living) { context_.AsyncNotifyWhenDone(&done_); }

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
  living_->fetch_sub(1);
  delete this;
}

RpcLoop::RpcLoop(grpc::ServerBuilder* builder, Begin begin)
    : begin_(std::move(begin)), queue_(builder->AddCompletionQueue()) {
  builder->RegisterAsyncGenericService(&service_);
}

RpcLoop::~RpcLoop() {
  queue_->Shutdown();
  {
    const MutexLock lock(mutex_);
    stopping_ = true;
  }
  wake_.NotifyAll();
  for (std::thread& thread : threads_) thread.join();
  // Without threads, events may be left.
  void* tag = nullptr;
  bool ok = false;
  while (queue_->Next(&tag, &ok)) {
  }
}

void RpcLoop::Start(int threads, std::function<bool()> busy) {
  busy_ = std::move(busy);
  for (int i = 0; i < kAwaited; i++) AwaitCall();
  threads_.emplace_back([this] { Run(); });
  for (int i = 1; i < threads; i++) threads_.emplace_back([this] { Help(); });
}

void RpcLoop::AwaitCall() {
  Rpc* const rpc = new Rpc(&living_);
  service_.RequestCall(&rpc->context_, &rpc->stream_, queue_.get(), queue_.get(), &rpc->begun_);
}

void RpcLoop::WaitForCalls() const {
  while (living_ > 0) std::this_thread::sleep_for(std::chrono::milliseconds(1));
}

void RpcLoop::Run() {
  void* tag = nullptr;
  for (bool ok = false; queue_->Next(&tag, &ok);) Handle(tag, ok);
}

void RpcLoop::Help() {
  for (;;) {
    {
      const MutexLock lock(mutex_);
      asleep_++;
      while (!stopping_ && !busy_()) wake_.Wait(mutex_);
      asleep_--;
      if (stopping_) return;
    }
    for (bool idle = false; !idle && busy_();) {
      void* tag = nullptr;
      bool ok = false;
      const auto next = queue_->AsyncNext(&tag, &ok, std::chrono::system_clock::now() + kBreath);
      if (next == grpc::CompletionQueue::SHUTDOWN) return;
      idle = next == grpc::CompletionQueue::TIMEOUT;
      if (!idle) Handle(tag, ok);
    }
  }
}

void RpcLoop::Handle(void* event, bool ok) {
  const Rpc::Tag tag = *static_cast<Rpc::Tag*>(event);
  if (tag.event != Rpc::Event::kBegun) {
    tag.rpc->React(tag.event, ok);
    return;
  }
  if (!ok) {  // the server ends: no call will come
    delete tag.rpc;
    return;
  }
  living_++;
  AwaitCall();
  begin_(tag.rpc);
  tag.rpc->React(tag.event, true);
  if (asleep_.load(std::memory_order_relaxed) > 0 && busy_()) wake_.NotifyOne();
}

}  // namespace kvtide::service
