// The label of a block in a tier of I/O (io_tier.h): what it belongs to and how it is read, so that it is
// never taken for another one, of this process or an earlier one.
#pragma once

#include "daemon/cache/block/block.h"
#include "daemon/cache/tier/io_tier.h"
#include "kernels/format/block_layout.h"

namespace kvtide {

// How to read blocks of this layout: types, codec versions, order of bytes.
void SetLayout(const BlockLayout& layout, BlockLabel* label);

// Of the block's bytes as they lie, or are about to be written, in `place`. The checksum is the block's, 0 if
// it has none.
BlockLabel LabelOf(const Block& block, const Place& place);

}  // namespace kvtide
