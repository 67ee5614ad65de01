#include "clients/engine/tokenizer.h"

#include <algorithm>
#include <array>
#include <cstdio>
#include <fstream>
#include <functional>
#include <queue>
#include <sstream>
#include <unordered_map>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "clients/engine/model_files.h"
#include "clients/engine/text_splitter.h"
#include "clients/engine/utf8.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"

namespace kvtide::engine {
namespace {

using nlohmann::json;
using planner::GgufArray;
using planner::GgufFile;

const char kOneDigit[] = R"(\p{N})";

// The splitting rule of Llama 3 and Qwen 2, which differ in how many digits stand together.
std::string WordPattern(const std::string& digits) {
  return absl::StrCat(R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})", digits,
                      R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)");
}

// Byte-level BPE writes each byte as one printable character: printable Latin-1 bytes stand for themselves,
// the other 68 bytes take the characters from U+0100 on, in order.
struct ByteAlphabet {
  std::array<uint32_t, 256> character;
  std::unordered_map<uint32_t, uint8_t> byte;

  ByteAlphabet() {
    uint32_t next = 256;
    for (int b = 0; b < 256; ++b) {
      const bool printable = (b >= '!' && b <= '~') || (b >= 0xA1 && b <= 0xAC) || b >= 0xAE;
      character[b] = printable ? static_cast<uint32_t>(b) : next++;
      byte[character[b]] = static_cast<uint8_t>(b);
    }
  }
};

const ByteAlphabet& Alphabet() {
  static const ByteAlphabet alphabet;
  return alphabet;
}

// The bytes that a vocabulary entry stands for; false when it has characters outside the alphabet.
bool EntryBytes(std::string_view entry, std::string* bytes) {
  bytes->clear();
  size_t at = 0;
  while (at < entry.size()) {
    uint32_t character = 0;
    if (!NextCharacter(entry, &at, &character)) return false;
    const auto found = Alphabet().byte.find(character);
    if (found == Alphabet().byte.end()) return false;
    bytes->push_back(static_cast<char>(found->second));
  }
  return true;
}

uint64_t PairKey(int32_t left, int32_t right) {
  return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
}

struct Merge {
  int32_t rank;
  int32_t result;
};

absl::Status Unsupported(const std::string& what) {
  return absl::UnimplementedError(
      absl::StrCat("tokenizer.json: ", what, " is not supported; byte-level BPE is"));
}

absl::Status Malformed(const std::string& what) {
  return absl::InvalidArgumentError(absl::StrCat("tokenizer.json: ", what));
}

// Values of another type read as the fallback.
bool FlagOr(const json& part, const char* key, bool fallback) {
  return part.is_object() && part.contains(key) && part[key].is_boolean() ? part[key].get<bool>() : fallback;
}
std::string TextOr(const json& part, const char* key, const char* fallback) {
  return part.is_object() && part.contains(key) && part[key].is_string() ? part[key].get<std::string>()
                                                                         : fallback;
}

struct AddedToken {
  std::string content;
  int32_t id;
  bool always = false;  // read as a token in plain text too (SentencePiece's user-defined symbols)
};

}  // namespace

struct Tokenizer::Impl {
  std::vector<std::string> token_bytes;             // by id; empty for ids that do not exist
  absl::flat_hash_map<std::string, int32_t> whole;  // bytes -> id, for ignore_merges
  absl::flat_hash_map<uint64_t, Merge> merges;      // two ids -> rank and result
  std::array<int32_t, 256> byte_token;              // -1: the vocabulary has no such byte
  std::vector<std::unique_ptr<TextSplitter>> splitters;
  std::unique_ptr<TextSplitter> needs_normalising;  // set when the file asks for NFC
  std::vector<AddedToken> added;                    // longest first
  std::array<bool, 256> starts{};                   // bytes that an added token begins with
  bool add_prefix_space = false;
  bool ignore_merges = false;
  int32_t bos = -1;
  std::vector<int32_t> score_rank;  // by id, of a vocabulary with scores; then `merges` is empty

  absl::Status ReadModel(const json& model);
  absl::Status ReadMerges(const json& merges, const absl::flat_hash_map<std::string, int32_t>& ids);
  absl::Status ReadPreTokenizer(const json& part);
  absl::Status ReadNormalizer(const json& part);
  absl::Status ReadAddedTokens(const json& list);
  void ReadPostProcessor(const json& part);
  absl::Status ReadConfig(const json& config);
  absl::Status ReadGguf(const GgufFile& file);
  absl::Status ReadGgufMerges(const GgufFile& file, const std::vector<std::string>& tokens);
  void ReadScores(const std::vector<float>& scores);
  absl::Status AddSplitter(const std::string& pattern);
  Merge FindMerge(int32_t left, int32_t right) const;  // result -1: none

  absl::Status EncodeStretch(std::string_view text, std::vector<int32_t>* out) const;
  absl::Status EncodePiece(std::string_view piece, std::vector<int32_t>* out) const;
};

absl::Status Tokenizer::Impl::ReadModel(const json& model) {
  if (TextOr(model, "type", "") != "BPE" && !(model.is_object() && model.contains("merges"))) {
    return Unsupported(absl::StrCat("the model type \"", TextOr(model, "type", ""), "\""));
  }
  if (FlagOr(model, "byte_fallback", false)) return Unsupported("byte_fallback (SentencePiece)");
  for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!TextOr(model, key, "").empty()) return Unsupported(key);
  }
  ignore_merges = FlagOr(model, "ignore_merges", false);
  if (!model.contains("vocab") || !model["vocab"].is_object()) return Malformed("model.vocab is missing");
  absl::flat_hash_map<std::string, int32_t> ids;
  byte_token.fill(-1);
  std::string bytes;
  for (const auto& item : model["vocab"].items()) {
    if (!item.value().is_number_unsigned() || item.value().get<uint64_t>() > (1u << 24)) {
      return Malformed(absl::StrCat("the id of ", item.key(), " is not a small count"));
    }
    const int32_t id = item.value().get<int32_t>();
    if (static_cast<size_t>(id) >= token_bytes.size()) token_bytes.resize(id + 1);
    // Special tokens may use any character; they stand for their own text.
    if (!EntryBytes(item.key(), &bytes)) bytes = item.key();
    token_bytes[id] = bytes;
    whole.emplace(bytes, id);
    if (bytes.size() == 1) byte_token[static_cast<uint8_t>(bytes[0])] = id;
    ids.emplace(item.key(), id);
  }
  if (!model.contains("merges") || !model["merges"].is_array()) return Malformed("model.merges is missing");
  return ReadMerges(model["merges"], ids);
}

absl::Status Tokenizer::Impl::ReadMerges(const json& list,
                                         const absl::flat_hash_map<std::string, int32_t>& ids) {
  int32_t rank = 0;
  for (const json& entry : list) {
    std::string left, right;
    if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string()) {
      left = entry[0].get<std::string>();
      right = entry[1].get<std::string>();
    } else if (entry.is_string()) {  // the older form: "left right"
      const std::string both = entry.get<std::string>();
      const size_t space = both.find(' ');
      if (space == std::string::npos) return Malformed(absl::StrCat("merge ", rank, " has one part"));
      left = both.substr(0, space);
      right = both.substr(space + 1);
    } else {
      return Malformed(absl::StrCat("merge ", rank, " is not two parts"));
    }
    const auto l = ids.find(left), r = ids.find(right), result = ids.find(left + right);
    if (l == ids.end() || r == ids.end() || result == ids.end()) {
      return Malformed(
          absl::StrCat("merge ", rank, " (", left, " ", right, ") uses parts that the vocabulary lacks"));
    }
    merges.emplace(PairKey(l->second, r->second), Merge{rank, result->second});
    ++rank;
  }
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::ReadPreTokenizer(const json& part) {
  const std::string type = TextOr(part, "type", "");
  if (type == "Sequence") {
    if (!part.contains("pretokenizers") || !part["pretokenizers"].is_array())
      return Malformed("an empty pre_tokenizer");
    for (const json& inner : part["pretokenizers"]) KVTIDE_RETURN_IF_ERROR(ReadPreTokenizer(inner));
    return absl::OkStatus();
  }
  std::string pattern;
  if (type == "ByteLevel") {
    add_prefix_space = FlagOr(part, "add_prefix_space", false);
    if (!FlagOr(part, "use_regex", true)) return absl::OkStatus();
    pattern = kGpt2Pattern;
  } else if (type == "Split") {
    const json& rule = part.contains("pattern") ? part["pattern"] : part;
    if (!rule.is_object() || !rule.contains("Regex") || !rule["Regex"].is_string())
      return Unsupported("a Split without Regex");
    if (TextOr(part, "behavior", "") != "Isolated" || FlagOr(part, "invert", false))
      return Unsupported("a Split that is not Isolated");
    pattern = rule["Regex"].get<std::string>();
  } else if (type == "Digits") {  // characters of the class N, each by itself or in runs
    pattern = FlagOr(part, "individual_digits", false) ? kOneDigit : R"(\p{N}+)";
  } else {
    return Unsupported(absl::StrCat("the pre_tokenizer \"", type, "\""));
  }
  return AddSplitter(pattern);
}

absl::Status Tokenizer::Impl::AddSplitter(const std::string& pattern) {
  KVTIDE_ASSIGN_OR_RETURN(std::unique_ptr<TextSplitter> splitter, TextSplitter::Create(pattern));
  splitters.push_back(std::move(splitter));
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::ReadNormalizer(const json& part) {
  if (part.is_null()) return absl::OkStatus();
  if (TextOr(part, "type", "") != "NFC")
    return Unsupported(absl::StrCat("the normalizer \"", TextOr(part, "type", ""), "\""));
  // Text without combining marks, Hangul letters and compatibility characters is in NFC already; other text
  // is refused in Encode rather than tokenised differently from the model's own tokenizer.
  KVTIDE_ASSIGN_OR_RETURN(
      needs_normalising,
      TextSplitter::Create(
          R"([\p{M}\x{1100}-\x{11FF}\x{2126}\x{212A}\x{212B}\x{2329}\x{232A}\x{F900}-\x{FAFF}\x{2F800}-\x{2FA1F}])"));
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::ReadAddedTokens(const json& list) {
  for (const json& entry : list) {
    if (!entry.is_object() || !entry.contains("id") || !entry["id"].is_number_unsigned() ||
        !entry.contains("content") || !entry["content"].is_string() ||
        entry["id"].get<uint64_t>() > (1u << 24)) {
      return Malformed("an added token lacks id or content");
    }
    AddedToken token{entry["content"].get<std::string>(), entry["id"].get<int32_t>()};
    if (token.content.empty()) return Malformed("an added token is empty");
    if (static_cast<size_t>(token.id) >= token_bytes.size()) token_bytes.resize(token.id + 1);
    token_bytes[token.id] = token.content;
    added.push_back(std::move(token));
  }
  std::stable_sort(added.begin(), added.end(), [](const AddedToken& a, const AddedToken& b) {
    return a.content.size() > b.content.size();
  });
  return absl::OkStatus();
}

void Tokenizer::Impl::ReadPostProcessor(const json& part) {
  if (TextOr(part, "type", "") == "Sequence" && part.contains("processors") &&
      part["processors"].is_array()) {
    for (const json& inner : part["processors"]) ReadPostProcessor(inner);
  }
  if (TextOr(part, "type", "") != "TemplateProcessing" || !part.contains("single") ||
      !part["single"].is_array())
    return;
  if (part["single"].empty() || !part["single"][0].is_object() || !part["single"][0].contains("SpecialToken"))
    return;
  const std::string name = TextOr(part["single"][0]["SpecialToken"], "id", "");
  for (const AddedToken& token : added)
    if (token.content == name) bos = token.id;
}

// What tokenizer_config.json says of BOS, where the post-processor says nothing.
absl::Status Tokenizer::Impl::ReadConfig(const json& config) {
  if (bos >= 0 || !FlagOr(config, "add_bos_token", false)) return absl::OkStatus();
  std::string name = TextOr(config, "bos_token", "");
  if (name.empty() && config.contains("bos_token")) name = TextOr(config["bos_token"], "content", "");
  for (const AddedToken& token : added)
    if (token.content == name) bos = token.id;
  if (bos < 0)
    return absl::InvalidArgumentError(absl::StrCat(
        "tokenizer_config.json: add_bos_token is true, but bos_token \"", name, "\" is no added token"));
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::ReadGguf(const GgufFile& file) {
  const auto array = [&](const char* key) -> const GgufArray* {
    const auto found = file.metadata.find(key);
    return found == file.metadata.end() ? nullptr : std::get_if<GgufArray>(&found->second);
  };
  const auto text = [&](const char* key) -> std::string {
    const auto found = file.metadata.find(key);
    const std::string* value =
        found == file.metadata.end() ? nullptr : std::get_if<std::string>(&found->second);
    return value == nullptr ? "" : *value;
  };
  const std::string model = text("tokenizer.ggml.model"), pre = text("tokenizer.ggml.pre");
  const GgufArray *tokens = array("tokenizer.ggml.tokens"), *types = array("tokenizer.ggml.token_type"),
                  *scores = array("tokenizer.ggml.scores");
  if (model != "gpt2" && model != "llama")
    return absl::UnimplementedError(
        absl::StrCat("GGUF: the tokenizer \"", model, "\" is not supported; gpt2 and llama are"));
  if (tokens == nullptr || tokens->strings.empty() || tokens->strings.size() > (1u << 24))
    return absl::InvalidArgumentError("GGUF: tokenizer.ggml.tokens is missing");
  const size_t count = tokens->strings.size();
  if (types != nullptr && types->integers.size() != count)
    return absl::InvalidArgumentError(
        "GGUF: tokenizer.ggml.token_type is not as long as tokenizer.ggml.tokens");
  const bool by_scores = model == "llama";
  if (by_scores && (scores == nullptr || scores->floats.size() != count))
    return absl::InvalidArgumentError("GGUF: tokenizer.ggml.scores is not as long as tokenizer.ggml.tokens");
  enum { kNormal = 1, kControl = 3, kUserDefined = 4, kByte = 6 };
  byte_token.fill(-1);
  token_bytes.resize(count);
  for (size_t id = 0; id < count; ++id) {
    const std::string& token = tokens->strings[id];
    const int64_t type = types == nullptr ? int64_t{kNormal} : types->integers[id];
    std::string bytes = token;
    if (by_scores && type == kByte) {
      unsigned value = 0;  // <0x0A>
      if (token.size() != 6 || std::sscanf(token.c_str(), "<0x%2x>", &value) != 1)
        return absl::InvalidArgumentError(absl::StrCat("GGUF: the byte token \"", token, "\" is no byte"));
      byte_token[static_cast<size_t>(value)] = static_cast<int32_t>(id);
      token_bytes[id] = std::string(1, static_cast<char>(value));
      continue;
    }
    if (by_scores) {
      bytes = absl::StrReplaceAll(token, {{"\xE2\x96\x81", " "}});
    } else if (type == kNormal && !EntryBytes(token, &bytes)) {
      bytes = token;
    }
    token_bytes[id] = bytes;
    if (type == kControl || type == kUserDefined) {
      if (!bytes.empty())
        added.push_back({bytes, static_cast<int32_t>(id), by_scores && type == kUserDefined});
      if (type == kControl) continue;
    }
    whole.emplace(bytes, static_cast<int32_t>(id));
    if (!by_scores && bytes.size() == 1)
      byte_token[static_cast<uint8_t>(bytes[0])] = static_cast<int32_t>(id);
  }
  std::stable_sort(added.begin(), added.end(), [](const AddedToken& a, const AddedToken& b) {
    return a.content.size() > b.content.size();
  });
  KVTIDE_ASSIGN_OR_RETURN(const int64_t space, file.Integer("tokenizer.ggml.add_space_prefix", by_scores));
  add_prefix_space = space != 0;
  KVTIDE_ASSIGN_OR_RETURN(const int64_t adds, file.Integer("tokenizer.ggml.add_bos_token",
                                                           by_scores || absl::StartsWith(pre, "llama")));
  KVTIDE_ASSIGN_OR_RETURN(const int64_t id, file.Integer("tokenizer.ggml.bos_token_id", -1));
  if (adds != 0 && id >= 0 && id < static_cast<int64_t>(count)) bos = static_cast<int32_t>(id);
  if (by_scores) {
    ReadScores(scores->floats);
    return absl::OkStatus();
  }
  if (pre == "smollm") {
    KVTIDE_RETURN_IF_ERROR(AddSplitter(kOneDigit));
    KVTIDE_RETURN_IF_ERROR(AddSplitter(kGpt2Pattern));
  } else if (pre == "gpt-2") {
    KVTIDE_RETURN_IF_ERROR(AddSplitter(kGpt2Pattern));
  } else if (pre == "llama-bpe" || pre == "llama3" || pre == "llama-v3") {
    ignore_merges = true;
    KVTIDE_RETURN_IF_ERROR(AddSplitter(WordPattern("{1,3}")));
  } else if (pre == "qwen2") {
    KVTIDE_RETURN_IF_ERROR(ReadNormalizer({{"type", "NFC"}}));
    KVTIDE_RETURN_IF_ERROR(AddSplitter(WordPattern("")));
  } else {
    return absl::UnimplementedError(absl::StrCat(
        "GGUF: the splitting rule \"", pre, "\" is not supported (gpt-2, smollm, llama-bpe and qwen2 are)"));
  }
  return ReadGgufMerges(file, tokens->strings);
}

absl::Status Tokenizer::Impl::ReadGgufMerges(const GgufFile& file, const std::vector<std::string>& tokens) {
  const auto found = file.metadata.find("tokenizer.ggml.merges");
  const GgufArray* list = found == file.metadata.end() ? nullptr : std::get_if<GgufArray>(&found->second);
  if (list == nullptr) return absl::InvalidArgumentError("GGUF: tokenizer.ggml.merges is missing");
  absl::flat_hash_map<std::string, int32_t> ids;
  for (size_t id = 0; id < tokens.size(); ++id) ids.emplace(tokens[id], static_cast<int32_t>(id));
  json entries = json::array();
  for (const std::string& merge : list->strings) entries.push_back(merge);
  return ReadMerges(entries, ids);
}

// Higher scores merge first.
void Tokenizer::Impl::ReadScores(const std::vector<float>& scores) {
  std::vector<float> order = scores;
  std::sort(order.begin(), order.end(), std::greater<>());
  order.erase(std::unique(order.begin(), order.end()), order.end());
  for (const float score : scores)
    score_rank.push_back(static_cast<int32_t>(
        std::lower_bound(order.begin(), order.end(), score, std::greater<>()) - order.begin()));
}

Merge Tokenizer::Impl::FindMerge(int32_t left, int32_t right) const {
  if (score_rank.empty()) {
    const auto found = merges.find(PairKey(left, right));
    return found == merges.end() ? Merge{0, -1} : found->second;
  }
  const auto found = whole.find(
      absl::StrCat(token_bytes[static_cast<size_t>(left)], token_bytes[static_cast<size_t>(right)]));
  if (found == whole.end()) return {0, -1};
  return {score_rank[static_cast<size_t>(found->second)], found->second};
}

absl::Status Tokenizer::Impl::EncodePiece(std::string_view piece, std::vector<int32_t>* out) const {
  if (ignore_merges) {
    const auto found = whole.find(absl::string_view(piece.data(), piece.size()));
    if (found != whole.end()) {
      out->push_back(found->second);
      return absl::OkStatus();
    }
  }
  // A doubly linked list of parts, and a heap of possible merges, lowest rank first and leftmost among
  // equals: long pieces (a megabyte of one letter) stay fast. Entries of the heap that an earlier merge
  // changed are skipped.
  struct Part {
    int32_t token, previous, next;
  };
  struct Candidate {
    int32_t rank, position, left, right, result;
    bool operator<(const Candidate& o) const {
      return rank != o.rank ? rank > o.rank : position > o.position;
    }
  };
  std::vector<int32_t> first;  // bytes, or characters that the vocabulary has
  for (size_t at = 0; at < piece.size();) {
    size_t next = at + 1;
    if (!score_rank.empty()) {
      uint32_t character = 0;
      size_t end = at;
      if (NextCharacter(piece, &end, &character)) next = end;
      const auto found = whole.find(absl::string_view(piece.data() + at, next - at));
      if (found != whole.end()) {
        first.push_back(found->second);
        at = next;
        continue;
      }
    }
    for (; at < next; ++at) {
      const int32_t token = byte_token[static_cast<uint8_t>(piece[at])];
      if (token < 0)
        return absl::InvalidArgumentError("the vocabulary of the tokenizer lacks a byte of the text");
      first.push_back(token);
    }
  }
  const int32_t size = static_cast<int32_t>(first.size());
  std::vector<Part> parts(first.size());
  for (int32_t i = 0; i < size; ++i) parts[i] = {first[i], i - 1, i + 1 < size ? i + 1 : -1};
  std::priority_queue<Candidate> heap;
  const auto consider = [&](int32_t left) {
    if (left < 0 || parts[left].next < 0) return;
    const int32_t a = parts[left].token, b = parts[parts[left].next].token;
    const Merge merge = FindMerge(a, b);
    if (merge.result >= 0) heap.push({merge.rank, left, a, b, merge.result});
  };
  for (int32_t i = 0; i + 1 < size; ++i) consider(i);
  while (!heap.empty()) {
    const Candidate best = heap.top();
    heap.pop();
    Part& left = parts[best.position];
    if (left.token != best.left || left.next < 0 || parts[left.next].token != best.right) continue;
    Part& right = parts[left.next];
    left.token = best.result;
    left.next = right.next;
    right.token = -1;  // gone
    if (left.next >= 0) parts[left.next].previous = best.position;
    consider(left.previous);
    consider(best.position);
  }
  for (int32_t i = 0; i >= 0 && size > 0; i = parts[i].next) out->push_back(parts[i].token);
  return absl::OkStatus();
}

absl::Status Tokenizer::Impl::EncodeStretch(std::string_view text, std::vector<int32_t>* out) const {
  if (text.empty()) return absl::OkStatus();
  if (needs_normalising != nullptr) {
    KVTIDE_ASSIGN_OR_RETURN(const size_t at, needs_normalising->Find(text));
    if (at != std::string_view::npos) {
      return absl::InvalidArgumentError(
          absl::StrCat("byte ", at,
                       " of the text may not be in Unicode NFC, which this model's "
                       "tokenizer asks for; normalise the text first (uconv -x any-nfc)"));
    }
  }
  std::string with_space;
  if (add_prefix_space && text[0] != ' ') {
    with_space = absl::StrCat(" ", std::string(text));
    text = with_space;
  }
  std::vector<std::string_view> pieces = {text};
  for (const auto& splitter : splitters) {
    std::vector<std::string_view> finer;
    for (const std::string_view piece : pieces) KVTIDE_RETURN_IF_ERROR(splitter->Split(piece, &finer));
    pieces = std::move(finer);
  }
  // Words repeat: each is merged once per call.
  std::unordered_map<std::string_view, std::pair<size_t, size_t>> seen;
  for (const std::string_view piece : pieces) {
    const auto [entry, is_new] = seen.try_emplace(piece, out->size(), 0);
    if (is_new) {
      KVTIDE_RETURN_IF_ERROR(EncodePiece(piece, out));
      entry->second.second = out->size() - entry->second.first;
    } else {
      for (size_t i = 0; i < entry->second.second; ++i) out->push_back((*out)[entry->second.first + i]);
    }
  }
  return absl::OkStatus();
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {
  for (const AddedToken& token : impl_->added) impl_->starts[static_cast<uint8_t>(token.content[0])] = true;
}
Tokenizer::~Tokenizer() = default;

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Parse(std::string_view json_text) {
  const json file = json::parse(json_text.begin(), json_text.end(), nullptr, /*allow_exceptions=*/false);
  if (!file.is_object() || !file.contains("model")) return Malformed("not a JSON object with a model");
  auto impl = std::make_unique<Impl>();
  KVTIDE_RETURN_IF_ERROR(impl->ReadModel(file["model"]));
  if (!file.contains("pre_tokenizer") || file["pre_tokenizer"].is_null())
    return Unsupported("a missing pre_tokenizer");
  KVTIDE_RETURN_IF_ERROR(impl->ReadPreTokenizer(file["pre_tokenizer"]));
  if (file.contains("normalizer")) KVTIDE_RETURN_IF_ERROR(impl->ReadNormalizer(file["normalizer"]));
  if (file.contains("added_tokens") && file["added_tokens"].is_array()) {
    KVTIDE_RETURN_IF_ERROR(impl->ReadAddedTokens(file["added_tokens"]));
  }
  if (file.contains("post_processor")) impl->ReadPostProcessor(file["post_processor"]);
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(impl)));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::OfGguf(const GgufFile& file) {
  auto impl = std::make_unique<Impl>();
  KVTIDE_RETURN_IF_ERROR(impl->ReadGguf(file));
  return std::unique_ptr<Tokenizer>(new Tokenizer(std::move(impl)));
}

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& path) {
  if (IsGguf(path)) {
    KVTIDE_ASSIGN_OR_RETURN(const GgufFile file, planner::ReadGguf(path, planner::GgufKeep::kVocabulary));
    auto tokenizer = OfGguf(file);
    if (!tokenizer.ok()) return Annotate(tokenizer.status(), path);
    return tokenizer;
  }
  const auto read = [](const std::string& file, std::string* text) {
    std::ifstream in(file, std::ios::binary);
    if (!in) return false;
    std::ostringstream all;
    all << in.rdbuf();
    *text = all.str();
    return true;
  };
  std::string text;
  if (!read(absl::StrCat(path, "/tokenizer.json"), &text))
    return absl::NotFoundError(absl::StrCat(
        "cannot open ", path, "/tokenizer.json (a Hugging Face model folder or a GGUF file is expected)"));
  auto tokenizer = Parse(text);
  if (!tokenizer.ok()) return Annotate(tokenizer.status(), path);
  if (read(absl::StrCat(path, "/tokenizer_config.json"), &text)) {
    const json config = json::parse(text, nullptr, /*allow_exceptions=*/false);
    const absl::Status status = (*tokenizer)->impl_->ReadConfig(config);
    if (!status.ok()) return Annotate(status, path);
  }
  return tokenizer;
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, AddedTokens added) const {
  const size_t valid = ValidUtf8Prefix(text);
  if (valid != text.size()) {
    return absl::InvalidArgumentError(absl::StrCat("the text is not UTF-8 at byte ", valid));
  }
  std::vector<int32_t> out;
  size_t begin = 0;
  const bool all = added == AddedTokens::kRecognise;
  const bool any = std::any_of(impl_->added.begin(), impl_->added.end(),
                               [&](const AddedToken& token) { return all || token.always; });
  for (size_t at = 0; any && at < text.size(); ++at) {
    if (!impl_->starts[static_cast<uint8_t>(text[at])]) continue;
    for (const AddedToken& token : impl_->added) {
      if (!all && !token.always) continue;
      if (text.compare(at, token.content.size(), token.content) != 0) continue;
      KVTIDE_RETURN_IF_ERROR(impl_->EncodeStretch(text.substr(begin, at - begin), &out));
      out.push_back(token.id);
      begin = at + token.content.size();
      at = begin - 1;
      break;
    }
  }
  KVTIDE_RETURN_IF_ERROR(impl_->EncodeStretch(text.substr(begin), &out));
  return out;
}

std::string Tokenizer::Decode(std::span<const int32_t> tokens) const {
  std::string out;
  for (const int32_t token : tokens) {
    if (token >= 0 && static_cast<size_t>(token) < impl_->token_bytes.size())
      out += impl_->token_bytes[token];
  }
  return out;
}

int Tokenizer::vocab_size() const { return static_cast<int>(impl_->token_bytes.size()); }
int32_t Tokenizer::bos() const { return impl_->bos; }

absl::StatusOr<std::vector<int32_t>> Tokenizer::EncodeText(std::string_view text) const {
  KVTIDE_ASSIGN_OR_RETURN(std::vector<int32_t> tokens, Encode(text));
  if (bos() >= 0) tokens.insert(tokens.begin(), bos());
  return tokens;
}

std::string TextStream::Add(int32_t token) {
  pending_ += tokenizer_.Decode({&token, 1});
  const size_t whole = CompleteUtf8Prefix(pending_);
  std::string ready = pending_.substr(0, whole);
  pending_.erase(0, whole);
  return ready;
}

std::string TextStream::Finish() { return std::exchange(pending_, std::string()); }

}  // namespace kvtide::engine
