// Writes GGUF headers for tests: metadata in the order it is added, tensors without data.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

namespace kvtide::planner {

class GgufBuilder {
 public:
  explicit GgufBuilder(uint32_t version = 3) : version_(version) {}

  GgufBuilder& U32(const std::string& key, uint32_t value) { return Entry(key, 4).Put(value); }
  GgufBuilder& U64(const std::string& key, uint64_t value) { return Entry(key, 10).Put(value); }
  GgufBuilder& F32(const std::string& key, float value) { return Entry(key, 6).Put(value); }
  GgufBuilder& Bool(const std::string& key, bool value) {
    return Entry(key, 7).Put(static_cast<uint8_t>(value));
  }
  GgufBuilder& String(const std::string& key, const std::string& value) {
    return Entry(key, 8).PutString(value);
  }
  GgufBuilder& U32s(const std::string& key, const std::vector<uint32_t>& values) {
    Entry(key, 9).Put(uint32_t{4}).Put(static_cast<uint64_t>(values.size()));
    for (uint32_t value : values) Put(value);
    return *this;
  }
  GgufBuilder& Bools(const std::string& key, const std::vector<bool>& values) {
    Entry(key, 9).Put(uint32_t{7}).Put(static_cast<uint64_t>(values.size()));
    for (bool value : values) Put(static_cast<uint8_t>(value));
    return *this;
  }
  GgufBuilder& Strings(const std::string& key, const std::vector<std::string>& values) {
    Entry(key, 9).Put(uint32_t{8}).Put(static_cast<uint64_t>(values.size()));
    for (const std::string& value : values) PutString(value);
    return *this;
  }
  GgufBuilder& Tensor(const std::string& name, const std::vector<uint64_t>& dims, uint32_t type) {
    std::string body;
    std::swap(body, bytes_);
    PutString(name).Put(static_cast<uint32_t>(dims.size()));
    for (uint64_t dim : dims) Put(dim);
    Put(type).Put(uint64_t{0});
    tensors_ += bytes_;
    bytes_ = body;
    ++n_tensors_;
    return *this;
  }
  // An entry as raw bytes, for damaged files.
  GgufBuilder& Raw(const std::string& bytes) {
    bytes_ += bytes;
    ++n_entries_;
    return *this;
  }

  std::string Build() const { return Build(n_tensors_, n_entries_); }
  std::string Build(uint64_t tensors, uint64_t entries) const {
    std::string file = "GGUF";
    Append(&file, version_);
    Append(&file, tensors);
    Append(&file, entries);
    return file + bytes_ + tensors_;
  }

  template <class T>
  static void Append(std::string* text, T value) {
    char raw[sizeof(T)];
    std::memcpy(raw, &value, sizeof(T));
    text->append(raw, sizeof(T));
  }

 private:
  GgufBuilder& Entry(const std::string& key, uint32_t type) {
    ++n_entries_;
    return PutString(key).Put(type);
  }
  GgufBuilder& PutString(const std::string& text) {
    Put(static_cast<uint64_t>(text.size()));
    bytes_ += text;
    return *this;
  }
  template <class T>
  GgufBuilder& Put(T value) {
    Append(&bytes_, value);
    return *this;
  }

  uint32_t version_;
  std::string bytes_, tensors_;
  uint64_t n_entries_ = 0, n_tensors_ = 0;
};

// A plain model: 4 layers, 8 query and 2 KV heads of 64.
inline GgufBuilder PlainGguf(const std::string& arch = "llama") {
  GgufBuilder builder;
  builder.String("general.architecture", arch)
      .U32(arch + ".block_count", 4)
      .U32(arch + ".context_length", 32768)
      .U32(arch + ".embedding_length", 512)
      .U32(arch + ".attention.head_count", 8)
      .U32(arch + ".attention.head_count_kv", 2);
  return builder;
}

}  // namespace kvtide::planner
