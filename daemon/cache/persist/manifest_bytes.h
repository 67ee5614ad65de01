// Numbers, texts and lists as the bytes of a manifest: little-endian, one after the other.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

namespace kvtide {

class ManifestWriter {
 public:
  template <class T>
  void Put(const T& value) {
    static_assert(std::is_arithmetic_v<T>);
    text_.append(reinterpret_cast<const char*>(&value), sizeof value);
  }
  void PutText(const std::string& text) {
    Put(uint64_t{text.size()});
    text_ += text;
  }
  template <class T>
  void PutList(const std::vector<T>& values) {
    Put(uint64_t{values.size()});
    for (const T& value : values) Put(value);
  }
  std::string Take() { return std::move(text_); }

 private:
  std::string text_;
};

// Reads what ManifestWriter has written; zeros and `failed` beyond the end.
class ManifestReader {
 public:
  explicit ManifestReader(const std::string& text) : text_(text) {}
  template <class T>
  T Get() {
    static_assert(std::is_arithmetic_v<T>);
    T value{};
    if (text_.size() - at_ < sizeof value) {
      failed_ = true;
      at_ = text_.size();
      return value;
    }
    std::memcpy(&value, text_.data() + at_, sizeof value);
    at_ += sizeof value;
    return value;
  }
  template <class T>
  void Get(T* value) {
    *value = Get<T>();
  }
  // Of things that have `each` bytes at least.
  size_t GetCount(size_t each) {
    const auto count = Get<uint64_t>();
    if (count <= (text_.size() - at_) / each) return count;
    failed_ = true;
    return 0;
  }
  std::string GetText() {
    const size_t size = GetCount(1);
    const std::string text = text_.substr(at_, size);
    at_ += size;
    return text;
  }
  template <class T>
  std::vector<T> GetList() {
    std::vector<T> values(GetCount(sizeof(T)));
    for (T& value : values) value = Get<T>();
    return values;
  }
  bool failed() const { return failed_; }
  bool at_end() const { return at_ == text_.size(); }

 private:
  const std::string& text_;
  size_t at_ = 0;
  bool failed_ = false;
};

}  // namespace kvtide
