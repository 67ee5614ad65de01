#include "kernels/base/random_bytes.h"

#include <sys/random.h>

#include <cerrno>
#include <cstring>

#include "kernels/base/check.h"

namespace kvtide {

void FillRandom(std::span<std::byte> bytes) {
  // Up to 256 bytes come in one piece once the kernel has any.
  while (!bytes.empty()) {
    const ssize_t got = getrandom(bytes.data(), bytes.size(), 0);
    if (got < 0 && errno == EINTR) continue;
    KVTIDE_CHECK(got > 0, "getrandom: ", std::strerror(errno));
    bytes = bytes.subspan(static_cast<size_t>(got));
  }
}

}  // namespace kvtide
