// Splits text into the pieces that BPE works on, by regular expressions with Unicode classes (PCRE2).
// Unmatched stretches are pieces of their own. Immutable after Create; Split may run on any number of
// threads.
#pragma once

#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace kvtide::engine {

// The splitting rule of GPT-2: contractions, then words, numbers and other signs each with one leading space,
// then white space.
extern const char kGpt2Pattern[];

class TextSplitter {
 public:
  static absl::StatusOr<std::unique_ptr<TextSplitter>> Create(const std::string& pattern);
  ~TextSplitter();

  // Appends the pieces of `text` (valid UTF-8) in order; together they are the text.
  absl::Status Split(std::string_view text, std::vector<std::string_view>* pieces) const;
  // The byte where the first match starts, or npos.
  absl::StatusOr<size_t> Find(std::string_view text) const;

 private:
  struct Code;
  explicit TextSplitter(std::unique_ptr<Code> code);
  std::unique_ptr<Code> code_;
};

}  // namespace kvtide::engine
