// What a disk tier finds on a disk that holds any bytes: for the fuzzer and for a test without one.
#pragma once

#include <cstdint>
#include <span>

namespace kvtide {

// The first byte chooses what the rest is read as: a sequence's manifest, a namespace's, the header of an
// extent, a folder's key, or an encrypted extent. What is accepted has to be the same after it is written and read again; else the process ends.
// Whether it was accepted.
bool PlayHostileDisk(std::span<const uint8_t> bytes);

}  // namespace kvtide
