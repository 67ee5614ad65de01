#define PCRE2_CODE_UNIT_WIDTH 8
#include "clients/engine/text_splitter.h"

#include <pcre2.h>

#include <utility>

#include "absl/strings/str_cat.h"

namespace kvtide::engine {

const char kGpt2Pattern[] = R"('(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\p{White_Space}\p{L}\p{N}]+)"
                            R"(|\p{White_Space}+(?!\P{White_Space})|\p{White_Space}+)";

namespace {

std::string Pcre2Message(int code) {
  PCRE2_UCHAR text[256];
  pcre2_get_error_message(code, text, sizeof(text));
  return std::string(reinterpret_cast<const char*>(text));
}

struct MatchData {
  explicit MatchData(const pcre2_code* code) : data(pcre2_match_data_create_from_pattern(code, nullptr)) {}
  ~MatchData() { pcre2_match_data_free(data); }
  MatchData(const MatchData&) = delete;
  MatchData& operator=(const MatchData&) = delete;
  pcre2_match_data* data;
};

}  // namespace

struct TextSplitter::Code {
  pcre2_code* code = nullptr;
  ~Code() { pcre2_code_free(code); }

  // The next match at or after `from`; first == npos when there is none.
  absl::StatusOr<std::pair<size_t, size_t>> Next(const MatchData& match, std::string_view text,
                                                 size_t from) const {
    const int result = pcre2_match(code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from,
                                   PCRE2_NO_UTF_CHECK, match.data, nullptr);
    if (result == PCRE2_ERROR_NOMATCH) return std::make_pair(std::string_view::npos, std::string_view::npos);
    if (result < 0) return absl::InternalError(absl::StrCat("splitting text: ", Pcre2Message(result)));
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match.data);
    return std::make_pair(static_cast<size_t>(range[0]), static_cast<size_t>(range[1]));
  }
};

TextSplitter::TextSplitter(std::unique_ptr<Code> code) : code_(std::move(code)) {}
TextSplitter::~TextSplitter() = default;

absl::StatusOr<std::unique_ptr<TextSplitter>> TextSplitter::Create(const std::string& pattern) {
  int error = 0;
  PCRE2_SIZE offset = 0;
  auto code = std::make_unique<Code>();
  // \s, \p and case folding by Unicode properties, as the tokenizers that wrote the files do.
  code->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(pattern.data()), pattern.size(),
                             PCRE2_UTF | PCRE2_UCP, &error, &offset, nullptr);
  if (code->code == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("splitting pattern, character ", offset, ": ", Pcre2Message(error)));
  }
  // Without the compiler of machine code the interpreter runs; it is slower and gives the same pieces.
  pcre2_jit_compile(code->code, PCRE2_JIT_COMPLETE);
  return std::unique_ptr<TextSplitter>(new TextSplitter(std::move(code)));
}

absl::Status TextSplitter::Split(std::string_view text, std::vector<std::string_view>* pieces) const {
  const MatchData match(code_->code);
  size_t done = 0;
  size_t from = 0;
  while (from < text.size()) {
    const auto found = code_->Next(match, text, from);
    if (!found.ok()) return found.status();
    const auto [begin, end] = *found;
    if (begin == std::string_view::npos) break;
    if (begin == end) {  // an empty match: go on after this character
      from = end + 1;
      while (from < text.size() && (static_cast<unsigned char>(text[from]) & 0xC0) == 0x80) ++from;
      continue;
    }
    if (begin > done) pieces->push_back(text.substr(done, begin - done));
    pieces->push_back(text.substr(begin, end - begin));
    done = from = end;
  }
  if (done < text.size()) pieces->push_back(text.substr(done));
  return absl::OkStatus();
}

absl::StatusOr<size_t> TextSplitter::Find(std::string_view text) const {
  const MatchData match(code_->code);
  const auto found = code_->Next(match, text, 0);
  if (!found.ok()) return found.status();
  return found->first;
}

}  // namespace kvtide::engine
