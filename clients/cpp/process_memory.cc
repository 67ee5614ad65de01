#include <cstdint>
#include <new>

#include "absl/strings/str_cat.h"
#include "clients/cpp/carrier.h"

namespace kvtide::client {
namespace {

class ProcessMemory : public SharedMemory {
 public:
  std::optional<uint64_t> PlaceOf(const void* data, size_t) const override {
    return reinterpret_cast<uintptr_t>(data);
  }
  absl::StatusOr<std::byte*> Allocate(size_t bytes) override {
    auto* const data = static_cast<std::byte*>(::operator new(bytes, kAlignment, std::nothrow));
    if (data != nullptr) return data;
    return absl::ResourceExhaustedError(absl::StrCat("there is no memory for a tensor of ", bytes, " bytes"));
  }
  void Free(std::byte* data) override { ::operator delete(data, kAlignment); }

 private:
  static constexpr std::align_val_t kAlignment{64};
};

}  // namespace

std::unique_ptr<SharedMemory> MakeProcessMemory() { return std::make_unique<ProcessMemory>(); }

}  // namespace kvtide::client
