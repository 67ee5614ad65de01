// Numbers as people write and read them: sizes, bandwidths, MiB with the digits that matter.
#pragma once

#include <cstdint>
#include <string>

namespace kvtide::planner {

constexpr int64_t kKiB = 1024;
constexpr int64_t kMiB = 1024 * kKiB;
constexpr int64_t kGiB = 1024 * kMiB;

std::string FormatBytes(int64_t bytes);    // "3.9 GiB", "371 MiB", "36 KiB", "12 B"
std::string FormatMiB(int64_t bytes);      // "370.9"
std::string FormatTokens(int64_t tokens);  // "32K" for 32768, "32000" otherwise

}  // namespace kvtide::planner
