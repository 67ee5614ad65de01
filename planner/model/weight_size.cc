#include "planner/model/weight_size.h"

#include <algorithm>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_replace.h"
#include "kernels/base/check.h"
#include "kernels/base/status.h"
#include "planner/csv.h"
#include "planner/embedded.h"
#include "planner/model/device.h"
#include "planner/near_names.h"
#include "planner/saturating.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

enum class Family {
  kGguf,         // embedding and head are coded too
  kSafetensors,  // embedding and head stay in 16 bits
  kExperts,      // everything but routed experts stays in 16 bits
  kExpertsFp8,   // experts in MXFP4, the rest in FP8, embedding and head in 16 bits
};

struct Format {
  const char* name;
  double bits;  // per coded parameter, scales included
  Family family;
};

// GGUF: bits per weight of an 8B Llama as llama.cpp's tool reports them. Safetensors: the format's bits and
// its scales: groups of 128 with a 16-bit scale and a 4-bit zero point (AWQ, GPTQ), of 16 with an 8-bit scale
// (NVFP4), of 32 with an 8-bit exponent (MXFP4, which models ship for their experts only).
constexpr Format kFormats[] = {
    {"iq1_s", 2.00, Family::kGguf},        {"iq1_m", 2.15, Family::kGguf},
    {"iq2_xxs", 2.38, Family::kGguf},      {"iq2_xs", 2.59, Family::kGguf},
    {"iq2_s", 2.74, Family::kGguf},        {"iq2_m", 2.93, Family::kGguf},
    {"iq3_xxs", 3.25, Family::kGguf},      {"iq3_xs", 3.50, Family::kGguf},
    {"iq3_s", 3.66, Family::kGguf},        {"iq3_m", 3.76, Family::kGguf},
    {"iq4_xs", 4.46, Family::kGguf},       {"iq4_nl", 4.68, Family::kGguf},
    {"q2_k", 3.16, Family::kGguf},         {"q2_k_s", 2.97, Family::kGguf},
    {"q3_k_s", 3.64, Family::kGguf},       {"q3_k_m", 4.00, Family::kGguf},
    {"q3_k_l", 4.30, Family::kGguf},       {"q4_0", 4.5, Family::kGguf},
    {"q4_1", 5.0, Family::kGguf},          {"q4_k_s", 4.67, Family::kGguf},
    {"q4_k_m", 4.85, Family::kGguf},       {"q5_0", 5.5, Family::kGguf},
    {"q5_1", 6.0, Family::kGguf},          {"q5_k_s", 5.57, Family::kGguf},
    {"q5_k_m", 5.69, Family::kGguf},       {"q6_k", 6.56, Family::kGguf},
    {"q8_0", 8.5, Family::kGguf},          {"awq", 4.156, Family::kSafetensors},
    {"gptq", 4.156, Family::kSafetensors}, {"w4a16", 4.156, Family::kSafetensors},
    {"nf4", 4.127, Family::kSafetensors},  {"int8", 8.0, Family::kSafetensors},
    {"fp8", 8.0, Family::kSafetensors},    {"nvfp4", 4.5, Family::kSafetensors},
    {"mxfp4", 4.25, Family::kExperts},     {"mxfp4_fp8", 4.25, Family::kExpertsFp8},
    {"bf16", 16.0, Family::kGguf},         {"f16", 16.0, Family::kGguf},
    {"f32", 32.0, Family::kGguf}};

const Format* FindFormat(const std::string& name) {
  for (const Format& format : kFormats) {
    if (name == format.name) return &format;
  }
  return nullptr;
}

// Other words for the same formats; behind "ud-" stand Unsloth's mixtures, which are named after their bulk.
constexpr std::pair<const char*, const char*> kOtherWords[] = {
    {"fp16", "f16"},       {"half", "f16"},        {"16bit", "bf16"},     {"bfloat16", "bf16"},
    {"float16", "f16"},    {"float32", "f32"},     {"fp32", "f32"},       {"q8", "q8_0"},
    {"q6", "q6_k"},        {"q5", "q5_k_m"},       {"q4", "q4_k_m"},      {"q3", "q3_k_m"},
    {"q2", "q2_k"},        {"q4_k", "q4_k_m"},     {"q5_k", "q5_k_m"},    {"q3_k", "q3_k_m"},
    {"q4_k_xl", "q4_k_m"}, {"q5_k_xl", "q5_k_m"},  {"q6_k_xl", "q6_k"},   {"q8_k_xl", "q8_0"},
    {"q3_k_xl", "q3_k_m"}, {"q2_k_xl", "q2_k"},    {"q6_k_l", "q6_k"},    {"q5_k_l", "q5_k_m"},
    {"q4_k_l", "q4_k_m"},  {"q2_k_l", "q2_k"},     {"int4", "w4a16"},     {"4bit", "w4a16"},
    {"w4", "w4a16"},       {"awq4", "awq"},        {"awq_int4", "awq"},   {"gptq_int4", "gptq"},
    {"gptq4", "gptq"},     {"autoawq", "awq"},     {"bnb", "nf4"},        {"bnb_4bit", "nf4"},
    {"8bit", "int8"},      {"w8a8", "int8"},       {"w8a16", "int8"},     {"gptq_int8", "int8"},
    {"float8", "fp8"},     {"fp8_dynamic", "fp8"}, {"fp8_e4m3", "fp8"},   {"e4m3", "fp8"},
    {"f8", "fp8"},         {"fp4", "nvfp4"},       {"nvfp4a16", "nvfp4"}, {"mxfp4_moe", "mxfp4"}};

// Bits of a token embedding in a GGUF file: the plain type behind a mixture's name.
double EmbeddingBits(const Format& format) {
  static constexpr std::pair<const char*, double> kinds[] = {
      {"q2_k", 2.625},  {"q3_k", 3.4375}, {"q4_k", 4.5},  {"q5_k", 5.5},  {"q6_k", 6.5625},
      {"iq4_xs", 4.25}, {"iq3", 3.4375},  {"iq2", 2.625}, {"iq1", 2.625}, {"mxfp4", 8.5}};
  for (const auto& [prefix, bits] : kinds) {
    if (absl::StartsWith(format.name, prefix)) return bits;
  }
  return format.bits;
}

// Parameters of embedding and head; where they were not published, an upper bound.
struct Half {
  int64_t parameters = 0;
  const char* how = "";
};
Half EmbeddingAndHead(const ModelGeometry& model) {
  constexpr int64_t kLargestVocabulary = 262144, kWideModel = 8192;
  if (model.params_embedding > 0) return {model.params_embedding, "embedding and head"};
  const int64_t table = Product(model.n_vocab > 0 ? model.n_vocab : kLargestVocabulary,
                                model.n_embd > 0 ? model.n_embd : kWideModel);
  return {Product(2, table),
          model.n_vocab > 0 && model.n_embd > 0
              ? "embedding and head, taken as two tables: whether they are one was not found"
              : "at most for embedding and head: vocabulary or width was not found"};
}

// The width between the halves of one expert, from the sum that a token visits and the experts' parameters;
// 0 when they do not tell.
int64_t ExpertWidth(const ModelGeometry& model) {
  constexpr int kMostShared = 4;
  int64_t width = 0, most_layers = 0;
  for (int shared = 0; shared <= kMostShared; ++shared) {
    const int visited = model.n_experts_used + shared;
    if (visited <= 0 || model.n_ff <= 0 || model.n_ff % visited != 0) continue;
    const int64_t layer = Product(3, model.n_experts, model.n_embd, model.n_ff / visited);
    if (layer <= 0 || model.params_experts % layer != 0) continue;
    const int64_t layers = model.params_experts / layer;
    if (layers <= static_cast<int64_t>(model.layers.size()) && layers > most_layers)
      width = model.n_ff / visited, most_layers = layers;
  }
  return width;
}

// Servers pad experts in MXFP4 to what their kernels take: widths to multiples of 256 and 128 (vLLM 0.33,
// fused_moe/oracle/mxfp4.py: Marlin and TensorRT-LLM kernels; others pad less).
double ExpertPadding(const ModelGeometry& model) {
  constexpr int64_t kHidden = 256, kIntermediate = 128;
  const int64_t expert = ExpertWidth(model);
  if (expert == 0) return 1;
  const auto padded = [](int64_t width, int64_t unit) {
    return static_cast<double>((width + unit - 1) / unit * unit) / static_cast<double>(width);
  };
  return padded(model.n_embd, kHidden) * padded(expert, kIntermediate);
}

// K-quants take rows of 256 values. llama.cpp stores rows of other lengths in the next larger plain type; of
// a mixture these are the experts' down projections, a third of their parameters. Bytes that this adds.
int64_t FallbackBytes(const ModelGeometry& model, const std::string& format) {
  static constexpr std::pair<const char*, double> kMoreBits[] = {
      {"q2_k", 1.1},   {"q3_k", 1.1},    {"q4_k_s", 1.0}, {"q4_k_m", 1.47},
      {"q5_k_s", 0.5}, {"q5_k_m", 1.22}, {"q6_k", 1.94}};
  const int64_t width = ExpertWidth(model);
  if (width == 0 || width % 256 == 0) return 0;
  for (const auto& [prefix, bits] : kMoreBits) {
    if (absl::StartsWith(format, prefix))
      return static_cast<int64_t>(static_cast<double>(model.params_experts) / 3 * bits / 8);
  }
  return 0;
}

// 0 when the embedding doubles as head, or when that is not known.
int64_t EmbeddingBytes(const ModelGeometry& model, const Format& format) {
  const int64_t table = model.n_vocab * model.n_embd;
  const bool untied = table > 0 && model.params_embedding >= 2 * table;
  if (!untied || format.family == Family::kSafetensors || format.family == Family::kExpertsFp8) return 0;
  return static_cast<int64_t>(static_cast<double>(table) * EmbeddingBits(format) / 8);
}

}  // namespace

std::string WeightName(const std::string& text) {
  std::string name = absl::AsciiStrToLower(text);
  name = absl::StrReplaceAll(name, {{"-", "_"}, {" ", "_"}});
  if (absl::StartsWith(name, "ud_")) name = name.substr(3);
  for (const auto& [word, format] : kOtherWords) {
    if (name == word) return format;
  }
  return FindFormat(name) != nullptr ? name : "";
}

std::vector<std::string> WeightNames() {
  std::vector<std::string> names;
  for (const Format& format : kFormats) names.push_back(format.name);
  return names;
}

bool IsGgufFormat(const std::string& name) {
  const Format* format = FindFormat(name);
  return format != nullptr && (format->family == Family::kGguf || format->family == Family::kExperts);
}

bool IsSafetensorsFormat(const std::string& name) {
  const Format* format = FindFormat(name);
  return format != nullptr &&
         (format->family != Family::kGguf || name == "bf16" || name == "f16" || name == "f32");
}

absl::StatusOr<Weights> EstimateWeights(const ModelGeometry& model, const std::string& quantisation,
                                        WeightFiles files) {
  const std::string wanted = WeightName(quantisation);
  const Format* format = FindFormat(wanted);
  if (format == nullptr) {
    std::string near;
    for (const std::string& name : NearNames(quantisation, WeightNames(), 3))
      absl::StrAppend(&near, near.empty() ? "" : ", ", name);
    return absl::InvalidArgumentError(absl::StrCat(
        "unknown weights '", quantisation, "'; nearest: ", near,
        "; give a GGUF or safetensors path, a size (14.4GB), or a quantisation (q4_0, q4_k_m, iq3_xxs, "
        "q6_k, q8_0, awq, gptq, w4a16, mxfp4, nvfp4, fp8, bf16, ...)"));
  }
  static const absl::StatusOr<std::vector<CsvRow>> rows =
      ParseCsv(kWeightsCsv, "weights.csv", {"model", "quantisation", "size", "files"});
  KVTIDE_CHECK(rows.ok(), std::string(rows.status().message()));
  for (const CsvRow& row : *rows) {
    if (NormalName(row.Text("model")) != NormalName(model.name) || row.Text("quantisation") != wanted ||
        (row.Text("files") == "gguf" && files != WeightFiles::kGguf))
      continue;
    KVTIDE_ASSIGN_OR_RETURN(const int64_t bytes, ParseBytes(row.Text("size")));
    return Weights{bytes, Provenance::kCalibrated,
                   absl::StrCat("published ", wanted, " file of ", model.name, ", ", row.Text("size")),
                   EmbeddingBytes(model, *format), wanted};
  }
  if (model.params_total <= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("the number of parameters of ", model.name, " is unknown, so '", quantisation,
                     "' gives no size; give --weights a size (14.4GB) or a path"));
  }
  const Half ends = EmbeddingAndHead(model);
  int64_t half = 0, eight = 0;  // parameters that stay in 16 bits, and in 8
  const char* what = ends.how;
  double padding = 1;
  if (format->family == Family::kSafetensors || format->family == Family::kExpertsFp8)
    half = std::min(ends.parameters, model.params_total);
  if (format->family == Family::kExpertsFp8 && model.params_experts > 0)
    eight = std::max<int64_t>(0, model.params_total - half - model.params_experts);
  if (format->family == Family::kExperts && model.params_experts > 0) {
    half = model.params_total - model.params_experts;
    what = "all but the experts";
    if (files == WeightFiles::kSafetensors) padding = ExpertPadding(model);
  }
  const auto coded = static_cast<double>(model.params_total - half - eight);
  const int64_t fallback = FallbackBytes(model, wanted);
  const auto bytes = static_cast<int64_t>(coded * format->bits / 8 * padding) + 2 * half + eight + fallback;
  std::string source =
      absl::StrFormat("%d parameters x %g bits", model.params_total - half - eight, format->bits);
  if (padding > 1) absl::StrAppendFormat(&source, " padded by %.0f %% for the kernels", 100 * (padding - 1));
  if (fallback > 0)
    absl::StrAppend(&source, ", ", FormatBytes(fallback), " more where rows are no multiple of 256");
  if (eight > 0) absl::StrAppendFormat(&source, ", %d in 8 bits", eight);
  if (half > 0) absl::StrAppendFormat(&source, ", and %d in 16 bits (%s)", half, what);
  return Weights{bytes, Provenance::kFormula, source, EmbeddingBytes(model, *format), wanted};
}

void LeaveEmbeddingOnHost(Weights* weights) {
  if (weights->embedding_bytes <= 0 || weights->embedding_bytes >= weights->bytes) return;
  weights->bytes -= weights->embedding_bytes;
  absl::StrAppend(&weights->source, ", ", FormatBytes(weights->embedding_bytes),
                  " of it a token embedding that stays on the CPU");
  weights->embedding_bytes = 0;
}

int64_t ExpertBytes(const ModelGeometry& model, int64_t bytes) {
  if (model.params_experts <= 0 || model.params_total <= 0) return 0;
  return static_cast<int64_t>(static_cast<double>(bytes) * static_cast<double>(model.params_experts) /
                              static_cast<double>(model.params_total));
}

}  // namespace kvtide::planner
