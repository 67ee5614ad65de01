#include "clients/engine/tokenizer.h"

#include <cstdio>
#include <fstream>

#include "clients/engine/text_splitter.h"
#include "clients/engine/utf8.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "tests/clients/engine/test_gguf.h"

namespace kvtide::engine {
namespace {

using nlohmann::json;

constexpr char kModel[] = "clients/engine/models/tidelm-7m";
constexpr char kData[] = "tests/clients/engine/data/";

std::string ReadFile(const std::string& path) {
  std::ifstream in(path, std::ios::binary);
  return std::string(std::istreambuf_iterator<char>(in), {});
}

// The vectors were made by Hugging Face tokenizers 0.23.3.
void ExpectGolden(const Tokenizer& tokenizer, const std::string& file) {
  const json cases = json::parse(ReadFile(kData + file));
  ASSERT_GT(cases.size(), 60u);
  for (const json& c : cases) {
    const std::string text = c["text"];
    const auto ids = tokenizer.Encode(text, Tokenizer::AddedTokens::kRecognise);
    ASSERT_TRUE(ids.ok()) << ids.status() << " for " << c["text"].dump();
    EXPECT_EQ(*ids, c["ids"].get<std::vector<int32_t>>()) << c["text"].dump();
    EXPECT_EQ(tokenizer.Decode(*ids), text);
  }
}

TEST(TokenizerTest, AgreesWithTheGoldenVectorsOfTheBundledModel) {
  const auto tokenizer = Tokenizer::Load(kModel);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->vocab_size(), 4096);
  EXPECT_EQ((*tokenizer)->bos(), 0);
  ExpectGolden(**tokenizer, "tidelm_tokens.json");
}

TEST(TokenizerTest, AgreesWithTheGoldenVectorsOfALlama3StyleFile) {
  const auto tokenizer = Tokenizer::Parse(ReadFile(std::string(kData) + "llama3_style_tokenizer.json"));
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_GE((*tokenizer)->bos(), 0);
  ExpectGolden(**tokenizer, "llama3_style_tokens.json");
}

TEST(TokenizerTest, AddedTokensInATextArePlainUnlessAskedFor) {
  const auto tokenizer = Tokenizer::Load(kModel);
  ASSERT_TRUE(tokenizer.ok());
  EXPECT_THAT(*(*tokenizer)->Encode("<s>"), testing::Not(testing::Contains(0)));
  EXPECT_THAT(*(*tokenizer)->Encode("<s>", Tokenizer::AddedTokens::kRecognise), testing::ElementsAre(0));
}

// BOS is what the tokenizer says, not what config.json names.
TEST(TokenizerTest, BeginsWithBosOnlyWhereTheTokenizerSaysSo) {
  json file = json::parse(ReadFile(std::string(kModel) + "/tokenizer.json"));
  EXPECT_EQ((*Tokenizer::Parse(file.dump()))->bos(), -1);
  EXPECT_EQ(*(*Tokenizer::Parse(file.dump()))->EncodeText("a"),
            *(*Tokenizer::Parse(file.dump()))->Encode("a"));
  file["post_processor"] = {{"type", "TemplateProcessing"},
                            {"single",
                             {{{"SpecialToken", {{"id", "</s>"}, {"type_id", 0}}}},
                              {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}}};
  const auto tokenizer = *Tokenizer::Parse(file.dump());
  EXPECT_EQ(tokenizer->bos(), 1);
  EXPECT_EQ(tokenizer->EncodeText("a")->front(), 1);
}

// Digits of SmolLM: each by itself, then the bytes of GPT-2's rule.
TEST(TokenizerTest, SplitsDigitsBeforeTheBytes) {
  json file = json::parse(ReadFile(std::string(kModel) + "/tokenizer.json"));
  const json bytes = file["pre_tokenizer"];
  const auto with = [&](const json& first) {
    file["pre_tokenizer"] = {{"type", "Sequence"}, {"pretokenizers", {first, bytes}}};
    return *(*Tokenizer::Parse(file.dump()))->Encode("It was 1999, not 2024.");
  };
  const auto digits = with({{"type", "Digits"}, {"individual_digits", true}});
  EXPECT_EQ(digits, with({{"type", "Split"},
                          {"pattern", {{"Regex", "\\p{N}"}}},
                          {"behavior", "Isolated"},
                          {"invert", false}}));
  EXPECT_NE(digits, with({{"type", "Digits"}, {"individual_digits", false}}));
}

TEST(TokenizerTest, ReadsBytesFromAGgufFile) {
  GgufWriter file;
  std::vector<std::string> tokens = {"<|end|>", "a", "b", "1", "\u0120", "ab", "\u0120a"};
  file.Text("tokenizer.ggml.model", "gpt2");
  file.Text("tokenizer.ggml.pre", "smollm");
  file.Texts("tokenizer.ggml.tokens", tokens);
  file.Integers("tokenizer.ggml.token_type", {3, 1, 1, 1, 1, 1, 1});
  file.Texts("tokenizer.ggml.merges", {"a b", "\u0120 a"});
  file.Integer("tokenizer.ggml.bos_token_id", 0);
  const auto parsed = planner::ParseGguf(file.Bytes(), planner::GgufKeep::kVocabulary);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const auto tokenizer = Tokenizer::OfGguf(*parsed);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->bos(), -1);
  EXPECT_THAT(*(*tokenizer)->Encode("ab ab11"), testing::ElementsAre(5, 4, 5, 3, 3));
  EXPECT_THAT(*(*tokenizer)->Encode("<|end|>", Tokenizer::AddedTokens::kRecognise), testing::ElementsAre(0));
  EXPECT_EQ((*tokenizer)->Decode(std::vector<int32_t>{5, 4, 5, 3}), "ab ab1");
}

// Pieces with scores: the best score first, bytes for what the vocabulary lacks, user-defined symbols whole.
TEST(TokenizerTest, ReadsScoresFromAGgufFile) {
  GgufWriter file;
  std::vector<std::string> tokens = {"<bos>", "\u2581", "a", "b", "ab", "\u2581a", "bb", "<hr>"};
  std::vector<int32_t> types = {3, 1, 1, 1, 1, 1, 1, 4};
  std::vector<float> scores = {-1000, -1, -1, -1, -3, -2, -4, 0};
  for (int b = 0; b < 256; ++b) {
    char name[8];
    std::snprintf(name, sizeof(name), "<0x%02X>", b);
    tokens.push_back(name);
    types.push_back(6);
    scores.push_back(-1000);
  }
  file.Text("tokenizer.ggml.model", "llama");
  file.Texts("tokenizer.ggml.tokens", tokens);
  file.Integers("tokenizer.ggml.token_type", types);
  file.Numbers("tokenizer.ggml.scores", scores);
  file.Integer("tokenizer.ggml.bos_token_id", 0);
  file.Flag("tokenizer.ggml.add_space_prefix", false);
  const auto parsed = planner::ParseGguf(file.Bytes(), planner::GgufKeep::kVocabulary);
  ASSERT_TRUE(parsed.ok()) << parsed.status();
  const auto tokenizer = Tokenizer::OfGguf(*parsed);
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_EQ((*tokenizer)->bos(), 0);
  EXPECT_THAT(*(*tokenizer)->Encode("abb ab"), testing::ElementsAre(4, 3, 5, 3));
  EXPECT_THAT(*(*tokenizer)->Encode("a\u00e9"), testing::ElementsAre(2, 8 + 0xC3, 8 + 0xA9));
  EXPECT_THAT(*(*tokenizer)->Encode("a<hr>b<bos>"), testing::Contains(7));
  EXPECT_THAT(*(*tokenizer)->EncodeText("b"), testing::ElementsAre(0, 3));
  EXPECT_EQ((*tokenizer)->Decode(*(*tokenizer)->Encode("ab \u00e9 b")), "ab \u00e9 b");
}

TEST(TokenizerTest, NamesTheByteThatIsNotUtf8) {
  const auto tokenizer = Tokenizer::Load(kModel);
  ASSERT_TRUE(tokenizer.ok());
  const auto ids = (*tokenizer)->Encode("good \xff bad");
  EXPECT_EQ(ids.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(ids.status().message()), testing::HasSubstr("byte 5"));
}

TEST(TokenizerTest, AMegabyteOfOneLetterIsOnePieceAndStillFast) {
  const auto tokenizer = Tokenizer::Load(kModel);
  ASSERT_TRUE(tokenizer.ok());
  const std::string text(1 << 20, 'a');
  const auto ids = (*tokenizer)->Encode(text);
  ASSERT_TRUE(ids.ok());
  EXPECT_EQ((*tokenizer)->Decode(*ids), text);
}

TEST(TokenizerTest, RefusesByNameWhatIsNotByteLevelBpe) {
  json file = json::parse(ReadFile(std::string(kData) + "llama3_style_tokenizer.json"));
  json changed = file;
  changed["model"]["type"] = "Unigram";
  changed["model"].erase("merges");
  EXPECT_THAT(std::string(Tokenizer::Parse(changed.dump()).status().message()),
              testing::HasSubstr("Unigram"));
  changed = file;
  changed["model"]["byte_fallback"] = true;
  EXPECT_THAT(std::string(Tokenizer::Parse(changed.dump()).status().message()),
              testing::HasSubstr("byte_fallback"));
  changed = file;
  changed["pre_tokenizer"] = {{"type", "Metaspace"}};
  EXPECT_THAT(std::string(Tokenizer::Parse(changed.dump()).status().message()),
              testing::HasSubstr("Metaspace"));
  changed = file;
  changed["normalizer"] = {{"type", "Lowercase"}};
  EXPECT_THAT(std::string(Tokenizer::Parse(changed.dump()).status().message()),
              testing::HasSubstr("Lowercase"));
  EXPECT_FALSE(Tokenizer::Parse("not json").ok());
  EXPECT_FALSE(Tokenizer::Parse("{\"model\":{\"type\":\"BPE\",\"vocab\":{\"a\":-1},\"merges\":[]}}").ok());
  EXPECT_EQ(Tokenizer::Load("/no/such/folder").status().code(), absl::StatusCode::kNotFound);
}

TEST(TokenizerTest, NfcFilesRefuseTextThatMayNeedNormalising) {
  json file = json::parse(ReadFile(std::string(kData) + "llama3_style_tokenizer.json"));
  file["normalizer"] = {{"type", "NFC"}};
  const auto tokenizer = Tokenizer::Parse(file.dump());
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status();
  EXPECT_TRUE((*tokenizer)->Encode("na\u00efve \u65e5\u672c").ok());
  EXPECT_EQ((*tokenizer)->Encode("nai\u0308ve").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(TextStreamTest, HoldsBackTheBytesOfACutCharacter) {
  const auto tokenizer = Tokenizer::Load(kModel);
  ASSERT_TRUE(tokenizer.ok());
  const std::string text = "x \U0001F600 \u65e5 y";
  const auto ids = (*tokenizer)->Encode(text);
  ASSERT_TRUE(ids.ok());
  TextStream stream(**tokenizer);
  std::string all;
  for (const int32_t id : *ids) {
    const std::string part = stream.Add(id);
    EXPECT_EQ(ValidUtf8Prefix(part), part.size());
    all += part;
  }
  EXPECT_EQ(all + stream.Finish(), text);
}

TEST(TextSplitterTest, PiecesTogetherAreTheText) {
  const auto splitter = TextSplitter::Create(kGpt2Pattern);
  ASSERT_TRUE(splitter.ok()) << splitter.status();
  std::vector<std::string_view> pieces;
  ASSERT_TRUE((*splitter)->Split("I'm 12  cats!", &pieces).ok());
  EXPECT_THAT(pieces, testing::ElementsAre("I", "'m", " 12", " ", " cats", "!"));
  EXPECT_EQ(TextSplitter::Create("(unclosed").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(TextSplitterTest, EmptyMatchesDoNotLoop) {
  const auto splitter = TextSplitter::Create("x*");
  ASSERT_TRUE(splitter.ok());
  std::vector<std::string_view> pieces;
  ASSERT_TRUE((*splitter)->Split("a\u00e9xxb", &pieces).ok());
  EXPECT_THAT(pieces, testing::ElementsAre("a\u00e9", "xx", "b"));
}

TEST(Utf8Test, RefusesOverlongFormsSurrogatesAndCutCharacters) {
  EXPECT_EQ(ValidUtf8Prefix("ok\u00e9"), 4u);
  EXPECT_EQ(ValidUtf8Prefix("\xc0\xaf"), 0u);
  EXPECT_EQ(ValidUtf8Prefix("a\xe0\x80\xaf"), 1u);
  EXPECT_EQ(ValidUtf8Prefix("a\xed\xa0\x80"), 1u);
  EXPECT_EQ(ValidUtf8Prefix("a\xf4\x90\x80\x80"), 1u);
  EXPECT_EQ(ValidUtf8Prefix("a\xe6\x97"), 1u);
  EXPECT_EQ(CompleteUtf8Prefix("a\xe6\x97"), 1u);
  EXPECT_EQ(CompleteUtf8Prefix("a\xe6\x97\xa5"), 4u);
  EXPECT_EQ(CompleteUtf8Prefix("a\x80\x80\x80\x80"), 5u);
}

}  // namespace
}  // namespace kvtide::engine
