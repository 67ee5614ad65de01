// The label of a block in a tier of I/O (io_tier.h), and the hashes in it: what a block belongs to and how it
// is read, so that it is never taken for another one, of this process or an earlier one.
#pragma once

#include <cstdint>
#include <string>

#include "daemon/cache/block.h"
#include "daemon/cache/io_tier.h"
#include "daemon/cache/model.h"

namespace kvtide {

// XXH3 over the name, the layer groups and the order of the layers; equal in every process.
uint64_t HashModel(const ModelSpec& spec);
uint64_t HashNameSpace(const std::string& name_space);
// Over what decides where in a block a value lies.
uint64_t HashLayout(const BlockLayout& layout);

// How to read blocks of this layout: types, codec versions, order of bytes.
void SetLayout(const BlockLayout& layout, BlockLabel* label);

// Of the block's bytes as they lie, or are about to be written, in `place`. The checksum is the block's, 0 if
// it has none.
BlockLabel LabelOf(const Block& block, const Place& place);

}  // namespace kvtide
