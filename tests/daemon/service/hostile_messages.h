// Messages of a client that shares memory and sends what it likes: any verbs of steps, tokens and blocks,
// with any numbers, and tensors said to lie anywhere. Nothing is mapped on either side of the arena, so a
// byte beyond it ends the process; so does one that was written where no message said, and what is left
// behind when the client goes. Shared by the fuzzer and a test.
#pragma once

#include <cstdint>
#include <span>

namespace kvtide::service {

// The bytes say what is sent. Returns how many messages were served without an error.
int PlayHostileMessages(std::span<const uint8_t> bytes);

}  // namespace kvtide::service
