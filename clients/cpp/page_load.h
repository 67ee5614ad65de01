// Blocks of a store into an engine's pages, piece by piece: while one piece is on its way to the pages, the
// daemon writes the next one.
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
};

struct PageLoadReport {
  int64_t chunks = 0;  // whose pages are written
  int64_t lost = -1;   // the first that could not be read, if any: nothing behind it was written
};

// Returns when nothing is under way any more; `report` counts what is written, whatever the status. A chunk
// that cannot be read is no error.
absl::Status LoadPages(BlockStore& store, PageCopier& copier, const PageLoad& load, PageLoadReport* report);

}  // namespace kvtide::client
