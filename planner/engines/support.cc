#include "planner/engines/support.h"

#include <algorithm>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "kernels/format/block_layout.h"
#include "planner/engines/llama_cpp.h"

namespace kvtide::planner {
namespace {

constexpr int kVectorKernelMaxHeadDim = 256;  // llama.cpp's vector kernel stops there
constexpr int kFp8Capability = 89, kFlashInferCapability = 80;

// Head dims with an instance of the vector kernel.
bool HasVectorKernel(int head_dim) { return head_dim == 64 || head_dim == 128 || head_dim == 256; }

// Pairs that an upstream build compiles without GGML_CUDA_FA_ALL_QUANTS.
bool CompiledByDefault(const std::string& k, const std::string& v) {
  return k == v && (k == "f16" || k == "bf16" || k == "q8_0" || k == "q4_0");
}

// What ggml-metal's supports_op (GGML_OP_FLASH_ATTN_EXT) accepts for attention: K and V of one type, and of
// these.
Support Metal(const TypePair& pair, const std::string& build) {
  static const char* const kTypes[] = {"f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "q5_0", "q5_1"};
  if (pair.v != "none" && pair.k != pair.v) {
    return {SupportLevel::kCpuFallback, build, "Metal has attention kernels for equal types of K and V only"};
  }
  const bool known =
      std::any_of(std::begin(kTypes), std::end(kTypes), [&](const char* type) { return pair.k == type; });
  if (known) return {SupportLevel::kNative, build, ""};
  return {SupportLevel::kCpuFallback, build, absl::StrCat("Metal has no attention kernel for ", pair.k)};
}

Support LlamaCpp(const EngineOptions& options, const TypePair& pair, int dk, int dv) {
  const std::string& asked_build = options.build;
  const LlamaBackend backend = options.backend;
  const bool all_quants = options.all_quants;
  Support support;
  support.build = ResolveTree(asked_build, pair);
  const GgmlType* k = FindGgmlType(pair.k);
  const GgmlType* v = pair.v == "none" ? k : FindGgmlType(pair.v);
  if (support.build.empty() || k == nullptr || v == nullptr) {
    return {SupportLevel::kRefused, asked_build, absl::StrCat("no such types in this tree: ", pair.Name())};
  }
  // Types with groups of 128 store heads padded to 128.
  const int stored_k = k->group == 128 ? (dk + 127) / 128 * 128 : dk;
  const int stored_v = v->group == 128 ? (dv + 127) / 128 * 128 : dv;
  const int widest = std::max(stored_k, stored_v);
  if (backend == LlamaBackend::kCpu) return support;  // converts values as it reads them
  if (backend == LlamaBackend::kMetal) return Metal(pair, support.build);
  const bool cpu = FallsBackToCpu(asked_build, support.build);
  if (k->half() && v->half()) {
    if (k == v || pair.v == "none") return support;
    if (cpu) return {SupportLevel::kCpuFallback, support.build, "mixed f16 and bf16 have no kernel"};
    return {SupportLevel::kDequantise, support.build, "mixed f16 and bf16 are converted in every step"};
  }
  if (pair.v == "none") {
    return {SupportLevel::kDequantise, support.build,
            "the latent kernel reads f16; quantised latents are expanded every step"};
  }
  if (support.build == "upstream" && !all_quants && !CompiledByDefault(pair.k, pair.v)) {
    if (cpu) {
      return {
          SupportLevel::kCpuFallback, support.build,
          "this pair of types is only compiled with GGML_CUDA_FA_ALL_QUANTS; without it attention runs on "
          "the CPU"};
    }
    return {
        SupportLevel::kDequantise, support.build,
        "no kernel reads this pair; builds after b10819 expand it to f16 in every step, older ones attend on "
        "the CPU"};
  }
  if (support.build == "pairquant" && pair.v == "pq4" && pair.k == "q8_0") {
    support.reason = "as its README says: a vector kernel for pq4 at every head dim, 512 included";
    return support;
  }
  if (widest > kVectorKernelMaxHeadDim) {
    return {SupportLevel::kDequantise, support.build,
            absl::StrCat("the vector kernel stops at head dim 256; at ", widest,
                         " all of K and V is expanded to f16 in every step")};
  }
  if (!HasVectorKernel(stored_k) || !HasVectorKernel(stored_v)) {
    return {SupportLevel::kDequantise, support.build,
            absl::StrCat("no vector kernel for head dims ", stored_k, "/", stored_v,
                         "; K and V are expanded to f16 in every step")};
  }
  return support;
}

Support Vllm(const TypePair& pair, int dk, int dv) {
  Support support{SupportLevel::kNative, "vllm", ""};
  const bool mla = dv == 0;
  const bool turboquant = pair.v == "tq3" || pair.v == "tq4";
  if (turboquant && mla) return {SupportLevel::kRefused, "vllm", "turboquant caches do not hold MLA latents"};
  if (turboquant && std::max(dk, dv) > 256) {
    return {SupportLevel::kRefused, "vllm",
            absl::StrCat("no turboquant kernel for head dim ", std::max(dk, dv))};
  }
  return support;
}

// An fp8 cache in vLLM and SGLang. Before compute capability 8.9 GPUs have no fp8 arithmetic: FlashInfer's
// kernels (8.0 and newer) convert the cache to 16 bits as they read it, Triton's refuse to start.
Support Fp8Cache(Support support, int capability) {
  if (capability == 0 || capability >= kFp8Capability || support.level == SupportLevel::kRefused)
    return support;
  if (capability < kFlashInferCapability) {
    return {SupportLevel::kRefused, support.build,
            "no kernel reads an fp8 cache below compute capability 8.0"};
  }
  return {SupportLevel::kDequantise, support.build,
          "no fp8 arithmetic below compute capability 8.9: FlashInfer converts the cache to 16 bits as it "
          "reads, other kernels refuse to start"};
}

Support Kvtide(const EngineOptions& options, const TypePair& pair, int dk, int dv) {
  const absl::StatusOr<CachePair> types = ParseCachePair(pair.Name());
  if (!types.ok()) return {SupportLevel::kRefused, "kvtide", std::string(types.status().message())};
  if (const absl::Status shape = CheckGroupShape({1, 1, dk, dv}); !shape.ok())
    return {SupportLevel::kRefused, "kvtide", std::string(shape.message())};
  if (!Info(types->k).calibrated) return {SupportLevel::kNative, "kvtide", ""};
  if (!options.calibrated_keys.has_value() || !options.calibrated_keys->transforms) {
    return {SupportLevel::kRefused, "kvtide",
            absl::StrCat(pair.k,
                         " needs a profile with transforms of the model's keys (--profile); `kvtide "
                         "calibrate` makes one")};
  }
  if (Info(types->k).bits == 1 && !options.calibrated_keys->lowest)
    return {SupportLevel::kRefused, "kvtide",
            absl::StrCat("the profile is older than ", pair.k,
                         " and has no widths for it; `kvtide calibrate` makes it anew")};
  if (options.calibrated_keys->after_rope) return {SupportLevel::kNative, "kvtide", ""};
  return {
      SupportLevel::kDequantise, "kvtide",
      absl::StrCat(pair.k,
                   " keys before RoPE are rebuilt in every step: GPUs attend over them about as fast as over "
                   "f16 pages; `kvtide calibrate --keys after-rope` makes a profile for speed")};
}

}  // namespace

const char* SupportLevelName(SupportLevel level) {
  switch (level) {
    case SupportLevel::kNative:
      return "native";
    case SupportLevel::kDequantise:
      return "dequantise";
    case SupportLevel::kCpuFallback:
      return "cpu";
    case SupportLevel::kRefused:
      return "refused";
  }
  return "unknown";
}

Support FindSupport(const EngineOptions& options, const TypePair& pair, int head_dim_k, int head_dim_v) {
  switch (options.engine) {
    case Engine::kLlamaCpp:
      return LlamaCpp(options, pair, head_dim_k, head_dim_v);
    case Engine::kVllm: {
      const Support support = Vllm(pair, head_dim_k, head_dim_v);
      return pair.k == "fp8" ? Fp8Cache(support, options.compute_capability) : support;
    }
    case Engine::kSglang: {
      const Support support{SupportLevel::kNative, "sglang", ""};
      return absl::StartsWith(pair.k, "fp8") ? Fp8Cache(support, options.compute_capability) : support;
    }
    case Engine::kKvtide:
      return Kvtide(options, pair, head_dim_k, head_dim_v);
  }
  return {};
}

Support FindSupport(const EngineOptions& options, const TypePair& pair,
                    const std::vector<LayerGroup>& groups) {
  Support worst;
  worst.build = EngineName(options.engine);
  bool first = true;
  for (const LayerGroup& group : groups) {
    if (group.kind == LayerKind::kRecurrent || group.index_keys) continue;
    Support support = FindSupport(options, pair, group.head_dim_k, group.head_dim_v);
    if (first || support.level > worst.level) worst = support;
    first = false;
  }
  if (options.engine == Engine::kLlamaCpp && !options.flash_attention && pair.v != "f16" &&
      pair.v != "bf16" && pair.v != "f32" && pair.v != "none") {
    return {SupportLevel::kRefused, worst.build, "a quantised V needs flash attention (-fa on)"};
  }
  return worst;
}

}  // namespace kvtide::planner
