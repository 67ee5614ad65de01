// Commands as main.cc runs them: their words parsed, what they print caught.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "gtest/gtest.h"

namespace kvtide::cli {

struct Outcome {
  int exit_code = -1;
  std::string out, err;
};

// `add(app, exit_code)` adds the commands; words that do not parse end with 2.
template <class Add>
Outcome RunWords(std::vector<std::string> words, const Add& add) {
  CLI::App app("test", "kvtide");
  Outcome outcome;
  add(app, &outcome.exit_code);
  std::reverse(words.begin(), words.end());
  testing::internal::CaptureStdout();
  testing::internal::CaptureStderr();
  try {
    app.parse(words);
  } catch (const CLI::ParseError& error) {
    outcome.exit_code = 2;
  }
  outcome.out = testing::internal::GetCapturedStdout();
  outcome.err = testing::internal::GetCapturedStderr();
  return outcome;
}

}  // namespace kvtide::cli
