#include "clients/engine/tokenizer.h"

#include <algorithm>
#include <array>
#include <fstream>
#include <queue>
#include <sstream>
#include <unordered_map>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "clients/engine/text_splitter.h"
#include "clients/engine/utf8.h"
#include "kernels/base/status.h"
#include "nlohmann/json.hpp"

namespace kvtide::engine {
namespace {

using nlohmann::json;

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
  bool add_prefix_space = false;
  bool ignore_merges = false;
  bool adds_bos = false;

  absl::Status ReadModel(const json& model);
  absl::Status ReadMerges(const json& merges, const absl::flat_hash_map<std::string, int32_t>& ids);
  absl::Status ReadPreTokenizer(const json& part);
  absl::Status ReadNormalizer(const json& part);
  absl::Status ReadAddedTokens(const json& list);
  void ReadPostProcessor(const json& part);

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
  } else {
    return Unsupported(absl::StrCat("the pre_tokenizer \"", type, "\""));
  }
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
  adds_bos =
      !part["single"].empty() && part["single"][0].is_object() && part["single"][0].contains("SpecialToken");
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
  const int32_t size = static_cast<int32_t>(piece.size());
  std::vector<Part> parts(piece.size());
  for (int32_t i = 0; i < size; ++i) {
    const int32_t token = byte_token[static_cast<uint8_t>(piece[i])];
    if (token < 0)
      return absl::InvalidArgumentError("the vocabulary of tokenizer.json lacks a byte of the text");
    parts[i] = {token, i - 1, i + 1 < size ? i + 1 : -1};
  }
  std::priority_queue<Candidate> heap;
  const auto consider = [&](int32_t left) {
    if (left < 0 || parts[left].next < 0) return;
    const int32_t a = parts[left].token, b = parts[parts[left].next].token;
    const auto merge = merges.find(PairKey(a, b));
    if (merge != merges.end()) heap.push({merge->second.rank, left, a, b, merge->second.result});
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

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
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

absl::StatusOr<std::unique_ptr<Tokenizer>> Tokenizer::Load(const std::string& folder) {
  const std::string path = absl::StrCat(folder, "/tokenizer.json");
  std::ifstream in(path, std::ios::binary);
  if (!in)
    return absl::NotFoundError(
        absl::StrCat("cannot open ", path, " (a Hugging Face model folder is expected)"));
  std::ostringstream text;
  text << in.rdbuf();
  auto tokenizer = Parse(text.str());
  if (!tokenizer.ok()) return Annotate(tokenizer.status(), folder);
  return tokenizer;
}

absl::StatusOr<std::vector<int32_t>> Tokenizer::Encode(std::string_view text, AddedTokens added) const {
  const size_t valid = ValidUtf8Prefix(text);
  if (valid != text.size()) {
    return absl::InvalidArgumentError(absl::StrCat("the text is not UTF-8 at byte ", valid));
  }
  std::vector<int32_t> out;
  size_t begin = 0;
  for (size_t at = 0; added == AddedTokens::kRecognise && at < text.size(); ++at) {
    for (const AddedToken& token : impl_->added) {
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
bool Tokenizer::adds_bos() const { return impl_->adds_bos; }

std::string TextStream::Add(int32_t token) {
  pending_ += tokenizer_.Decode({&token, 1});
  const size_t whole = CompleteUtf8Prefix(pending_);
  std::string ready = pending_.substr(0, whole);
  pending_.erase(0, whole);
  return ready;
}

std::string TextStream::Finish() { return std::exchange(pending_, std::string()); }

}  // namespace kvtide::engine
