#include "daemon/cache/call/name_space.h"

#include <xxhash.h>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/sequence_options.h"
#include "daemon/cache/call/spec_hash.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr size_t kMostText = 256;
constexpr int kMostBlockTokens = 4096, kMostRows = 1 << 16;
constexpr uint64_t kMostBlockBytes = uint64_t{1} << 30;

}  // namespace

absl::Status CheckNamespaceSpec(const NamespaceSpec& spec) {
  if (spec.model.empty() || spec.model.size() > kMostText)
    return absl::InvalidArgumentError(
        absl::StrCat("namespace: model has ", spec.model.size(), " bytes, must have 1 to ", kMostText));
  if (spec.salt.size() > kMostText)
    return absl::InvalidArgumentError(
        absl::StrCat("namespace: salt has ", spec.salt.size(), " bytes, must have at most ", kMostText));
  if (spec.block_tokens < 1 || spec.block_tokens > kMostBlockTokens)
    return absl::InvalidArgumentError(
        absl::StrCat("namespace: block_tokens is ", spec.block_tokens, ", must be 1 to ", kMostBlockTokens));
  if (spec.tensors.has_value() == spec.opaque.has_value())
    return absl::InvalidArgumentError("namespace: say what a block is: tensors or opaque bytes");
  if (spec.opaque.has_value()) {
    if (spec.opaque->block_bytes < 1 || spec.opaque->block_bytes > kMostBlockBytes)
      return absl::InvalidArgumentError(absl::StrCat("namespace: block_bytes is ", spec.opaque->block_bytes,
                                                     ", must be 1 to ", kMostBlockBytes));
    if (spec.opaque->encoding.size() > kMostText)
      return absl::InvalidArgumentError(absl::StrCat("namespace: encoding has ", spec.opaque->encoding.size(),
                                                     " bytes, must have at most ", kMostText));
    if (spec.degrade.empty()) return absl::OkStatus();
    return absl::InvalidArgumentError(
        "namespace: degrade: opaque bytes cannot be recoded to fewer bits; leave it out, or store K and V as "
        "tensors in a pair");
  }
  const TensorContent& tensors = *spec.tensors;
  const absl::Status shape =
      CheckGroupShape({tensors.layers, tensors.kv_heads, tensors.head_dim_k, tensors.head_dim_v});
  if (!shape.ok()) return absl::InvalidArgumentError(absl::StrCat("namespace: ", shape.message()));
  if (tensors.layers > kMostRows / spec.block_tokens)
    return absl::InvalidArgumentError(
        absl::StrCat("namespace: ", tensors.layers, " layers of ", spec.block_tokens,
                     " tokens: layers x block_tokens must be at most ", kMostRows));
  return Annotate(CheckLadder(spec.stored_shape(), tensors.pair, spec.degrade), "namespace");
}

NamespaceId HashNamespaceSpec(const NamespaceSpec& spec) {
  std::string text;
  const auto number = [&](uint64_t value) {
    text.append(reinterpret_cast<const char*>(&value), sizeof value);
  };
  const auto add = [&](const std::string& part) {
    number(part.size());
    text += part;
  };
  add(spec.model);
  add(spec.salt);
  add(spec.tenant);
  number(static_cast<uint64_t>(spec.block_tokens));
  if (spec.opaque.has_value()) {
    add("opaque");
    add(spec.opaque->encoding);
    number(spec.opaque->block_bytes);
  } else {
    const TensorContent& tensors = *spec.tensors;
    add(PairName(tensors.pair));
    number(static_cast<uint64_t>(tensors.layers));
    number(static_cast<uint64_t>(Info(tensors.pair.k).version));
    number(static_cast<uint64_t>(Info(tensors.pair.v).version));
    number(HashLayout(BlockLayout(spec.stored_shape(), tensors.pair)));
    for (const CachePair& rung : spec.degrade) {
      add(absl::StrCat("degrade ", PairName(rung)));
      number(static_cast<uint64_t>(Info(rung.k).version));
      number(static_cast<uint64_t>(Info(rung.v).version));
      number(HashLayout(BlockLayout(spec.stored_shape(), rung)));
    }
  }
  const NamespaceId id = XXH3_64bits(text.data(), text.size());
  return id != 0 ? id : 1;
}

}  // namespace kvtide
