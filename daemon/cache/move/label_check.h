// Blocks that came from before a restart: what a list of them said lies somewhere may have been dropped and
// overwritten after the list was written. Before such a block counts, its label is read.
#pragma once

#include <span>

#include "daemon/cache/block/block_guards.h"
#include "daemon/cache/sequence/cache_core.h"

namespace kvtide {

// Those that are not `checked` yet: they are afterwards, or were dropped because something else lies there,
// or stay as they are because the tier does not answer.
void CheckLabels(CacheLock& lock, std::span<const HeldBlock> blocks);

// The keys before that of the first of these blocks which is still found and is not `checked`: what could not
// be asked, as when the disk does not answer, does not count. The blocks are those of some of the keys.
std::span<const BlockKey> BeforeUnchecked(std::span<const BlockKey> keys, std::span<const HeldBlock> blocks);

}  // namespace kvtide
