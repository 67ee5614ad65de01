#include "kernels/cuda/device/rotations.h"

#include <utility>
#include <vector>

#include "kernels/base/status.h"
#include "kernels/cuda/device/copy_to_device.h"
#include "kernels/format/page_codec.h"
#include "kernels/format/turbo.h"

namespace kvtide::cuda {

absl::StatusOr<Rotation> Rotations::Get(CacheType type, int stored_dim, bool inverse) {
  if (Info(type).calibrated) return Rotation{};  // their keys are rebuilt as they were
  const RotationKind kind = VisitCodec(type, [](auto codec) {
    using C = decltype(codec);
    if constexpr (C::kStorage == Storage::kCodes) {
      if (std::is_same_v<typename C::Rotation, Hadamard>) return RotationKind::kHadamard;
      if (!std::is_same_v<typename C::Rotation, NoRotation>) return RotationKind::kMatrix;
    }
    return RotationKind::kNone;
  });
  if (kind != RotationKind::kMatrix) return Rotation{kind, 0, nullptr};
  const MutexLock lock(mutex_);
  DeviceBuffer& kept = matrices_[{static_cast<int>(type), stored_dim, inverse}];
  if (kept.data() == nullptr) {
    const int runs = (stored_dim + 127) / 128;
    std::vector<float> matrix(static_cast<size_t>(runs) * 128 * 128), column(static_cast<size_t>(stored_dim));
    for (int j = 0; j < stored_dim; j++) {
      std::fill(column.begin(), column.end(), 0.0f);
      column[static_cast<size_t>(j)] = 1;
      if (inverse) {
        RotateInverse(type, column.data(), stored_dim);
      } else {
        RotateForward(type, column.data(), stored_dim);
      }
      const int run = j / 128;
      for (int i = 128 * run; i < std::min(stored_dim, 128 * (run + 1)); i++)
        matrix[static_cast<size_t>((run * 128 + j % 128) * 128 + i % 128)] = column[static_cast<size_t>(i)];
    }
    DeviceBuffer buffer;  // kept when it holds the matrix
    KVTIDE_RETURN_IF_ERROR(buffer.Reserve(matrix.size() * sizeof(float)));
    KVTIDE_RETURN_IF_ERROR(CopyToDevice(buffer.data(), matrix.data(), matrix.size() * sizeof(float)));
    kept = std::move(buffer);
  }
  return Rotation{kind, 0, reinterpret_cast<const float*>(kept.data())};
}

}  // namespace kvtide::cuda
