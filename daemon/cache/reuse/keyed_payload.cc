#include "daemon/cache/reuse/keyed_payload.h"

#ifdef KVTIDE_XXH_DISPATCH
#include <xxh_x86dispatch.h>  // the vector instructions of this processor; the same hash
#else
#include <xxhash.h>
#endif

#include <algorithm>
#include <cstring>
#include <vector>

#include "absl/strings/str_cat.h"
#include "daemon/cache/call/tensor_check.h"
#include "kernels/base/cancellation.h"
#include "kernels/base/sizes.h"
#include "kernels/base/status.h"

namespace kvtide {

absl::StatusOr<uint64_t> PayloadBytes(const NamespaceSpec& spec, uint64_t block_bytes, BlockPayload form,
                                      const PageLayout& layout, uint64_t blocks) {
  if (form == BlockPayload::kBytes) {
    const std::optional<uint64_t> bytes = CheckedMul<uint64_t>(blocks, block_bytes);
    if (!bytes.has_value()) return absl::InvalidArgumentError("the payload would have more than 2^64 bytes");
    return *bytes;
  }
  if (!spec.tensors.has_value())
    return absl::InvalidArgumentError(
        "the namespace has opaque blocks: they travel as bytes (BLOCK_FORM_BYTES), not as tensors");
  KVTIDE_ASSIGN_OR_RETURN(const ResolvedPages pages,
                          ResolvedPages::Make(layout, spec.pages(), static_cast<int64_t>(blocks)));
  return pages.bytes();
}

absl::Status CheckBlock(std::span<const std::byte> block, uint64_t checksum) {
  if (XXH3_64bits(block.data(), block.size()) == checksum) return absl::OkStatus();
  return absl::DataLossError("the block has other bytes than were stored");
}

absl::StatusOr<KeyedPayload> KeyedPayload::Make(const KeyedNamespace& space, BlockPayload form,
                                                const PageLayout& layout, size_t blocks, uint64_t bytes,
                                                bool exactly) {
  KVTIDE_ASSIGN_OR_RETURN(const uint64_t need,
                          PayloadBytes(space.spec, space.form.bytes, form, layout, blocks));
  if (exactly ? bytes != need : bytes < need)
    return absl::InvalidArgumentError(absl::StrCat("the payload of ", blocks, " blocks has ", bytes,
                                                   " bytes, must have ", need, exactly ? "" : " or more"));
  KeyedPayload payload;
  payload.space_ = &space;
  payload.form_ = form;
  payload.blocks_ = blocks;
  if (form == BlockPayload::kBytes) return payload;
  payload.shape_ = space.spec.pages();
  KVTIDE_ASSIGN_OR_RETURN(payload.pages_,
                          ResolvedPages::Make(layout, payload.shape_, static_cast<int64_t>(blocks)));
  return payload;
}

namespace {

absl::Status CheckAligned(const void* bytes, DataType type) {
  if (reinterpret_cast<uintptr_t>(bytes) % DataTypeBytes(type) == 0) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("the payload does not begin at a multiple of ", DataTypeBytes(type), " bytes"));
}

}  // namespace

absl::StatusOr<KeyedPayload> KeyedPayload::Incoming(const KeyedNamespace& space, BlockPayload form,
                                                    const PageLayout& layout, size_t blocks,
                                                    std::span<const std::byte> bytes) {
  KVTIDE_ASSIGN_OR_RETURN(KeyedPayload payload, Make(space, form, layout, blocks, bytes.size(), true));
  if (form == BlockPayload::kTensors) KVTIDE_RETURN_IF_ERROR(CheckAligned(bytes.data(), layout.type));
  payload.in_ = bytes.data();
  return payload;
}

absl::StatusOr<KeyedPayload> KeyedPayload::Outgoing(const KeyedNamespace& space, BlockPayload form,
                                                    const PageLayout& layout, size_t blocks,
                                                    std::span<std::byte> bytes) {
  KVTIDE_ASSIGN_OR_RETURN(KeyedPayload payload, Make(space, form, layout, blocks, bytes.size(), false));
  if (form == BlockPayload::kTensors) KVTIDE_RETURN_IF_ERROR(CheckAligned(bytes.data(), layout.type));
  payload.out_ = bytes.data();
  return payload;
}

const void* KeyedPayload::Source(const ResolvedPages::Side& side, size_t block, int layer, int token,
                                 int head) const {
  const int64_t at = pages_.At(side, static_cast<int64_t>(block), layer, token, head);
  return in_ + static_cast<size_t>(at) * DataTypeBytes(pages_.type());
}

void* KeyedPayload::Target(const ResolvedPages::Side& side, size_t block, int layer, int token,
                           int head) const {
  const int64_t at = pages_.At(side, static_cast<int64_t>(block), layer, token, head);
  return out_ + static_cast<size_t>(at) * DataTypeBytes(pages_.type());
}

absl::Status KeyedPayload::CheckValues() const {
  if (form_ == BlockPayload::kBytes) return absl::OkStatus();
  for (size_t block = 0; block < blocks_; block++) {
    for (int layer = 0; layer < shape_.layers; layer++) {
      for (const bool value : {false, true}) {
        const ResolvedPages::Side& side = value ? pages_.v() : pages_.k();
        const char* const what = value ? "V" : "K";
        if (side.dense) {
          KVTIDE_RETURN_IF_ERROR(
              Annotate(kvtide::CheckValues({Source(side, block, layer, 0, 0), pages_.type()}, shape_.tokens,
                                           shape_.kv_heads, side.dim, what, layer, 0),
                       absl::StrCat("block ", block)));
          continue;
        }
        for (int head = 0; head < shape_.kv_heads; head++) {
          // Rows of one head may lie side by side.
          const bool rows = side.token_stride == side.dim;
          for (int token = 0; token < shape_.tokens; token += rows ? shape_.tokens : 1)
            KVTIDE_RETURN_IF_ERROR(
                Annotate(kvtide::CheckValues({Source(side, block, layer, token, head), pages_.type()},
                                             rows ? shape_.tokens : 1, 1, side.dim, what, layer, token),
                         absl::StrCat("block ", block, ", KV head ", head)));
        }
      }
    }
  }
  return absl::OkStatus();
}

std::vector<KeyedPayload::Segment> KeyedPayload::Segments() const {
  std::vector<Segment> segments;
  for (int layer = 0; layer < shape_.layers; layer++) {
    for (int token = 0; token < shape_.tokens;) {
      const int row = layer * shape_.tokens + token;
      const int rows = std::min(shape_.tokens - token, kBlockTokens - row % kBlockTokens);
      segments.push_back({layer, token, row / kBlockTokens, row % kBlockTokens, rows});
      token += rows;
    }
  }
  return segments;
}

absl::StatusOr<std::byte*> KeyedPayload::Staging(Backend& backend, int tier) {
  std::unique_ptr<Slab>& slab = staging_[tier];
  if (slab == nullptr) {
    KVTIDE_ASSIGN_OR_RETURN(slab, backend.AllocateSlab(space_->exact->block_bytes()));
  }
  return slab->data();
}

namespace {

// Copies a block; with `checksum` in slices, each of which is hashed on its way into a near cache, from where
// it is copied. The source is host memory then.
absl::Status CopyBlock(Backend& backend, const CopyPiece& piece, CopyDirection direction, uint64_t* checksum,
                       const Cancellation* cancellation) {
  if (checksum == nullptr) return backend.CopyNow(piece, direction);
  constexpr size_t kSlice = size_t{256} << 10;
  const std::unique_ptr<XXH3_state_t, XXH_errorcode (*)(XXH3_state_t*)> state(XXH3_createState(),
                                                                              XXH3_freeState);
  if (state == nullptr) return absl::ResourceExhaustedError("no memory for a checksum");
  XXH3_64bits_reset(state.get());
  for (size_t at = 0; at < piece.bytes; at += kSlice) {
    if (IsCancelled(cancellation)) return absl::CancelledError("cancelled between parts of a block");
    const size_t bytes = std::min(kSlice, piece.bytes - at);
    XXH3_64bits_update(state.get(), piece.source + at, bytes);
    KVTIDE_RETURN_IF_ERROR(backend.CopyNow({piece.target + at, piece.source + at, bytes}, direction));
  }
  *checksum = XXH3_64bits_digest(state.get());
  return absl::OkStatus();
}

}  // namespace

absl::Status KeyedPayload::Write(Backend& backend, int tier, size_t index, std::byte* target,
                                 uint64_t* checksum, const Cancellation* cancellation) {
  const size_t bytes = space_->form.bytes;
  if (form_ == BlockPayload::kBytes)
    return CopyBlock(backend, {target, in_ + index * bytes, bytes}, CopyDirection::kFromHost, checksum,
                     cancellation);
  if (IsCancelled(cancellation)) return absl::CancelledError("cancelled between blocks");
  KVTIDE_RETURN_IF_ERROR(WriteRows(backend, tier, index, target));
  if (checksum != nullptr) *checksum = XXH3_64bits(target, bytes);
  return absl::OkStatus();
}

absl::Status KeyedPayload::Read(Backend& backend, int tier, size_t index, std::byte* source,
                                const BlockForm& form, const uint64_t* checksum,
                                const Cancellation* cancellation) {
  const size_t bytes = space_->form.bytes;
  if (form_ == BlockPayload::kBytes && form.layout != space_->form.layout) {
    if (IsCancelled(cancellation)) return absl::CancelledError("cancelled between blocks");
    if (checksum != nullptr) KVTIDE_RETURN_IF_ERROR(CheckBlock({source, form.bytes}, *checksum));
    KVTIDE_ASSIGN_OR_RETURN(std::byte* const whole, Staging(backend, tier));
    KVTIDE_RETURN_IF_ERROR(Recode(backend, form.layout, source, space_->form.layout, whole));
    return backend.CopyNow({out_ + index * bytes, whole, bytes}, CopyDirection::kToHost);
  }
  if (form_ == BlockPayload::kBytes) {
    uint64_t found = 0;
    KVTIDE_RETURN_IF_ERROR(CopyBlock(backend, {out_ + index * bytes, source, bytes}, CopyDirection::kToHost,
                                     checksum == nullptr ? nullptr : &found, cancellation));
    return checksum == nullptr || found == *checksum
               ? absl::OkStatus()
               : absl::DataLossError("the block has other bytes than were stored");
  }
  if (checksum != nullptr) KVTIDE_RETURN_IF_ERROR(CheckBlock({source, form.bytes}, *checksum));
  return ReadRows(backend, index, source, form.layout, cancellation);
}

absl::Status KeyedPayload::Recode(Backend& backend, const BlockLayout* from, const std::byte* source,
                                  const BlockLayout* to, std::byte* target) const {
  std::vector<RecodePiece> pieces;
  const int full = space_->spec.rows() / kBlockTokens, rest = space_->spec.rows() % kBlockTokens;
  const auto add = [&](int first, int layers, int tokens) {
    RecodePiece& piece = pieces.emplace_back();
    piece.from = from;
    piece.source = source;
    piece.to = to;
    piece.target = target;
    piece.first_layer = first;
    piece.layers = layers;
    piece.tokens = tokens;
  };
  if (full > 0) add(0, full, kBlockTokens);
  if (rest > 0) add(full, 1, rest);
  return backend.Recode(pieces);
}

absl::Status KeyedPayload::WriteRows(Backend& backend, int tier, size_t index, std::byte* target) {
  const BlockLayout& layout = *space_->form.layout;
  const bool coded = layout.pair() != ExactPair();
  std::byte* exact = target;
  if (coded) {
    KVTIDE_ASSIGN_OR_RETURN(exact, Staging(backend, tier));
  }
  const size_t element = DataTypeBytes(pages_.type());
  const std::vector<Segment> segments = Segments();
  // Rows that do not lie side by side are brought together first, all segments of a block one after the
  // other.
  const auto gather = [&](const ResolvedPages::Side& side, std::vector<std::byte>* dense) {
    if (side.dense) return;
    const size_t row = static_cast<size_t>(side.dim) * element;
    dense->resize(static_cast<size_t>(shape_.layers) * static_cast<size_t>(shape_.tokens) *
                  static_cast<size_t>(shape_.kv_heads) * row);
    std::byte* to = dense->data();
    for (int layer = 0; layer < shape_.layers; layer++)
      for (int token = 0; token < shape_.tokens; token++)
        for (int head = 0; head < shape_.kv_heads; head++, to += row)
          std::memcpy(to, Source(side, index, layer, token, head), row);
  };
  gather(pages_.k(), &dense_k_);
  gather(pages_.v(), &dense_v_);
  const auto view = [&](const ResolvedPages::Side& side, const std::vector<std::byte>& dense,
                        const Segment& segment) -> TensorView {
    if (side.dense) return {Source(side, index, segment.layer, segment.token, 0), pages_.type()};
    const size_t row = static_cast<size_t>(segment.page) * kBlockTokens + static_cast<size_t>(segment.row);
    return {
        dense.data() + row * static_cast<size_t>(shape_.kv_heads) * static_cast<size_t>(side.dim) * element,
        pages_.type()};
  };
  std::vector<AppendPiece> pieces;
  pieces.reserve(segments.size() + 1);
  for (const Segment& segment : segments) {
    AppendPiece& piece = pieces.emplace_back();
    piece.layout = space_->exact;
    piece.block = exact;
    piece.layer = segment.page;
    piece.first_token = segment.row;
    piece.tokens = segment.rows;
    piece.k = view(pages_.k(), dense_k_, segment);
    piece.v = view(pages_.v(), dense_v_, segment);
  }
  // The end of the last page: no bytes of others stay there.
  const int rest = space_->spec.rows() % kBlockTokens;
  std::vector<uint16_t> zeros;
  if (rest > 0 && !coded) {
    zeros.resize(static_cast<size_t>(kBlockTokens - rest) * static_cast<size_t>(shape_.kv_heads) *
                 static_cast<size_t>(std::max(shape_.head_dim_k, shape_.head_dim_v)));
    AppendPiece& piece = pieces.emplace_back();
    piece.layout = space_->exact;
    piece.block = exact;
    piece.layer = space_->exact->shape().layers - 1;
    piece.first_token = rest;
    piece.tokens = kBlockTokens - rest;
    piece.k = piece.v = {zeros.data(), DataType::kF16};
  }
  AppendArgs args;
  args.pieces = pieces;
  args.k = pieces.front().k;
  args.v = pieces.front().v;
  KVTIDE_RETURN_IF_ERROR(backend.Append(args));
  if (!coded) return absl::OkStatus();
  return Recode(backend, space_->exact, exact, &layout, target);
}

absl::Status KeyedPayload::ReadRows(Backend& backend, size_t index, std::byte* source,
                                    const BlockLayout* layout, const Cancellation* cancellation) {
  std::byte* const blocks[] = {source};
  BlockRun run;
  run.layout = layout;
  run.blocks = blocks;
  run.tokens = kBlockTokens;
  const size_t element = DataTypeBytes(pages_.type());
  const auto heads = static_cast<size_t>(shape_.kv_heads);
  // Rows of all heads of a token lie side by side, or are spread out afterwards.
  const auto direct = [&](const ResolvedPages::Side& side) {
    return (side.head_stride == side.dim || heads == 1) &&
           static_cast<size_t>(side.token_stride) >= heads * static_cast<size_t>(side.dim);
  };
  const std::vector<Segment> segments = Segments();
  const auto prepare = [&](const ResolvedPages::Side& side, std::vector<std::byte>* dense) {
    if (!direct(side))
      dense->resize(segments.size() * kBlockTokens * heads * static_cast<size_t>(side.dim) * element);
  };
  prepare(pages_.k(), &dense_k_);
  prepare(pages_.v(), &dense_v_);
  const auto dense_at = [&](const ResolvedPages::Side& side, std::vector<std::byte>& dense, size_t segment) {
    return dense.data() + segment * kBlockTokens * heads * static_cast<size_t>(side.dim) * element;
  };
  std::vector<DecodePiece> pieces;
  pieces.reserve(segments.size());
  for (size_t s = 0; s < segments.size(); s++) {
    const Segment& segment = segments[s];
    DecodePiece& piece = pieces.emplace_back();
    piece.run = &run;
    piece.layer = segment.page;
    piece.first_token = segment.row;
    piece.tokens = segment.rows;
    const auto rows = [&](const ResolvedPages::Side& side, std::vector<std::byte>& dense, size_t* stride) {
      void* const to = direct(side) ? Target(side, index, segment.layer, segment.token, 0)
                                    : static_cast<void*>(dense_at(side, dense, s));
      *stride = direct(side) ? static_cast<size_t>(side.token_stride) : 0;
      return MutableTensorView(to, pages_.type());
    };
    piece.k = rows(pages_.k(), dense_k_, &piece.k_stride);
    piece.v = rows(pages_.v(), dense_v_, &piece.v_stride);
  }
  KVTIDE_RETURN_IF_ERROR(backend.DecodeTokens(pieces, cancellation));
  const auto spread = [&](const ResolvedPages::Side& side, std::vector<std::byte>& dense) {
    if (direct(side)) return;
    const size_t row = static_cast<size_t>(side.dim) * element;
    for (size_t s = 0; s < segments.size(); s++) {
      const std::byte* from = dense_at(side, dense, s);
      for (int token = 0; token < segments[s].rows; token++)
        for (int head = 0; head < shape_.kv_heads; head++, from += row)
          std::memcpy(Target(side, index, segments[s].layer, segments[s].token + token, head), from, row);
    }
  };
  spread(pages_.k(), dense_k_);
  spread(pages_.v(), dense_v_);
  return absl::OkStatus();
}

}  // namespace kvtide
