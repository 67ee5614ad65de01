// The tensors of one call on their way: where both ends see the caller's memory they stay there; where there
// is an arena they are copied into it once, and results out of it; else they travel in the messages.
#pragma once

#include <cstring>
#include <span>
#include <vector>

#include "clients/cpp/carrier.h"
#include "clients/cpp/client.h"
#include "kvtide/v1/tensor.pb.h"

namespace kvtide::client {

// 0 for shapes that make no sense, which the handler will say, and for no data.
size_t BytesOf(const TensorRef& tensor);

class TensorMover {
 public:
  // Borrows the memory; null: everything travels in messages.
  explicit TensorMover(SharedMemory* memory) : memory_(memory) {}
  ~TensorMover();
  TensorMover(const TensorMover&) = delete;
  TensorMover& operator=(const TensorMover&) = delete;

  // First every tensor and result of the call is counted, then Begin takes the room for those that have to be
  // copied, then they are added in the same order.
  void Count(const TensorRef& tensor);
  void Count(const void* data, size_t bytes);
  absl::Status Begin();

  void Add(const TensorRef& tensor, v1::Tensor* proto);
  bool has_memory() const { return memory_ != nullptr; }
  // Bytes to be read; only with memory.
  void AddSource(const void* data, size_t bytes, v1::Place* place);
  // Where a result is to be written; only with memory.
  void AddResult(void* data, size_t bytes, v1::Place* place);
  // Copies what was written in the arena to where the caller wants it.
  void TakeResults() const;

 private:
  struct Result {
    void* to = nullptr;
    const std::byte* from = nullptr;
    size_t bytes = 0;
  };
  static size_t Padded(size_t bytes) { return (bytes + 63) / 64 * 64; }
  // A piece of the room.
  std::byte* Take(size_t bytes);

  SharedMemory* const memory_;
  size_t room_bytes_ = 0, taken_ = 0;
  std::byte* room_ = nullptr;
  std::vector<Result> results_;
};

}  // namespace kvtide::client
