#include "kernels/cpu/cpu_page_copier.h"

#include <cstring>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/base/finite.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

size_t Size(int64_t n) { return static_cast<size_t>(n); }

class CpuPageCopier final : public PageCopier {
 public:
  CpuPageCopier(Backend& backend, const PageCopyOptions& options, std::span<std::byte* const> layers)
      : backend_(backend),
        options_(options),
        layers_(layers.begin(), layers.end()),
        chunk_bytes_(ChunkBytes(options, layers.size())) {
    if (options.page_bytes > 0) return;
    coded_ = ChunkLayout(options, layers.size(), options.pair);
    exact_ = ChunkLayout(options, layers.size(), ExactPair());
    const size_t rows = Size(coded_.shape().layers) * kBlockTokens * Size(options.kv_heads);
    k_.resize(rows * Size(options.head_dim_k) * DataTypeBytes(options.type));
    v_.resize(rows * Size(options.head_dim_v) * DataTypeBytes(options.type));
    // What a record does not use stays zero.
    memory_.resize(exact_.block_bytes() + kAlignment);
    scratch_ = memory_.data() + (kAlignment - reinterpret_cast<uintptr_t>(memory_.data()) % kAlignment);
  }

  size_t chunk_bytes() const override { return chunk_bytes_; }
  absl::Status After(void*) override { return absl::OkStatus(); }

  absl::Status Read(int slot, std::span<const int32_t> pages, std::byte* payload) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagePiece(options_, chunk_bytes_, slot, 0, pages));
    const size_t per_chunk = Size(options_.chunk_pages);
    if (pages.size() % per_chunk != 0)
      return absl::InvalidArgumentError(
          absl::StrCat(pages.size(), " pages are no whole chunks of ", per_chunk));
    results_[slot] = absl::OkStatus();
    for (size_t chunk = 0; chunk < pages.size() / per_chunk; chunk++) {
      const std::span<const int32_t> mine = pages.subspan(chunk * per_chunk, per_chunk);
      std::byte* const to = payload + chunk * chunk_bytes_;
      const absl::Status read = options_.page_bytes > 0 ? ReadBytes(mine, to) : Encode(mine, to);
      if (!read.ok()) return results_[slot] = Annotate(read, absl::StrCat("chunk ", chunk));
    }
    return absl::OkStatus();
  }

  absl::Status Write(int slot, const std::byte* payload, int skip, std::span<const int32_t> pages) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagePiece(options_, chunk_bytes_, slot, skip, pages));
    std::vector<const std::byte*> chunks(ChunksOf(options_, skip, pages.size()));
    for (size_t chunk = 0; chunk < chunks.size(); chunk++) chunks[chunk] = payload + chunk * chunk_bytes_;
    return WriteChunks(slot, chunks, skip, pages);
  }

  absl::Status WriteChunks(int slot, std::span<const std::byte* const> chunks, int skip,
                           std::span<const int32_t> pages) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagePiece(options_, chunk_bytes_, slot, skip, pages));
    KVTIDE_RETURN_IF_ERROR(CheckChunks(options_, chunks, skip, pages));
    results_[slot] = absl::OkStatus();
    const size_t per_chunk = Size(options_.chunk_pages), end = Size(skip) + pages.size();
    for (size_t chunk = 0; chunk < chunks.size(); chunk++) {
      const std::byte* const from = chunks[chunk];
      if (options_.page_bytes == 0) KVTIDE_RETURN_IF_ERROR(Decode(from));
      for (size_t i = 0; i < per_chunk; i++) {
        const size_t at = chunk * per_chunk + i;
        if (at < Size(skip) || at >= end) continue;
        WritePage(from, i, pages[at - Size(skip)]);
      }
    }
    return absl::OkStatus();
  }

  absl::Status Wait(int slot) override {
    KVTIDE_RETURN_IF_ERROR(CheckPagePiece(options_, chunk_bytes_, slot, 0, {}));
    return std::exchange(results_[slot], absl::OkStatus());
  }

  absl::Status Pin(std::byte*, size_t) override { return absl::OkStatus(); }
  absl::Status PinReadOnly(const std::byte*, size_t) override { return absl::OkStatus(); }
  void Unpin(const std::byte*) override {}
  size_t bytes() const override { return memory_.size() + k_.size() + v_.size(); }

 private:
  static constexpr size_t kAlignment = 128;

  std::byte* Page(size_t layer, int32_t page) const { return layers_[layer] + page * options_.page_stride; }

  absl::Status ReadBytes(std::span<const int32_t> pages, std::byte* to) {
    for (size_t layer = 0; layer < layers_.size(); layer++)
      for (const int32_t page : pages) {
        std::memcpy(to, Page(layer, page), options_.page_bytes);
        to += options_.page_bytes;
      }
    return absl::OkStatus();
  }

  // Calls move(value of the page, value of dense rows [layers][chunk tokens][heads][dim], values side by
  // side) for the rows of a page.
  template <class F>
  void ForEachRow(const PageRows& side, int dim, std::vector<std::byte>& dense, size_t layer, size_t index,
                  int32_t page, F move) {
    const size_t element = DataTypeBytes(options_.type), row = Size(dim) * element;
    const size_t tokens = Size(options_.tokens), heads = Size(options_.kv_heads);
    std::byte* at = dense.data() + (layer * Size(options_.chunk_pages) + index) * tokens * heads * row;
    for (size_t token = 0; token < tokens; token++)
      for (size_t head = 0; head < heads; head++, at += row) {
        std::byte* const from =
            Page(layer, page) + Size(side.first + static_cast<int64_t>(token) * side.token +
                                     static_cast<int64_t>(head) * side.head) *
                                    element;
        if (side.dim == 1) {
          move(from, at, row);
        } else {
          for (size_t d = 0; d < Size(dim); d++)
            move(from + d * Size(side.dim) * element, at + d * element, element);
        }
      }
  }

  absl::Status Encode(std::span<const int32_t> pages, std::byte* to) {
    const auto gather = [](std::byte* page, std::byte* dense, size_t bytes) {
      std::memcpy(dense, page, bytes);
    };
    for (size_t layer = 0; layer < layers_.size(); layer++)
      for (size_t i = 0; i < pages.size(); i++) {
        ForEachRow(options_.k, options_.head_dim_k, k_, layer, i, pages[i], gather);
        ForEachRow(options_.v, options_.head_dim_v, v_, layer, i, pages[i], gather);
      }
    const TensorView k{k_.data(), options_.type}, v{v_.data(), options_.type};
    for (const auto& [rows, bytes] : {std::pair{k, k_.size()}, std::pair{v, v_.size()}}) {
      const size_t count = bytes / DataTypeBytes(options_.type);
      if (FirstBeyond(rows, count, kMaxF16) != count)
        return absl::InvalidArgumentError("a value is no number, infinite or beyond f16");
    }
    const bool coded = coded_.pair() != ExactPair();
    std::byte* const exact = coded ? scratch_ : to;
    std::vector<AppendPiece> pieces(Size(exact_.shape().layers));
    const auto view = [&](const std::vector<std::byte>& dense, int dim, size_t page) {
      return TensorView{dense.data() + page * kBlockTokens * Size(options_.kv_heads) * Size(dim) *
                                           DataTypeBytes(options_.type),
                        options_.type};
    };
    for (size_t page = 0; page < pieces.size(); page++) {
      AppendPiece& piece = pieces[page];
      piece.layout = &exact_;
      piece.block = exact;
      piece.layer = static_cast<int>(page);
      piece.tokens = kBlockTokens;
      piece.k = view(k_, options_.head_dim_k, page);
      piece.v = view(v_, options_.head_dim_v, page);
    }
    AppendArgs append;
    append.pieces = pieces;
    append.k = k;
    append.v = v;
    KVTIDE_RETURN_IF_ERROR(backend_.Append(append));
    if (!coded) return absl::OkStatus();
    RecodePiece recode;
    recode.from = &exact_;
    recode.source = exact;
    recode.to = &coded_;
    recode.target = to;
    recode.layers = exact_.shape().layers;
    return backend_.Recode({&recode, 1});
  }

  absl::Status Decode(const std::byte* from) {
    std::byte* const blocks[] = {const_cast<std::byte*>(from)};  // which only reads it
    BlockRun run;
    run.layout = &coded_;
    run.blocks = blocks;
    run.tokens = kBlockTokens;
    std::vector<DecodePiece> pieces(Size(coded_.shape().layers));
    const auto view = [&](std::vector<std::byte>& dense, int dim, size_t page) {
      return MutableTensorView(dense.data() + page * kBlockTokens * Size(options_.kv_heads) * Size(dim) *
                                                  DataTypeBytes(options_.type),
                               options_.type);
    };
    for (size_t page = 0; page < pieces.size(); page++) {
      DecodePiece& piece = pieces[page];
      piece.run = &run;
      piece.layer = static_cast<int>(page);
      piece.tokens = kBlockTokens;
      piece.k = view(k_, options_.head_dim_k, page);
      piece.v = view(v_, options_.head_dim_v, page);
    }
    return backend_.DecodeTokens(pieces, nullptr);
  }

  // Page `index` of the chunk `from`, whose rows are decoded.
  void WritePage(const std::byte* from, size_t index, int32_t page) {
    const auto scatter = [](std::byte* to, const std::byte* dense, size_t bytes) {
      std::memcpy(to, dense, bytes);
    };
    for (size_t layer = 0; layer < layers_.size(); layer++) {
      if (options_.page_bytes > 0) {
        std::memcpy(Page(layer, page),
                    from + (layer * Size(options_.chunk_pages) + index) * options_.page_bytes,
                    options_.page_bytes);
        continue;
      }
      ForEachRow(options_.k, options_.head_dim_k, k_, layer, index, page, scatter);
      ForEachRow(options_.v, options_.head_dim_v, v_, layer, index, page, scatter);
    }
  }

  Backend& backend_;
  const PageCopyOptions options_;
  const std::vector<std::byte*> layers_;
  const size_t chunk_bytes_;
  BlockLayout coded_, exact_;
  std::vector<std::byte> k_, v_, memory_;  // rows of a chunk as the engine has them, and in f16
  std::byte* scratch_ = nullptr;
  absl::Status results_[kSlots];
};

}  // namespace

absl::StatusOr<std::unique_ptr<PageCopier>> MakeCpuPageCopier(Backend& backend,
                                                              const PageCopyOptions& options,
                                                              std::span<std::byte* const> layers) {
  KVTIDE_RETURN_IF_ERROR(CheckPageCopy(options, layers));
  return std::make_unique<CpuPageCopier>(backend, options, layers);
}

}  // namespace kvtide
