// Both ends of a ring against one that writes what it likes into the shared memory: the bytes say what, when
// and where. Stops the process when an end goes on after it has seen nonsense, or leaves the ring. Shared by
// the fuzzer and a test.
#pragma once

#include <cstdint>
#include <span>

namespace kvtide::ring {

void PlayHostileRing(std::span<const uint8_t> bytes);

}  // namespace kvtide::ring
