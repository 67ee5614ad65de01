#include "clients/cpp/tensor_mover.h"

#include "clients/cpp/convert.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "proto/data_type.h"

namespace kvtide::client {

size_t BytesOf(const TensorRef& tensor) {
  size_t bytes = DataTypeBytes(tensor.type);
  for (const int64_t dimension : tensor.shape) {
    if (dimension <= 0 || __builtin_mul_overflow(bytes, static_cast<size_t>(dimension), &bytes)) return 0;
  }
  return tensor.data == nullptr ? 0 : bytes;
}

TensorMover::~TensorMover() {
  if (room_ != nullptr) memory_->Free(room_);
}

void TensorMover::Count(const TensorRef& tensor) { Count(tensor.data, BytesOf(tensor)); }

void TensorMover::Count(const void* data, size_t bytes) {
  if (memory_ == nullptr || bytes == 0 || memory_->PlaceOf(data, bytes)) return;
  room_bytes_ += Padded(bytes);
}

absl::Status TensorMover::Begin() {
  if (room_bytes_ == 0) return absl::OkStatus();
  KVTIDE_ASSIGN_OR_RETURN(room_, memory_->Allocate(room_bytes_));
  return absl::OkStatus();
}

std::byte* TensorMover::Take(size_t bytes) {
  std::byte* const piece = room_ + taken_;
  taken_ += Padded(bytes);
  KVTIDE_CHECK(taken_ <= room_bytes_, "a tensor was not counted");
  return piece;
}

void TensorMover::Add(const TensorRef& tensor, v1::Tensor* proto) {
  if (memory_ == nullptr) return ToProto(tensor, proto);
  proto->set_dtype(DataTypeToProto(tensor.type));
  for (const int64_t dimension : tensor.shape) proto->add_shape(dimension);
  const size_t bytes = BytesOf(tensor);
  if (bytes == 0) return;
  AddSource(tensor.data, bytes, proto->mutable_place());
}

void TensorMover::AddSource(const void* data, size_t bytes, v1::Place* place) {
  place->set_bytes(bytes);
  if (bytes == 0) return;
  std::optional<uint64_t> offset = memory_->PlaceOf(data, bytes);
  if (!offset) {
    std::byte* const piece = Take(bytes);
    std::memcpy(piece, data, bytes);
    offset = memory_->PlaceOf(piece, bytes);
  }
  place->set_offset(*offset);
}

void TensorMover::AddResult(void* data, size_t bytes, v1::Place* place) {
  place->set_bytes(bytes);
  if (bytes == 0) return;
  std::optional<uint64_t> offset = memory_->PlaceOf(data, bytes);
  if (!offset) {
    std::byte* const piece = Take(bytes);
    results_.push_back({data, piece, bytes});
    offset = memory_->PlaceOf(piece, bytes);
  }
  place->set_offset(*offset);
}

void TensorMover::TakeResults() const {
  for (const Result& result : results_) std::memcpy(result.to, result.from, result.bytes);
}

}  // namespace kvtide::client
