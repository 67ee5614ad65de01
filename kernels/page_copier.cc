#include "kernels/page_copier.h"

#include <algorithm>

#include "absl/strings/str_cat.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

// The last value of a side lies in its page.
absl::Status CheckSide(const PageCopyOptions& options, const PageRows& rows, int dim, const char* name) {
  int64_t last = rows.first;
  for (const auto& [step, count] : {std::pair<int64_t, int>{rows.token, options.tokens},
                                    {rows.head, options.kv_heads},
                                    {rows.dim, dim}}) {
    int64_t way = 0;
    if (step < 0 || __builtin_mul_overflow(step, int64_t{count} - 1, &way) ||
        __builtin_add_overflow(last, way, &last))
      last = INT64_MAX;
  }
  const auto element = static_cast<int64_t>(DataTypeBytes(options.type));
  if (rows.first >= 0 && rows.dim > 0 && last < INT64_MAX / element - 1 &&
      (last + 1) * element <= options.page_stride)
    return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat("rows of ", name, " reach beyond a page of ",
                                                 options.page_stride,
                                                 " bytes: first, token, head and dim are elements"));
}

}  // namespace

BlockLayout ChunkLayout(const PageCopyOptions& options, size_t layers, CachePair pair) {
  const int pages = options.chunk_pages * options.tokens / kBlockTokens;
  return BlockLayout(
      {static_cast<int>(layers) * pages, options.kv_heads, options.head_dim_k, options.head_dim_v}, pair);
}

size_t ChunkBytes(const PageCopyOptions& options, size_t layers) {
  if (options.page_bytes > 0) return layers * Size(options.chunk_pages) * options.page_bytes;
  return ChunkLayout(options, layers, options.pair).block_bytes();
}

absl::Status CheckPageCopy(const PageCopyOptions& options, std::span<std::byte* const> layers) {
  const auto bad = [](const auto&... words) { return absl::InvalidArgumentError(absl::StrCat(words...)); };
  if (layers.empty() || layers.size() > 1024) return bad(layers.size(), " layers, must be 1 to 1024");
  if (std::any_of(layers.begin(), layers.end(), [](const std::byte* at) { return at == nullptr; }))
    return bad("a layer has no pages");
  if (options.pages < 1 || options.page_stride < 1)
    return bad(options.pages, " pages, ", options.page_stride, " bytes apart");
  if (options.chunk_pages < 1 || options.chunk_pages > 4096)
    return bad(options.chunk_pages, " pages in a chunk, must be 1 to 4096");
  if (options.page_bytes > Size(options.page_stride))
    return bad("pages of ", options.page_bytes, " bytes, ", options.page_stride, " apart");
  if (options.page_bytes == 0) {
    if (options.tokens < 1 || options.tokens > 4096 ||
        options.chunk_pages * options.tokens % kBlockTokens != 0)
      return bad("a chunk has ", options.chunk_pages, " pages of ", options.tokens,
                 " tokens, which is no multiple of ", kBlockTokens);
    const int64_t pages = int64_t{options.chunk_pages} * options.tokens / kBlockTokens;
    if (static_cast<int64_t>(layers.size()) * pages > 1024)
      return bad("a chunk has ", static_cast<int64_t>(layers.size()) * pages,
                 " pages of 64 tokens, must have at most 1024");
    KVTIDE_RETURN_IF_ERROR(CheckGroupShape({1, options.kv_heads, options.head_dim_k, options.head_dim_v}));
    if (Info(options.pair.k).calibrated || Info(options.pair.v).calibrated)
      return bad(PairName(options.pair), " needs a profile: pages are coded without");
    KVTIDE_RETURN_IF_ERROR(CheckSide(options, options.k, options.head_dim_k, "K"));
    KVTIDE_RETURN_IF_ERROR(CheckSide(options, options.v, options.head_dim_v, "V"));
  }
  const size_t chunk = ChunkBytes(options, layers.size());
  if (options.piece_bytes < chunk) return bad("a piece has ", options.piece_bytes, " bytes, a chunk ", chunk);
  return absl::OkStatus();
}

size_t ChunksOf(const PageCopyOptions& options, int skip, size_t pages) {
  return (Size(skip) + pages + Size(options.chunk_pages) - 1) / Size(options.chunk_pages);
}

absl::Status CheckChunks(const PageCopyOptions& options, std::span<const std::byte* const> chunks, int skip,
                         std::span<const int32_t> pages) {
  const size_t wanted = skip < 0 ? 0 : ChunksOf(options, skip, pages.size());
  if (chunks.size() != wanted)
    return absl::InvalidArgumentError(absl::StrCat(chunks.size(), " chunks, the pages lie in ", wanted));
  if (std::any_of(chunks.begin(), chunks.end(), [](const std::byte* at) { return at == nullptr; }))
    return absl::InvalidArgumentError("a chunk is nowhere");
  return absl::OkStatus();
}

absl::Status CheckPagePiece(const PageCopyOptions& options, size_t chunk_bytes, int slot, int skip,
                            std::span<const int32_t> pages) {
  if (slot < 0 || slot >= PageCopier::kSlots)
    return absl::InvalidArgumentError(absl::StrCat("slot ", slot, " of ", PageCopier::kSlots));
  if (skip < 0 || skip >= options.chunk_pages)
    return absl::InvalidArgumentError(absl::StrCat("skip is ", skip, " of ", options.chunk_pages, " pages"));
  const size_t chunks = ChunksOf(options, skip, pages.size());
  if (chunks * chunk_bytes > options.piece_bytes)
    return absl::InvalidArgumentError(absl::StrCat(chunks, " chunks of ", chunk_bytes,
                                                   " bytes are more than a piece of ", options.piece_bytes));
  for (const int32_t page : pages)
    if (page < 0 || page >= options.pages)
      return absl::InvalidArgumentError(absl::StrCat("page ", page, " of ", options.pages));
  return absl::OkStatus();
}

}  // namespace kvtide
