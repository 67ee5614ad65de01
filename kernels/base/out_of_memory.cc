#include "kernels/base/out_of_memory.h"

#include <unistd.h>

#include <cstdlib>
#include <new>

namespace kvtide {

void EndProcessWhenOutOfMemory() {
  std::set_new_handler([] {
    static const char kText[] =
        "kvtide: out of memory outside of the tiers; the process ends. Give it more memory, or lower the "
        "sizes of the host tier, of messages in flight or max_sequences\n";
    if (write(STDERR_FILENO, kText, sizeof kText - 1) < 0) _exit(1);
    std::abort();
  });
}

}  // namespace kvtide
