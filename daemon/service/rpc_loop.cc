#include "daemon/service/rpc_loop.h"

#include <algorithm>
#include <chrono>
#include <deque>
#include <functional>
#include <string>
#include <utility>

#include "daemon/service/fair_queue.h"

namespace kvtide::service {
namespace {

// Calls that gRPC can give away before one of them has asked for the next.
constexpr int kAwaited = 16;
// From so many connections on there is work for several threads. One does 20,000 small calls a second and
// more than a gigabyte of large ones.
constexpr size_t kConnectionsForOneThread = 4;
// With fewer calls under way their events are handled as they come: to look at the sockets before each one
// costs a client that is alone a tenth of its time.
constexpr int kCallsThatTakeTurns = 3;
// Events that wait for their turn; with more the sockets are left alone.
constexpr size_t kMostEvents = 256;
// Where there are many connections: so many requests that have come are served in a row before their answers
// are sent, one for so many connections. What serves them and what moves their bytes take the processor's
// caches from each other, and a client that wakes finds several answers.
constexpr size_t kMostTogether = 8, kConnectionsForEach = 8;
// A helper that finds nothing to do for so long sleeps until it is called.
constexpr std::chrono::milliseconds kBreath{5};

}  // namespace

thread_local std::vector<Rpc::Answer>* Rpc::outbox_ = nullptr;

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
  Send(message, false);
}

void Rpc::WriteAndFinish(const grpc::ByteBuffer& message) { Send(message, true); }

void Rpc::Send(const grpc::ByteBuffer& message, bool last) {
  if (outbox_ != nullptr) {
    outbox_->push_back({this, message, last});
  } else if (last) {
    stream_.WriteAndFinish(message, grpc::WriteOptions(), grpc::Status::OK, &finished_);
  } else {
    stream_.Write(message, &written_);
  }
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

bool RpcLoop::Busy() const { return connections_() >= kConnectionsForOneThread; }

bool RpcLoop::TakesTurns() const {
  return living_.load(std::memory_order_relaxed) >= kCallsThatTakeTurns && connections_() > 1 && !Busy();
}

void RpcLoop::Start(int threads, std::function<size_t()> connections) {
  connections_ = std::move(connections);
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

void RpcLoop::HandleTogether(Event event) {
  const size_t most = std::min(connections_() / kConnectionsForEach, kMostTogether);
  if (most < 2) {
    Handle(event.tag, event.ok);
    return;
  }
  std::vector<Event> requests;
  // Events that are no requests are bounded too: those that wait have been taken already.
  size_t seen = 0;
  for (bool more = true; more;) {
    if (static_cast<Rpc::Tag*>(event.tag)->event == Rpc::Event::kRead) {
      requests.push_back(event);
    } else {
      Handle(event.tag, event.ok);
    }
    more = requests.size() < most && ++seen < 2 * kMostTogether &&
           queue_->AsyncNext(&event.tag, &event.ok, std::chrono::system_clock::time_point()) ==
               grpc::CompletionQueue::GOT_EVENT;
  }
  std::vector<Rpc::Answer> answers;
  Rpc::outbox_ = &answers;
  for (const Event& request : requests) Handle(request.tag, request.ok);
  Rpc::outbox_ = nullptr;
  for (const Rpc::Answer& answer : answers) answer.rpc->Send(answer.message, answer.last);
}

void RpcLoop::Run() {
  Turns<uint64_t, std::deque<Event>> turns;  // by connection
  size_t waiting = 0;
  const auto put = [&](void* tag, bool ok) {
    const Rpc::Tag& event = *static_cast<Rpc::Tag*>(tag);
    if (event.event == Rpc::Event::kBegun && ok)
      event.rpc->connection_ = std::hash<std::string>()(event.rpc->context_.peer());
    turns.Of(event.rpc->connection_).push_back({tag, ok});
    waiting++;
  };
  for (;;) {
    void* tag = nullptr;
    bool ok = false;
    if (waiting == 0) {
      if (!queue_->Next(&tag, &ok)) return;
      if (Busy()) {
        HandleTogether({tag, ok});
        continue;
      }
      if (!TakesTurns()) {
        Handle(tag, ok);
        continue;
      }
      put(tag, ok);
    }
    // What gRPC has, and what the sockets have.
    while (waiting < kMostEvents && TakesTurns() &&
           queue_->AsyncNext(&tag, &ok, std::chrono::system_clock::time_point()) ==
               grpc::CompletionQueue::GOT_EVENT)
      put(tag, ok);
    Event next{};
    turns.Next([&](std::deque<Event>& events) {
      next = events.front();
      events.pop_front();
      return !events.empty();
    });
    waiting--;
    Handle(next.tag, next.ok);
  }
}

void RpcLoop::Help() {
  for (;;) {
    {
      const MutexLock lock(mutex_);
      asleep_++;
      while (!stopping_ && !Busy()) wake_.Wait(mutex_);
      asleep_--;
      if (stopping_) return;
    }
    for (bool idle = false; !idle && Busy();) {
      void* tag = nullptr;
      bool ok = false;
      const auto next = queue_->AsyncNext(&tag, &ok, std::chrono::system_clock::now() + kBreath);
      if (next == grpc::CompletionQueue::SHUTDOWN) return;
      idle = next == grpc::CompletionQueue::TIMEOUT;
      if (!idle) HandleTogether({tag, ok});
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
  if (asleep_.load(std::memory_order_relaxed) > 0 && Busy()) wake_.NotifyOne();
}

}  // namespace kvtide::service
