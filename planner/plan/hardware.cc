#include "planner/plan/hardware.h"

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "planner/model/weight_size.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

bool IsAmd(const DeviceBudget& device) { return absl::StartsWith(device.arch, "gfx"); }

// Compute capabilities times ten.
constexpr int kVllmLeast = 75, kSglangLeast = 75, kKvtideLeast = 80;
constexpr int kFp8Least = 89, kNvfp4Least = 100, kMxfp4Least = 80;

std::string Capability(int capability) { return absl::StrCat(capability / 10, ".", capability % 10); }

absl::Status CheckCard(const PlanRequest& request) {
  const DeviceBudget& device = request.device;
  const Engine engine = request.engine.engine;
  const bool server = engine == Engine::kVllm || engine == Engine::kSglang;
  if (device.arch == "apple" && engine != Engine::kLlamaCpp) {
    return absl::InvalidArgumentError(
        absl::StrCat("device: ", EngineName(engine), " does not use the GPU of ", device.name,
                     engine == Engine::kVllm ? " (its plug-in vllm-metal does, which is not planned)" : "",
                     "; --engine llama.cpp does"));
  }
  if (engine == Engine::kSglang && device.memory == DeviceMemory::kHost) {
    return absl::InvalidArgumentError(
        "device: how SGLang sizes its pool on a CPU is not known; --engine llama.cpp or vllm are planned "
        "there");
  }
  if (engine == Engine::kKvtide && (IsAmd(device) || absl::StartsWith(device.arch, "xe"))) {
    return absl::InvalidArgumentError(absl::StrCat("device: kvtided has no backend for ", device.name,
                                                   " (NVIDIA GPUs from compute capability 8.0 on, and CPUs); "
                                                   "--engine llama.cpp, vllm or sglang plan for it"));
  }
  const int capability = device.ComputeCapability();
  const int least = engine == Engine::kVllm     ? kVllmLeast
                    : engine == Engine::kSglang ? kSglangLeast
                    : engine == Engine::kKvtide ? kKvtideLeast
                                                : 0;
  if (capability > 0 && capability < least) {
    return absl::InvalidArgumentError(
        absl::StrCat("device: ", EngineName(engine), " needs compute capability ", Capability(least), ", ",
                     device.name, " has ", Capability(capability), "; --engine ",
                     server ? "llama.cpp" : "llama.cpp or vllm", " plans for it"));
  }
  return absl::OkStatus();
}

absl::Status CheckFormat(const PlanRequest& request) {
  const std::string& format = request.weights.format;
  const DeviceBudget& device = request.device;
  if (format.empty()) return absl::OkStatus();
  if (request.engine.engine == Engine::kLlamaCpp) {
    if (IsGgufFormat(format) || format == "nvfp4") return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat("weights: ", format,
                     " is a format of safetensors, llama.cpp reads GGUF files; one of about that size: ",
                     format == "int8" || format == "fp8" ? "q8_0" : "q4_k_m"));
  }
  if (IsAmd(device) && (format == "nvfp4" || format == "nf4")) {
    return absl::InvalidArgumentError(
        absl::StrCat("weights: ", EngineName(request.engine.engine), " has no kernels for ", format, " on ",
                     device.name, "; awq, gptq, fp8 and mxfp4 have some on MI300 and newer"));
  }
  if (IsAmd(device) && format == "fp8" && !absl::StartsWith(device.arch, "gfx94") &&
      !absl::StartsWith(device.arch, "gfx95") && !absl::StartsWith(device.arch, "gfx12")) {
    return absl::InvalidArgumentError(absl::StrCat("weights: ", device.name,
                                                   " has no fp8 arithmetic (MI300 and newer have); bf16, awq "
                                                   "or gptq are possible"));
  }
  const int capability = device.ComputeCapability();
  if (format == "mxfp4" && capability > 0 && capability < kMxfp4Least) {
    return absl::InvalidArgumentError(
        absl::StrCat("weights: mxfp4 needs compute capability ", Capability(kMxfp4Least), ", ", device.name,
                     " has ", Capability(capability), "; --engine llama.cpp reads a GGUF"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckHardware(const PlanRequest& request) {
  const absl::Status card = CheckCard(request);
  return card.ok() ? CheckFormat(request) : card;
}

std::vector<std::string> HardwareNotes(const PlanRequest& request) {
  std::vector<std::string> notes;
  const std::string& format = request.weights.format;
  const int capability = request.device.ComputeCapability();
  const bool server = request.engine.engine == Engine::kVllm || request.engine.engine == Engine::kSglang;
  if (server && capability > 0) {
    const int least = format == "fp8" || format == "mxfp4_fp8" ? kFp8Least
                      : format == "nvfp4"                      ? kNvfp4Least
                                                               : 0;
    if (capability < least) {
      notes.push_back(absl::StrCat("weights in ", format, " are stored so, but computed with in 16 bits: ",
                                   request.device.name, " has compute capability ", Capability(capability),
                                   ", its arithmetic begins at ", Capability(least)));
    }
  }
  if (server && IsGgufFormat(format) && !IsSafetensorsFormat(format)) {
    notes.push_back(absl::StrCat(EngineName(request.engine.engine), " reads GGUF files (", format,
                                 ") experimentally and slowly; awq, gptq, fp8 or bf16 are its own"));
  }
  if (request.weights.bytes > 0 && request.model.params_total > 0) {
    constexpr double kFewest = 1.0, kMost = 34.0;  // bits per parameter of any format
    const double bits =
        8.0 * static_cast<double>(request.weights.bytes) / static_cast<double>(request.model.params_total);
    if (bits < kFewest || bits > kMost) {
      notes.push_back(absl::StrFormat(
          "weights of %s are %.2g bits for each of the %d parameters of %s: is that the size that you mean?",
          FormatBytes(request.weights.bytes), bits, request.model.params_total, request.model.name));
    }
  }
  return notes;
}

}  // namespace kvtide::planner
