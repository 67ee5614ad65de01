#include "planner/model/gguf.h"

#include <algorithm>
#include <cstring>
#include <filesystem>
#include <fstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "kernels/base/sizes.h"
#include "kernels/base/status.h"

namespace kvtide::planner {
namespace {

constexpr uint64_t kMaxMetadata = 1 << 16;
constexpr uint64_t kMaxTensors = 1 << 20;
constexpr uint64_t kMaxKeyBytes = 1 << 16;
constexpr uint64_t kMaxStringBytes = uint64_t{1} << 26;  // chat templates are long, vocabularies are arrays
constexpr uint64_t kMaxArray = uint64_t{1} << 28;
constexpr uint64_t kMaxKeptIntegers = 1 << 16;
constexpr int64_t kMaxElements = int64_t{1} << 48;
constexpr size_t kMaxHeaderBytes = size_t{1} << 30;
constexpr int64_t kMaxParts = 9999;
constexpr int64_t kMaxAlignment = 1 << 20;

enum ValueType : uint32_t {
  kU8,
  kI8,
  kU16,
  kI16,
  kU32,
  kI32,
  kF32,
  kBool,
  kString,
  kArray,
  kU64,
  kI64,
  kF64,
  kTypes
};

int SizeOf(uint32_t type) {
  static const int sizes[kTypes] = {1, 1, 2, 2, 4, 4, 4, 1, 0, 0, 8, 8, 8};
  return type < kTypes ? sizes[type] : 0;
}

struct TensorType {
  int group;
  int bytes;
};

// ggml's numbers of tensor types; {0, 0} where a number was retired.
TensorType FindTensorType(uint32_t type) {
  static const TensorType types[] = {
      {1, 4},    {1, 2},    {32, 18},  {32, 20},   {0, 0},     {0, 0},     {32, 22},   {32, 24},
      {32, 34},  {32, 36},  {256, 84}, {256, 110}, {256, 144}, {256, 176}, {256, 210}, {256, 292},
      {256, 66}, {256, 74}, {256, 98}, {256, 50},  {32, 18},   {256, 110}, {256, 82},  {256, 136},
      {1, 1},    {1, 2},    {1, 4},    {1, 8},     {1, 8},     {256, 56},  {1, 2},     {0, 0},
      {0, 0},    {0, 0},    {256, 54}, {256, 66},  {0, 0},     {0, 0},     {0, 0},     {32, 17}};
  return type < std::size(types) ? types[type] : TensorType{0, 0};
}

class Reader {
 public:
  explicit Reader(std::string_view bytes) : bytes_(bytes) {}

  template <class T>
  absl::StatusOr<T> Scalar(const char* what) {
    T value;
    if (bytes_.size() - at_ < sizeof(T)) return Truncated(what);
    std::memcpy(&value, bytes_.data() + at_, sizeof(T));
    at_ += sizeof(T);
    return value;
  }

  absl::StatusOr<std::string> String(const char* what, uint64_t limit) {
    KVTIDE_ASSIGN_OR_RETURN(const uint64_t length, Scalar<uint64_t>(what));
    if (length > limit) {
      return absl::InvalidArgumentError(
          absl::StrCat(what, " of ", length, " bytes at byte ", at_, ", at most ", limit, " are allowed"));
    }
    if (bytes_.size() - at_ < length) return Truncated(what);
    std::string text(bytes_.substr(at_, length));
    at_ += length;
    return text;
  }

  absl::Status Skip(uint64_t count, const char* what) {
    if (bytes_.size() - at_ < count) return Truncated(what);
    at_ += count;
    return absl::OkStatus();
  }

  size_t at() const { return at_; }

 private:
  absl::Status Truncated(const char* what) const {
    return absl::OutOfRangeError(
        absl::StrCat("the file ends at byte ", bytes_.size(), " inside ", what, " (truncated?)"));
  }

  std::string_view bytes_;
  size_t at_ = 0;
};

absl::StatusOr<int64_t> ReadInteger(Reader& reader, uint32_t type) {
  switch (type) {
    case kU8:
    case kBool:
      return reader.Scalar<uint8_t>("a value");
    case kI8:
      return reader.Scalar<int8_t>("a value");
    case kU16:
      return reader.Scalar<uint16_t>("a value");
    case kI16:
      return reader.Scalar<int16_t>("a value");
    case kU32:
      return reader.Scalar<uint32_t>("a value");
    case kI32:
      return reader.Scalar<int32_t>("a value");
    case kI64:
      return reader.Scalar<int64_t>("a value");
    default:
      break;
  }
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t value, reader.Scalar<uint64_t>("a value"));
  if (value > static_cast<uint64_t>(INT64_MAX))
    return absl::InvalidArgumentError("a number does not fit 63 bits");
  return static_cast<int64_t>(value);
}

absl::StatusOr<GgufArray> ReadArray(Reader& reader, GgufKeep keep) {
  const bool all = keep == GgufKeep::kVocabulary;
  KVTIDE_ASSIGN_OR_RETURN(const uint32_t type, reader.Scalar<uint32_t>("an array type"));
  GgufArray array;
  KVTIDE_ASSIGN_OR_RETURN(array.count, reader.Scalar<uint64_t>("an array length"));
  if (type >= kTypes || type == kArray) {
    return absl::InvalidArgumentError(absl::StrCat("arrays of value type ", type, " are not supported"));
  }
  if (array.count > kMaxArray) {
    return absl::InvalidArgumentError(
        absl::StrCat("an array of ", array.count, " entries, at most ", kMaxArray, " are allowed"));
  }
  if (type == kString) {
    for (uint64_t i = 0; i < array.count; ++i) {
      if (all) {
        KVTIDE_ASSIGN_OR_RETURN(std::string text, reader.String("a string of an array", kMaxStringBytes));
        array.strings.push_back(std::move(text));
        continue;
      }
      KVTIDE_ASSIGN_OR_RETURN(const uint64_t length, reader.Scalar<uint64_t>("a string of an array"));
      KVTIDE_RETURN_IF_ERROR(reader.Skip(length, "a string of an array"));
    }
  } else if (all && type == kF32) {
    for (uint64_t i = 0; i < array.count; ++i) {
      KVTIDE_ASSIGN_OR_RETURN(const float value, reader.Scalar<float>("a number of an array"));
      array.floats.push_back(value);
    }
  } else if (type == kF32 || type == kF64 || (array.count > kMaxKeptIntegers && !all)) {
    KVTIDE_RETURN_IF_ERROR(reader.Skip(array.count * static_cast<uint64_t>(SizeOf(type)), "an array"));
  } else {
    for (uint64_t i = 0; i < array.count; ++i) {
      KVTIDE_ASSIGN_OR_RETURN(const int64_t value, ReadInteger(reader, type));
      array.integers.push_back(value);
    }
  }
  return array;
}

absl::StatusOr<GgufValue> ReadValue(Reader& reader, GgufKeep keep) {
  KVTIDE_ASSIGN_OR_RETURN(const uint32_t type, reader.Scalar<uint32_t>("a value type"));
  switch (type) {
    case kF32: {
      KVTIDE_ASSIGN_OR_RETURN(const float value, reader.Scalar<float>("a value"));
      return GgufValue(static_cast<double>(value));
    }
    case kF64: {
      KVTIDE_ASSIGN_OR_RETURN(const double value, reader.Scalar<double>("a value"));
      return GgufValue(value);
    }
    case kBool: {
      KVTIDE_ASSIGN_OR_RETURN(const uint8_t value, reader.Scalar<uint8_t>("a value"));
      return GgufValue(value != 0);
    }
    case kString: {
      KVTIDE_ASSIGN_OR_RETURN(std::string value, reader.String("a string", kMaxStringBytes));
      return GgufValue(std::move(value));
    }
    case kArray: {
      KVTIDE_ASSIGN_OR_RETURN(GgufArray value, ReadArray(reader, keep));
      return GgufValue(std::move(value));
    }
    default:
      break;
  }
  if (type >= kTypes) return absl::InvalidArgumentError(absl::StrCat("unknown value type ", type));
  KVTIDE_ASSIGN_OR_RETURN(const int64_t value, ReadInteger(reader, type));
  return GgufValue(value);
}

absl::StatusOr<GgufTensor> ReadTensor(Reader& reader) {
  GgufTensor tensor;
  KVTIDE_ASSIGN_OR_RETURN(tensor.name, reader.String("a tensor name", kMaxKeyBytes));
  KVTIDE_ASSIGN_OR_RETURN(const uint32_t dims, reader.Scalar<uint32_t>("a tensor"));
  const std::string name = tensor.name.substr(0, 128);
  if (dims > 4)
    return absl::InvalidArgumentError(
        absl::StrCat("tensor '", name, "' has ", dims, " dimensions, at most 4 are allowed"));
  tensor.elements = 1;
  uint64_t row = 1;
  for (uint32_t i = 0; i < dims; ++i) {
    KVTIDE_ASSIGN_OR_RETURN(const uint64_t size, reader.Scalar<uint64_t>("a tensor"));
    if (i == 0) row = size;
    tensor.shape.insert(tensor.shape.begin(), static_cast<int64_t>(std::min(size, uint64_t{1} << 62)));
    if (size > static_cast<uint64_t>(kMaxElements) ||
        (size > 0 && tensor.elements > kMaxElements / static_cast<int64_t>(size))) {
      return absl::InvalidArgumentError(absl::StrCat("tensor '", name, "' is absurdly large"));
    }
    tensor.elements *= static_cast<int64_t>(size);
  }
  KVTIDE_ASSIGN_OR_RETURN(const uint32_t type, reader.Scalar<uint32_t>("a tensor"));
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t offset, reader.Scalar<uint64_t>("a tensor"));
  if (offset > static_cast<uint64_t>(kMaxElements) * 8)
    return absl::InvalidArgumentError(absl::StrCat("tensor '", name, "' lies at byte ", offset));
  tensor.type = type;
  tensor.offset = static_cast<int64_t>(offset);
  const TensorType format = FindTensorType(type);
  if (format.group == 0)
    return absl::InvalidArgumentError(absl::StrCat("tensor '", name, "' has unknown type ", type));
  if (row % static_cast<uint64_t>(format.group) != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("tensor '", name, "': rows of ", row, " values are not a multiple of ", format.group));
  }
  tensor.bytes = tensor.elements / format.group * format.bytes;
  return tensor;
}

// Path of part `number` of a split whose first part is `path`.
std::string PartPath(const std::string& path, int64_t number, int64_t parts) {
  const std::string suffix = absl::StrFormat("-%05d-of-%05d.gguf", 1, parts);
  if (path.size() < suffix.size() || path.compare(path.size() - suffix.size(), suffix.size(), suffix) != 0)
    return "";
  return path.substr(0, path.size() - suffix.size()) + absl::StrFormat("-%05d-of-%05d.gguf", number, parts);
}

absl::StatusOr<GgufFile> ReadOne(const std::string& path, GgufKeep keep) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return absl::NotFoundError(absl::StrCat(path, ": cannot be opened"));
  std::string header;
  for (size_t want = size_t{1} << 20;; want = std::min(want * 4, kMaxHeaderBytes)) {
    const size_t have = header.size();
    header.resize(want);
    file.read(header.data() + have, static_cast<std::streamsize>(want - have));
    const bool end = static_cast<size_t>(file.gcount()) < want - have;
    header.resize(have + static_cast<size_t>(file.gcount()));
    absl::StatusOr<GgufFile> parsed = ParseGguf(header, keep);
    if (!parsed.ok() && absl::IsOutOfRange(parsed.status()) && !end && want < kMaxHeaderBytes) continue;
    if (!parsed.ok()) return absl::InvalidArgumentError(absl::StrCat(path, ": ", parsed.status().message()));
    parsed->paths = {path};
    return parsed;
  }
}

}  // namespace

absl::StatusOr<int64_t> GgufFile::Integer(const std::string& key, int64_t fallback) const {
  auto it = metadata.find(key);
  if (it == metadata.end()) return fallback;
  if (const int64_t* value = std::get_if<int64_t>(&it->second)) return *value;
  if (const bool* value = std::get_if<bool>(&it->second)) return *value ? 1 : 0;
  return absl::InvalidArgumentError(absl::StrCat("'", key, "' is not a whole number"));
}

absl::StatusOr<std::vector<int64_t>> GgufFile::Integers(const std::string& key, size_t count) const {
  auto it = metadata.find(key);
  if (it == metadata.end()) return std::vector<int64_t>();
  if (const int64_t* value = std::get_if<int64_t>(&it->second)) return std::vector<int64_t>(count, *value);
  if (const GgufArray* array = std::get_if<GgufArray>(&it->second)) {
    if (array->integers.size() < count) {
      return absl::InvalidArgumentError(
          absl::StrCat("'", key, "' has ", array->integers.size(), " entries, ", count, " are needed"));
    }
    return std::vector<int64_t>(array->integers.begin(),
                                array->integers.begin() + static_cast<std::ptrdiff_t>(count));
  }
  return absl::InvalidArgumentError(absl::StrCat("'", key, "' is neither a whole number nor a list of them"));
}

absl::StatusOr<GgufFile> ParseGguf(std::string_view header, GgufKeep keep) {
  if (header.size() >= 4 && header.substr(0, 4) != "GGUF") {
    return absl::InvalidArgumentError("not a GGUF file: it does not begin with 'GGUF'");
  }
  Reader reader(header);
  GgufFile file;
  KVTIDE_RETURN_IF_ERROR(reader.Skip(4, "the magic"));
  KVTIDE_ASSIGN_OR_RETURN(file.version, reader.Scalar<uint32_t>("the version"));
  if (file.version != 2 && file.version != 3) {
    return absl::InvalidArgumentError(absl::StrCat("GGUF version ", file.version,
                                                   " is not supported (2 and 3 are",
                                                   file.version > 0xffff ? "; a big-endian file?)" : ")"));
  }
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t tensors, reader.Scalar<uint64_t>("the tensor count"));
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t entries, reader.Scalar<uint64_t>("the metadata count"));
  if (tensors > kMaxTensors || entries > kMaxMetadata) {
    return absl::InvalidArgumentError(
        absl::StrCat("absurd counts: ", tensors, " tensors, ", entries, " metadata entries"));
  }
  for (uint64_t i = 0; i < entries; ++i) {
    KVTIDE_ASSIGN_OR_RETURN(std::string key, reader.String("a metadata key", kMaxKeyBytes));
    absl::StatusOr<GgufValue> value = ReadValue(reader, keep);
    if (!value.ok()) return Annotate(value.status(), absl::StrCat("metadata '", key.substr(0, 128), "'"));
    file.metadata[std::move(key)] = *std::move(value);
  }
  for (uint64_t i = 0; i < tensors; ++i) {
    KVTIDE_ASSIGN_OR_RETURN(GgufTensor tensor, ReadTensor(reader));
    if (file.tensor_bytes > INT64_MAX - tensor.bytes)
      return absl::InvalidArgumentError("the sum of all tensors overflows");
    file.tensor_bytes += tensor.bytes;
    file.tensors.push_back(std::move(tensor));
  }
  KVTIDE_ASSIGN_OR_RETURN(const int64_t alignment, file.Integer("general.alignment", 32));
  if (alignment < 1 || alignment > kMaxAlignment)
    return absl::InvalidArgumentError(
        absl::StrCat("general.alignment is ", alignment, ", must be 1 to ", kMaxAlignment));
  file.data_begin = {RoundUp(static_cast<int64_t>(reader.at()), alignment)};
  return file;
}

absl::StatusOr<GgufFile> ReadGguf(const std::string& path, GgufKeep keep) {
  KVTIDE_ASSIGN_OR_RETURN(GgufFile file, ReadOne(path, keep));
  KVTIDE_ASSIGN_OR_RETURN(const int64_t parts, file.Integer("split.count", 1));
  KVTIDE_ASSIGN_OR_RETURN(const int64_t number, file.Integer("split.no", 0));
  if (parts <= 1) return file;
  if (parts > kMaxParts || number != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": part ", number + 1, " of ", parts, "; name the first part"));
  }
  for (int64_t part = 2; part <= parts; ++part) {
    const std::string next = PartPath(path, part, parts);
    if (next.empty()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": split.count is ", parts,
                                                     " but the name does not end in ",
                                                     absl::StrFormat("-00001-of-%05d.gguf", parts)));
    }
    KVTIDE_ASSIGN_OR_RETURN(GgufFile more, ReadOne(next, GgufKeep::kShape));
    for (GgufTensor& tensor : more.tensors) {
      tensor.part = static_cast<int>(part) - 1;
      file.tensors.push_back(std::move(tensor));
    }
    file.paths.push_back(next);
    file.data_begin.push_back(more.data_begin.front());
    file.tensor_bytes += more.tensor_bytes;
  }
  return file;
}

}  // namespace kvtide::planner
