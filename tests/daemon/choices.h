// The numbers of a hostile client: bytes that a fuzzer chose, taken from the front; zeros behind the end.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

namespace kvtide::testing {

class Choices {
 public:
  explicit Choices(std::span<const uint8_t> bytes) : bytes_(bytes) {}
  bool empty() const { return bytes_.empty(); }
  template <class T>
  T Next() {
    T value{};
    const size_t count = std::min(sizeof(value), bytes_.size());
    std::memcpy(&value, bytes_.data(), count);
    bytes_ = bytes_.subspan(count);
    return value;
  }
  std::span<const uint8_t> Rest(size_t most) {
    const std::span<const uint8_t> some = bytes_.first(std::min(most, bytes_.size()));
    bytes_ = bytes_.subspan(some.size());
    return some;
  }

 private:
  std::span<const uint8_t> bytes_;
};

}  // namespace kvtide::testing
