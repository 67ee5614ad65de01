// What every report says about its run beside the numbers.
#pragma once

#include <string>

namespace kvtide::cli {

std::string Today();    // 2026-11-22, UTC
std::string Machine();  // "AMD EPYC, 2 cores"

}  // namespace kvtide::cli
