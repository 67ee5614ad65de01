// kvtide.formats: the cache types as functions over rows, by the code that seals the daemon's blocks.
#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cstddef>
#include <optional>
#include <vector>

#include "clients/python/arrays.h"
#include "clients/python/bindings.h"
#include "clients/python/raise.h"
#include "daemon/cache/call/tensor_check.h"
#include "kernels/format/block_layout.h"
#include "kernels/format/page_codec.h"

namespace nb = nanobind;

namespace kvtide::python {
namespace {

using Bytes = nb::ndarray<uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstBytes = nb::ndarray<const uint8_t, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Rows = nb::ndarray<float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using ConstRows = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;

Side ParseSide(const std::string& side) {
  if (side == "k") return Side::kKey;
  if (side == "v") return Side::kValue;
  throw StatusException(absl::InvalidArgumentError("side is \"" + side + "\"; use \"k\" or \"v\""));
}

// A page of one side: its type, its layout and what the profile says about the head.
struct Half {
  CacheType type;
  Side side;
  HalfLayout layout;
  HeadProfile profile;
  bool profiled;

  Half(const std::string& name, const std::string& side_name, int head_dim, const std::vector<float>& mean,
       const std::vector<float>& gain)
      : type(Raise(ParseCacheType(name))), side(ParseSide(side_name)) {
    Raise(CheckGroupShape({1, 1, head_dim, head_dim}));
    if (Info(type).calibrated)
      throw StatusException(absl::InvalidArgumentError(absl::StrCat(
          name, " needs the transform of a profile, which this function does not take; use another type")));
    layout = MakeHalfLayout(type, head_dim);
    for (const std::vector<float>* values : {&mean, &gain}) {
      if (!values->empty() && values->size() != static_cast<size_t>(head_dim))
        throw StatusException(absl::InvalidArgumentError(
            absl::StrCat("mean and gain have head_dim (", head_dim, ") values, not ", values->size())));
    }
    for (const float g : gain)
      if (!(g > 0) || g > kMaxF16) throw StatusException(absl::InvalidArgumentError("gain is not positive"));
    if (side == Side::kValue && (!mean.empty() || !gain.empty()))
      throw StatusException(
          absl::InvalidArgumentError("V is coded as it is: mean and gain belong to side \"k\""));
    profile.mean = mean;
    profile.gain = gain;
    profiled = !mean.empty() || !gain.empty();
  }
  const HeadProfile* Profile() const { return profiled ? &profile : nullptr; }
};

std::vector<float> Vector(const std::optional<ConstFloats>& array) {
  return array ? std::vector<float>(array->data(), array->data() + array->size()) : std::vector<float>();
}

void CheckPages(const Half& half, size_t pages, size_t page_bytes, size_t tokens) {
  if (page_bytes == half.layout.bytes && pages == (tokens + kBlockTokens - 1) / kBlockTokens) return;
  throw StatusException(absl::InvalidArgumentError(
      absl::StrCat("pages have the shape [", pages, ", ", page_bytes, "], ", tokens, " tokens of ",
                   Name(half.type), " at head dim ", half.layout.head_dim, " take [",
                   (tokens + kBlockTokens - 1) / kBlockTokens, ", ", half.layout.bytes, "]")));
}

void Encode(const std::string& type, const std::string& side, const ConstRows& rows, const Bytes& pages,
            const std::optional<ConstFloats>& mean, const std::optional<ConstFloats>& gain) {
  const auto tokens = rows.shape(0), dim = rows.shape(1);
  const Half half(type, side, static_cast<int>(dim), Vector(mean), Vector(gain));
  CheckPages(half, pages.shape(0), pages.shape(1), tokens);
  const nb::gil_scoped_release release;
  Raise(CheckValues({rows.data(), DataType::kF32}, static_cast<int64_t>(tokens), 1, static_cast<int>(dim),
                    "row", 0, 0));
  for (size_t page = 0, done = 0; done < tokens; page++, done += kBlockTokens) {
    EncodeHalf(half.type, half.side, half.layout, half.Profile(), rows.data() + done * dim,
               static_cast<int>(std::min<size_t>(kBlockTokens, tokens - done)),
               reinterpret_cast<std::byte*>(pages.data() + page * half.layout.bytes));
  }
}

void Decode(const std::string& type, const std::string& side, const ConstBytes& pages, const Rows& rows,
            const std::optional<ConstFloats>& mean, const std::optional<ConstFloats>& gain) {
  const auto tokens = rows.shape(0), dim = rows.shape(1);
  const Half half(type, side, static_cast<int>(dim), Vector(mean), Vector(gain));
  CheckPages(half, pages.shape(0), pages.shape(1), tokens);
  const nb::gil_scoped_release release;
  std::vector<float> page_rows(kBlockTokens * dim);
  // Codes are read with aligned words.
  std::vector<std::byte> page_bytes(half.layout.bytes);
  for (size_t page = 0, done = 0; done < tokens; page++, done += kBlockTokens) {
    const auto* from = reinterpret_cast<const std::byte*>(pages.data() + page * half.layout.bytes);
    std::copy(from, from + half.layout.bytes, page_bytes.begin());
    DecodeHalf(half.type, half.side, half.layout, half.Profile(), page_bytes.data(), page_rows.data());
    std::copy_n(page_rows.begin(), std::min<size_t>(kBlockTokens, tokens - done) * dim,
                rows.data() + done * dim);
  }
}

nb::dict Describe(CacheType type) {
  const CacheTypeInfo& info = Info(type);
  nb::dict out;
  out["name"] = info.name;
  out["bits"] = info.bits;
  out["group"] = info.group;
  out["version"] = info.version;
  out["rotated"] = info.rotated;
  out["alias_of"] = info.alias_of == nullptr ? nb::none() : nb::object(nb::str(info.alias_of));
  return out;
}

}  // namespace

void BindFormats(nb::module_& m) {
  m.attr("BLOCK_TOKENS") = static_cast<int>(kBlockTokens);
  m.def("cache_types", [] {
    nb::list out;
    for (const CacheType type : AllCacheTypes()) out.append(Describe(type));
    return out;
  });
  // Of any type, calibrated ones too.
  m.def("codec_version", [](const std::string& type) { return Info(Raise(ParseCacheType(type))).version; });
  m.def("page_bytes",
        [](const std::string& type, int head_dim) { return Half(type, "k", head_dim, {}, {}).layout.bytes; });
  m.def("block_bytes", [](const std::string& pair, int layers, int kv_heads, int head_dim_k, int head_dim_v) {
    const GroupShape shape{layers, kv_heads, head_dim_k, head_dim_v};
    Raise(CheckGroupShape(shape));
    return BlockLayout(shape, Raise(ParseCachePair(pair))).block_bytes();
  });
  m.def("encode", &Encode, nb::arg("type"), nb::arg("side"), nb::arg("rows"), nb::arg("pages"),
        nb::arg("mean").none(), nb::arg("gain").none());
  m.def("decode", &Decode, nb::arg("type"), nb::arg("side"), nb::arg("pages"), nb::arg("rows"),
        nb::arg("mean").none(), nb::arg("gain").none());
}

}  // namespace kvtide::python
