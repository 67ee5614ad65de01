#include "tests/daemon/ring/hostile_ring.h"

#include <cstring>
#include <memory>
#include <vector>

#include "daemon/ring/handshake.h"
#include "daemon/ring/ring.h"
#include "kernels/base/check.h"
#include "tests/daemon/choices.h"

namespace kvtide::ring {
namespace {

constexpr size_t kArea = 512, kFence = 256;
constexpr std::byte kFenceByte{0x5a};

}  // namespace

void PlayHostileRing(std::span<const uint8_t> bytes) {
  testing::Choices choices(bytes);
  // On the heap, so that AddressSanitizer sees a step aside; the fences are for builds without.
  struct Memory {
    RingHead head;
    std::byte before[kFence];
    std::byte area[kArea];
    std::byte behind[kFence];
  };
  const auto memory = std::make_unique<Memory>();
  std::memset(memory->before, static_cast<int>(kFenceByte), kFence);
  std::memset(memory->behind, static_cast<int>(kFenceByte), kFence);
  RingReader reader(&memory->head, memory->area, kArea);
  RingWriter writer(&memory->head, memory->area, kArea);
  while (!choices.empty()) {
    switch (choices.Next<uint8_t>() % 6) {
      case 0:  // anywhere in the head
        reinterpret_cast<uint8_t*>(&memory->head)[choices.Next<uint16_t>() % sizeof(RingHead)] =
            choices.Next<uint8_t>();
        break;
      case 1:  // a likely count
        (choices.Next<uint8_t>() % 2 ? memory->head.written : memory->head.read) =
            choices.Next<uint8_t>() % 80;
        break;
      case 2: {  // an entry
        RingHead::Entry& entry = memory->head.entries[choices.Next<uint8_t>() % kEntries];
        entry.offset = choices.Next<uint16_t>();
        entry.bytes = choices.Next<uint16_t>();
        entry.timeout_ns = choices.Next<int64_t>();
        break;
      }
      case 3: {
        RingMessage message;
        const auto got = reader.Read(&message);
        if (got.ok() && *got) KVTIDE_CHECK(message.bytes.size() <= kArea);
        break;
      }
      case 4: {
        const size_t size = choices.Next<uint16_t>() % (kArea + 64);
        const auto to = writer.Reserve(size);
        if (!to.ok()) break;
        KVTIDE_CHECK(*to >= memory->area && *to + size <= memory->area + kArea);
        std::memset(*to, 1, size);
        memory->head.sleeping = 0;  // a wake-up would be a system call
        writer.Publish(choices.Next<uint64_t>());
        break;
      }
      default: {
        Hello hello;
        Welcome welcome;
        for (int i = 0; i < 8; i++) {
          reinterpret_cast<uint8_t*>(&hello)[choices.Next<uint8_t>() % sizeof(hello)] =
              choices.Next<uint8_t>();
          reinterpret_cast<uint8_t*>(&welcome)[choices.Next<uint16_t>() % sizeof(welcome)] =
              choices.Next<uint8_t>();
        }
        CheckHello(hello, 7).IgnoreError();
        CheckWelcome(welcome).IgnoreError();
        break;
      }
    }
    for (size_t i = 0; i < kFence; i++)
      KVTIDE_CHECK(memory->before[i] == kFenceByte && memory->behind[i] == kFenceByte);
  }
}

}  // namespace kvtide::ring
