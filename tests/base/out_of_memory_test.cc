#include "kernels/base/out_of_memory.h"

#include <cstdint>
#include <new>

#include "gtest/gtest.h"

namespace kvtide {
namespace {

#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
constexpr const char* kWords = "";  // sanitizers end the process themselves
#else
constexpr const char* kWords = "out of memory outside of the tiers";
#endif

TEST(OutOfMemoryDeathTest, TheProcessEndsWithAMessage) {
  EXPECT_DEATH(
      {
        EndProcessWhenOutOfMemory();
        volatile size_t bytes = SIZE_MAX / 4;
        ::operator delete(::operator new(bytes));
      },
      kWords);
}

}  // namespace
}  // namespace kvtide
