// Hashes of what blocks belong to and of how they are laid out: XXH3, equal in every process. They are in the
// labels of blocks (io_tier.h), in manifests and in the names of namespaces.
#pragma once

#include <cstdint>
#include <string>

#include "daemon/cache/call/model.h"
#include "kernels/format/block_layout.h"

namespace kvtide {

// Over the name, the layer groups and the order of the layers.
uint64_t HashModel(const ModelSpec& spec);
uint64_t HashNameSpace(const std::string& name_space);
// Over what decides where in a block a value lies.
uint64_t HashLayout(const BlockLayout& layout);

}  // namespace kvtide
