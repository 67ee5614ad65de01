// A needle in a haystack, for models that only continue text: lines such as "The secret code of the harbour
// is 4711 ." are planted in a long text at several depths; then the text goes on with the start of such a
// line, and the model says what follows. Found means that the number is the most likely continuation; the
// log-likelihood moves before that fails. A base model finds needles by copying, so what counts is the
// difference between a pair and f16.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "clients/engine/kv_store.h"
#include "clients/engine/llama_model.h"
#include "clients/engine/tokenizer.h"

namespace kvtide::cli {

struct NeedleScore {
  double depth = 0;  // 0 = start of the text, 1 = end
  int64_t asked = 0;
  int64_t found = 0;
  double log_likelihood = 0;  // mean over the number's tokens, nats
};

struct NeedleTask {
  std::vector<int32_t> haystack;                // tokens, needles included
  std::vector<double> depths;                   // of each needle
  std::vector<std::vector<int32_t>> questions;  // tokens that follow the haystack, one question per needle
  std::vector<std::vector<int32_t>> answers;
};

// `text_tokens` is the hay; the task fills at most `context` tokens. Same seed, same task.
absl::StatusOr<NeedleTask> MakeNeedleTask(const engine::Tokenizer& tokenizer,
                                          std::span<const int32_t> text_tokens, int context, int needles,
                                          uint64_t seed);

// Reads the haystack once, then asks each question on a fork of the sequence.
absl::StatusOr<std::vector<NeedleScore>> AskNeedles(const engine::LlamaModel& model, engine::KvStore& store,
                                                    const NeedleTask& task, int chunk);

}  // namespace kvtide::cli
