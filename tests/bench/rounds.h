// The command line of a benchmark that goes several rounds and takes each case's best or middle one.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace kvtide::bench {

// What --json FILE and --rounds N say, given to run(rounds, json), whose answer is the exit status; 2 for
// other words.
template <class Run>
int RunRounds(int argc, char** argv, const char* name, int rounds, const Run& run) {
  std::string json;
  for (int i = 1; i < argc; i++) {
    if (std::strcmp(argv[i], "--json") == 0 && i + 1 < argc) {
      json = argv[++i];
    } else if (std::strcmp(argv[i], "--rounds") == 0 && i + 1 < argc && std::atoi(argv[i + 1]) > 0) {
      rounds = std::atoi(argv[++i]);
    } else {
      std::printf("usage: %s [--json FILE] [--rounds N]\n", name);
      return 2;
    }
  }
  return run(rounds, json);
}

}  // namespace kvtide::bench
