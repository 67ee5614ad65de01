// What every backend checks of a piece before it touches a block: InvalidArgument with what is wrong.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "kernels/backend.h"

namespace kvtide {

inline absl::Status CheckPiece(const AppendPiece& piece) {
  if (piece.layout == nullptr || piece.block == nullptr)
    return absl::InvalidArgumentError("append: no layout or no block");
  if (piece.layout->k().groups > 0 || piece.layout->v().groups > 0)  // codes, which have scales
    return absl::InvalidArgumentError(absl::StrCat("append to a block of ", PairName(piece.layout->pair()),
                                                   ": tokens are appended to f16 or bf16 blocks"));
  if (piece.layer < 0 || piece.layer >= piece.layout->shape().layers || piece.first_token < 0 ||
      piece.tokens < 0 || piece.first_token + piece.tokens > kBlockTokens)
    return absl::InvalidArgumentError(absl::StrCat("append: layer ", piece.layer, ", tokens ",
                                                   piece.first_token, " + ", piece.tokens,
                                                   " lie outside the block"));
  return absl::OkStatus();
}

inline absl::Status CheckPiece(const RecodePiece& piece) {
  if (piece.from == nullptr || piece.to == nullptr || piece.source == nullptr || piece.target == nullptr)
    return absl::InvalidArgumentError("recode: no layout or no block");
  if (!(piece.from->shape() == piece.to->shape()))
    return absl::InvalidArgumentError("recode: the two layouts differ in shape");
  if (piece.first_layer < 0 || piece.layers < 0 ||
      piece.first_layer + piece.layers > piece.from->shape().layers || piece.tokens < 0 ||
      piece.tokens > kBlockTokens)
    return absl::InvalidArgumentError(absl::StrCat("recode: layers ", piece.first_layer, " + ", piece.layers,
                                                   " or ", piece.tokens, " tokens lie outside the block"));
  for (const auto& [layout, profile] :
       {std::pair(piece.from, piece.from_profile), std::pair(piece.to, piece.to_profile)})
    if (const absl::Status status = CheckProfileFor(layout->pair().k, layout->shape(), profile); !status.ok())
      return absl::Status(status.code(), absl::StrCat("recode: ", status.message()));
  return absl::OkStatus();
}

inline absl::Status CheckPiece(const DecodePiece& piece) {
  if (piece.run == nullptr || piece.run->layout == nullptr)
    return absl::InvalidArgumentError("decode: no run or no layout");
  const BlockRun& run = *piece.run;
  const GroupShape& shape = run.layout->shape();
  const auto held = static_cast<int64_t>(run.blocks.size()) * kBlockTokens;
  if (piece.layer < 0 || piece.layer >= shape.layers)
    return absl::InvalidArgumentError(absl::StrCat("decode: layer ", piece.layer, " of ", shape.layers));
  if (piece.first_token < 0 || piece.tokens < 0 || piece.first_token > held ||
      piece.tokens > held - piece.first_token)
    return absl::InvalidArgumentError(absl::StrCat("decode: tokens ", piece.first_token, " + ", piece.tokens,
                                                   " of a run of ", run.blocks.size(), " blocks"));
  if (run.profile != nullptr &&
      run.profile->k.size() != static_cast<size_t>(shape.layers) * static_cast<size_t>(shape.kv_heads))
    return absl::InvalidArgumentError("decode: the profile does not have one entry per layer and KV head");
  if (const absl::Status status = CheckProfileFor(run.layout->pair().k, shape, run.profile); !status.ok())
    return absl::Status(status.code(), absl::StrCat("decode: ", status.message()));
  const auto heads = static_cast<size_t>(shape.kv_heads);
  for (const auto& [stride, dim] :
       {std::pair(piece.k_stride, shape.head_dim_k), std::pair(piece.v_stride, shape.head_dim_v)})
    if (stride != 0 && stride < heads * static_cast<size_t>(dim))
      return absl::InvalidArgumentError(absl::StrCat("decode: a stride of ", stride, " between rows of ",
                                                     heads * static_cast<size_t>(dim), " values"));
  return absl::OkStatus();
}

}  // namespace kvtide
