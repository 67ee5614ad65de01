// A BPE tokenizer: of a Hugging Face tokenizer.json (byte-level: GPT-2, Llama 3, Qwen, SmolLM and the like),
// or of the vocabulary in a GGUF file (the same, and SentencePiece vocabularies with scores: Llama 2, Gemma).
// Text is split by regular expressions with Unicode classes and the bytes of each piece are merged by rank;
// with scores whole characters are merged by score and what the vocabulary lacks is spelt in bytes. Encode
// adds no special tokens by itself but recognises the added tokens of the file in the text when asked.
// Immutable after Load; Encode and Decode may run on any number of threads.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "absl/status/statusor.h"
#include "planner/model/gguf.h"

namespace kvtide::engine {

class Tokenizer {
 public:
  // Reads FOLDER/tokenizer.json (and add_bos_token of tokenizer_config.json), or the vocabulary of a GGUF
  // file. UNIMPLEMENTED names a part that is not understood.
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Load(const std::string& path);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> OfGguf(const planner::GgufFile& file);
  static absl::StatusOr<std::unique_ptr<Tokenizer>> Parse(std::string_view json_text);
  ~Tokenizer();

  // How the content of added tokens such as <s> in a text is read.
  enum class AddedTokens { kRecognise, kPlainText };
  // INVALID_ARGUMENT when the text is not UTF-8 (with the byte's position) or has bytes the vocabulary cannot
  // spell.
  absl::StatusOr<std::vector<int32_t>> Encode(std::string_view text,
                                              AddedTokens added = AddedTokens::kPlainText) const;

  // The bytes of the tokens, added tokens as their content, unknown ids as nothing. A character may be cut at
  // the end when its tokens are; TextStream holds such bytes back.
  std::string Decode(std::span<const int32_t> tokens) const;

  int vocab_size() const;
  // The token that texts for this model start with: what the tokenizer says, whatever config.json calls its
  // BOS. -1 = none.
  int32_t bos() const;
  // Encode, with bos() in front if there is one.
  absl::StatusOr<std::vector<int32_t>> EncodeText(std::string_view text) const;

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Turns tokens into text as they come; whole UTF-8 characters only, the rest waits for the next token.
class TextStream {
 public:
  explicit TextStream(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}
  std::string Add(int32_t token);
  // What is left at the end, even if it is a cut character.
  std::string Finish();

 private:
  const Tokenizer& tokenizer_;
  std::string pending_;
};

}  // namespace kvtide::engine
