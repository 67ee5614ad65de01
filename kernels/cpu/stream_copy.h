// Copies of bytes that nobody on this processor reads soon.
#pragma once

#include <cstddef>

namespace kvtide {

// As memcpy, past the caches where the processor can: the target's lines are not read first, which is a third
// of a copy's traffic.
void StreamCopy(std::byte* target, const std::byte* source, size_t bytes);

}  // namespace kvtide
