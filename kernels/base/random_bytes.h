// Random bytes of the system (getrandom): for ids that nobody guesses, salts and keys.
#pragma once

#include <cstddef>
#include <span>

namespace kvtide {

// Waits, early at boot, until the system has any.
void FillRandom(std::span<std::byte> bytes);

}  // namespace kvtide
