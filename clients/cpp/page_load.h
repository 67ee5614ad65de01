// Blocks of a store into an engine's pages, piece by piece: while one piece is on its way to the pages, the
// daemon writes the next one. Where the client reads the store's tier of host memory itself, blocks that lie
// there are copied from their places, and the daemon writes nothing.
//
// Places are given back when the copier has waited for their slot, so that nothing copies from memory that
// the daemon uses again. A client that dies has its places given back when its process has ended; one that
// closes its connection waits for its copiers first.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "clients/cpp/block_store.h"
#include "kernels/page_copier.h"

namespace kvtide::client {

struct PageLoad {
  LeaseId lease = 0;
  int64_t chunks = 0;  // of the lease, from its first block on; a chunk is a block of the store
  int chunk_pages = 1;
  int skip = 0;                    // pages of the first chunk that are left alone
  std::span<const int32_t> pages;  // of the engine, in the order of the tokens
  // Memory for the pieces, equally large, best of the store's pool; each holds a chunk at least.
  std::span<std::byte> buffers[PageCopier::kSlots];
  // The copier reads the store's host_tier() fast (PageCopier::PinReadOnly, or host memory to host memory):
  // blocks that lie there are not brought through the buffers.
  bool in_place = false;
};

struct PageLoadReport {
  int64_t chunks = 0;    // whose pages are written
  int64_t lost = -1;     // the first that could not be read, if any: nothing behind it was written
  int64_t in_place = 0;  // of the chunks that were put on their way, those that were copied from their places
};

// Returns when nothing is under way any more; `report` counts what is written, whatever the status. A chunk
// that cannot be read is no error.
absl::Status LoadPages(BlockStore& store, PageCopier& copier, const PageLoad& load, PageLoadReport* report);

}  // namespace kvtide::client
