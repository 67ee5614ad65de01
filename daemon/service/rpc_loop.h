// Calls of any method as bytes, on completion queues with few threads of their own: gRPC's callback interface
// has at least two threads that hand the sockets to each other with every message, and one more for the end
// of each call, which costs more than a small call does.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "grpcpp/generic/async_generic_service.h"
#include "grpcpp/server.h"
#include "grpcpp/server_builder.h"
#include "grpcpp/support/byte_buffer.h"
#include "kernels/base/mutex.h"

namespace kvtide::service {

// One call, from its arrival until gRPC is done with it. Operations may be started from any thread; at most
// one read and one write at a time, and one finish.
class Rpc {
 public:
  // What happens to the call. None may block: the thread has the sockets of others to look after. OnCancel
  // may come at the same time as others, OnDone comes once and last.
  class Reactions {
   public:
    virtual void OnReadDone(bool ok) = 0;
    virtual void OnWriteDone(bool ok) = 0;
    virtual void OnCancel() = 0;
    virtual void OnDone() = 0;

   protected:
    ~Reactions() = default;
  };

  grpc::GenericServerContext* context() { return &context_; }
  // Once, before any operation; borrowed until OnDone.
  void Bind(Reactions* reactions);
  // `message` is there after OnReadDone(true).
  void Read(grpc::ByteBuffer* message);
  void SendInitialMetadata();
  // OnWriteDone comes when gRPC has sent it.
  void Write(const grpc::ByteBuffer& message);
  void WriteAndFinish(const grpc::ByteBuffer& message);
  void Finish(const grpc::Status& status);

 private:
  friend class RpcLoop;
  enum class Event { kBegun, kRead, kWritten, kOther, kDone };
  struct Tag {
    Rpc* rpc;
    Event event;
  };
  struct Answer {
    Rpc* rpc;
    grpc::ByteBuffer message;  // shares its bytes
    bool last;                 // the call ends with it
  };
  // Or puts it into the thread's outbox, if it has one.
  void Send(const grpc::ByteBuffer& message, bool last);
  explicit Rpc(std::atomic<int>* living);
  void React(Event event, bool ok);
  void Unref();

  static thread_local std::vector<Answer>* outbox_;
  std::atomic<int>* const living_;  // calls that have begun and are not done
  grpc::GenericServerContext context_;
  grpc::GenericServerAsyncReaderWriter stream_{&context_};
  Tag begun_{this, Event::kBegun}, read_{this, Event::kRead}, written_{this, Event::kWritten},
      other_{this, Event::kOther}, finished_{this, Event::kOther}, done_{this, Event::kDone};
  uint64_t connection_ = 0;  // a hash of its name, once the call has begun
  std::atomic<Reactions*> reactions_{nullptr};
  std::atomic<bool> cancelled_{false};
  // Events that are to come: the begin, the finish and the end of the call, and operations under way.
  std::atomic<int> refs_{3};
};

class RpcLoop {
 public:
  using Begin = std::function<void(Rpc* rpc)>;
  // Takes part in the server that is being built. `begin` is called for every call, and binds and starts it.
  RpcLoop(grpc::ServerBuilder* builder, Begin begin);
  // The server has ended by then, and still exists.
  ~RpcLoop();
  RpcLoop(const RpcLoop&) = delete;
  RpcLoop& operator=(const RpcLoop&) = delete;

  // After the server has started. One thread looks after the sockets always, the others while there are many
  // `connections`, which is asked by all of them, with every call: threads that take turns cost a single
  // client half of its time. While that thread is alone, connections with calls under way take turns: gRPC
  // looks at the sockets again when all that came before is handled, so that a flood of one would stand
  // before the next call of another.
  void Start(int threads, std::function<size_t()> connections);
  // After the server has ended: until every call is done. Those that were cancelled may still be on their way
  // out of their handlers, and end through the queue.
  void WaitForCalls() const;

 private:
  void Run();
  void Help();
  // There is work for several threads.
  bool Busy() const;
  // Events wait for the turn of their connection.
  bool TakesTurns() const;
  struct Event {
    void* tag;
    bool ok;
  };
  // The event and those that have come after it, requests last.
  void HandleTogether(Event event);
  void Handle(void* tag, bool ok);
  void AwaitCall();

  const Begin begin_;
  grpc::AsyncGenericService service_;
  const std::unique_ptr<grpc::ServerCompletionQueue> queue_;
  std::function<size_t()> connections_;
  Mutex mutex_;
  CondVar wake_;
  bool stopping_ ABSL_GUARDED_BY(mutex_) = false;
  std::atomic<int> asleep_{0};  // helpers
  std::atomic<int> living_{0};
  std::vector<std::thread> threads_;
};

}  // namespace kvtide::service
