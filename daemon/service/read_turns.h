// Whose turn it is to be read, among the requests of one connection. A stream that is not being read holds 64
// KiB at most, one that is read a whole message, and gRPC ends streams beyond its quota only one after the
// other: 240 messages of 7 MiB that come at once on a machine with 16 cores took 250 to 450 MiB more than the
// quota. So few requests of a connection are read at a time, the others in their order. Thread-safe.
#pragma once

#include <deque>

#include "absl/base/thread_annotations.h"
#include "kernels/base/mutex.h"

namespace kvtide::service {

class ReadTurns {
 public:
  static constexpr int kMost = 4;  // at a time

  class Reader {
   public:
    // Its turn has come; ends with Leave.
    virtual void Read() = 0;

   protected:
    ~Reader() = default;
  };

  // Calls reader.Read() here, or in another one's Leave: until then the reader must exist.
  void Enter(Reader& reader) {
    {
      const MutexLock lock(mutex_);
      if (reading_ == kMost) {
        waiting_.push_back(&reader);
        return;
      }
      reading_++;
    }
    reader.Read();
  }
  // Once for every Read, when the request has come or will not come.
  void Leave() {
    Reader* next = nullptr;
    {
      const MutexLock lock(mutex_);
      if (waiting_.empty()) {
        reading_--;
        return;
      }
      next = waiting_.front();
      waiting_.pop_front();
    }
    next->Read();
  }

 private:
  Mutex mutex_;
  int reading_ ABSL_GUARDED_BY(mutex_) = 0;
  std::deque<Reader*> waiting_ ABSL_GUARDED_BY(mutex_);
};

}  // namespace kvtide::service
