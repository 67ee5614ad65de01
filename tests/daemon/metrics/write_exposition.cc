// Writes what a busy daemon exposes to a file: write_exposition FILE.
#include <cstdio>
#include <fstream>

#include "tests/daemon/metrics/exposition.h"

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "usage: %s FILE\n", argv[0]);
    return 2;
  }
  std::ofstream file(argv[1]);
  file << kvtide::metrics::BusyMetrics()->Text();
  file.close();
  return file ? 0 : 1;
}
