// Pages of an engine's paged cache on their way to the block store and back, all layers of many blocks at
// once, whatever attention backend of the engine wrote them. The CPU and CUDA implement it
// (kernels/cpu/cpu_page_copier.h, kernels/cuda/pages/cuda_page_copier.h).
//
// A *page* holds some tokens of one layer; `chunk_pages` pages of each layer make a *chunk*, which rests in
// the block store under one key. A payload is chunks one after the other, in host memory, as they rest:
//   bytes  [layers][chunk_pages][page_bytes], what the pages hold
//   rows   the records of BlockLayout (proto/kvtide/v1/blocks.proto, BLOCK_FORM_BYTES): the rows of a layer
//          are cut into pages of 64, each `kv_heads` records in the pair of the options. They are coded and
//          decoded here, on CUDA by the GPU, so that coded bytes alone cross the bus. The bytes are those
//          that a daemon makes of the same rows, the values those that it gives back.
//
//   copier->Pin(buffer, bytes);            // once, for speed
//   copier->After(event);                  // the pages hold what is to be read, or nobody reads them any
//   more copier->Read(0, pages, buffer);        // puts the work on a stream of its own copier->Wait(0); //
//   the payload is there
// Two *slots* take turns: while one's payload is filled, stored or loaded, the other's is copied.
//
// Not thread-safe: one call at a time; several objects run side by side.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/base/data_type.h"
#include "kernels/format/block_layout.h"

namespace kvtide {

// Where a row's values lie in a page, in elements.
struct PageRows {
  int64_t first = 0;                     // value 0 of token 0 and head 0
  int64_t token = 0, head = 0, dim = 1;  // from one to the next
};

struct PageCopyOptions {
  // Page p of layer l begins at layers[l] + p * page_stride.
  int64_t page_stride = 0;  // bytes
  int pages = 0;            // of a layer
  int chunk_pages = 1;
  size_t piece_bytes = 0;  // most of a payload, at least one chunk
  // Pages that travel as they are: so many bytes of each, from its first on. 0: rows.
  size_t page_bytes = 0;
  // Rows.
  DataType type = DataType::kBf16;
  int tokens = 0;  // of a page; chunk_pages * tokens is a multiple of 64
  int kv_heads = 0, head_dim_k = 0, head_dim_v = 0;
  PageRows k, v;
  CachePair pair;
};

class PageCopier {
 public:
  static constexpr int kSlots = 2;
  virtual ~PageCopier() = default;

  // Bytes of a chunk's payload.
  virtual size_t chunk_bytes() const = 0;
  // What is put on from now on begins when the work before `event` (a cudaEvent_t; null: nothing) is done.
  virtual absl::Status After(void* event) = 0;
  // Chunks of these pages, chunk_pages each, into `payload`. InvalidArgument for pages that do not exist, or
  // that are no whole chunks, and for more than piece_bytes.
  virtual absl::Status Read(int slot, std::span<const int32_t> pages, std::byte* payload) = 0;
  // And back: those of the payload from its page `skip` on, as many as there are ids.
  virtual absl::Status Write(int slot, const std::byte* payload, int skip,
                             std::span<const int32_t> pages) = 0;
  // The same for chunks that do not lie side by side: each begins at one of `chunks`, whose memory stays
  // until Wait. One copy for each run of neighbours.
  virtual absl::Status WriteChunks(int slot, std::span<const std::byte* const> chunks, int skip,
                                   std::span<const int32_t> pages) = 0;
  // Returns when the slot's work is done and its payload may be used. InvalidArgument if what Read has read
  // has a value that f16 does not hold (rows: beyond +-65504, infinite, no number): its chunk means nothing.
  virtual absl::Status Wait(int slot) = 0;

  // Makes copies from and to this host memory fast; it is not freed before Unpin. Copies work without.
  virtual absl::Status Pin(std::byte* memory, size_t bytes) = 0;
  // The same for memory that this process may only read, from the beginning of a page on. Unimplemented where
  // the driver cannot.
  virtual absl::Status PinReadOnly(const std::byte* memory, size_t bytes) = 0;
  virtual void Unpin(const std::byte* memory) = 0;
  // Memory that the object holds beside the pages.
  virtual size_t bytes() const = 0;
};

// What every implementation checks.
absl::Status CheckPageCopy(const PageCopyOptions& options, std::span<std::byte* const> layers);
absl::Status CheckPagePiece(const PageCopyOptions& options, size_t chunk_bytes, int slot, int skip,
                            std::span<const int32_t> pages);
// Chunks that so many pages behind `skip` lie in.
size_t ChunksOf(const PageCopyOptions& options, int skip, size_t pages);
absl::Status CheckChunks(const PageCopyOptions& options, std::span<const std::byte* const> chunks, int skip,
                         std::span<const int32_t> pages);
// Of a chunk of rows: [layers * chunk tokens / 64] pages of 64.
BlockLayout ChunkLayout(const PageCopyOptions& options, size_t layers, CachePair pair);
size_t ChunkBytes(const PageCopyOptions& options, size_t layers);

}  // namespace kvtide
