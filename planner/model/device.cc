#include "planner/model/device.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "kernels/base/status.h"
#include "planner/model/catalogue.h"
#include "planner/units.h"

namespace kvtide::planner {
namespace {

constexpr double kMaxBytes = 1e18;
constexpr int kMaxDevices = 1024;

struct Unit {
  const char* name;
  double bytes;
};
constexpr Unit kUnits[] = {{"", 1},
                           {"B", 1},
                           {"KiB", 1024.0},
                           {"MiB", 1048576.0},
                           {"GiB", 1073741824.0},
                           {"TiB", 1099511627776.0},
                           {"PiB", 1125899906842624.0},
                           {"PB", 1e15},
                           {"KB", 1e3},
                           {"MB", 1e6},
                           {"GB", 1e9},
                           {"TB", 1e12},
                           {"K", 1024.0},
                           {"M", 1048576.0},
                           {"G", 1073741824.0},
                           {"T", 1099511627776.0}};

// Splits "14.4GB" into 14.4 and "GB".
bool SplitNumber(const std::string& text, double* number, std::string* rest) {
  size_t end = 0;
  while (end < text.size() &&
         (absl::ascii_isdigit(static_cast<unsigned char>(text[end])) || text[end] == '.'))
    ++end;
  if (end == 0 || !absl::SimpleAtod(text.substr(0, end), number)) return false;
  *rest = std::string(absl::StripAsciiWhitespace(text.substr(end)));
  return true;
}

// The sign between a count and a name: x, *, or the multiplication sign of UTF-8. Its length at `at`, or 0.
size_t TimesAt(const std::string& text, size_t at) {
  if (at >= text.size()) return 0;
  if (text[at] == 'x' || text[at] == 'X' || text[at] == '*') return 1;
  return text.compare(at, 2, "\xC3\x97") == 0 ? 2 : 0;
}

bool CountOf(const std::string& digits, int* count) {
  return !digits.empty() && digits.size() <= 4 &&
         std::all_of(digits.begin(), digits.end(), [](unsigned char c) { return absl::ascii_isdigit(c); }) &&
         absl::SimpleAtoi(digits, count) && *count >= 1 && *count <= kMaxDevices;
}

// "8xH100", "2 x RTX 3090": the count is taken off the front.
bool CountInFront(const std::string& text, int* count, std::string* name) {
  size_t end = 0;
  while (end < text.size() && absl::ascii_isdigit(static_cast<unsigned char>(text[end]))) ++end;
  const std::string digits = text.substr(0, end);
  while (end < text.size() && text[end] == ' ') ++end;
  const size_t times = TimesAt(text, end);
  if (times == 0 || !CountOf(digits, count)) return false;
  *name = std::string(absl::StripAsciiWhitespace(text.substr(end + times)));
  return !name->empty();
}

// "H100 x8", "RTX 3090 x 2": off the end.
bool CountBehind(const std::string& text, int* count, std::string* name) {
  size_t begin = text.size();
  while (begin > 0 && absl::ascii_isdigit(static_cast<unsigned char>(text[begin - 1]))) --begin;
  if (!CountOf(text.substr(begin), count)) return false;
  while (begin > 0 && text[begin - 1] == ' ') --begin;
  for (const size_t length : {size_t{1}, size_t{2}}) {
    if (begin <= length || TimesAt(text, begin - length) != length) continue;
    *name = std::string(absl::StripAsciiWhitespace(text.substr(0, begin - length)));
    return !name->empty();
  }
  return false;
}

// A name, with how many of it or without.
absl::StatusOr<DeviceBudget> NamedDevice(const std::string& text) {
  absl::StatusOr<DeviceBudget> device = FindGpu(text);
  if (device.ok()) return device;
  int count = 0;
  std::string name;
  if (!CountInFront(text, &count, &name) && !CountBehind(text, &count, &name)) return device;
  KVTIDE_ASSIGN_OR_RETURN(DeviceBudget one, FindGpu(name));
  one.count = count;
  return one;
}

absl::Status SetDeviceField(const std::string& key, const std::string& value, DeviceBudget* device) {
  if (key == "vram" || key == "ram" || key == "memory") {
    KVTIDE_ASSIGN_OR_RETURN(device->vram_bytes, ParseBytes(value));
    device->driver_reserve_bytes = 0;
    device->driver_reserve_is_guess = false;
  } else if (key == "used") {
    KVTIDE_ASSIGN_OR_RETURN(device->in_use_bytes, ParseBytes(value));
  } else if (key == "host") {
    if (device->memory != DeviceMemory::kOwn) {
      return absl::InvalidArgumentError(
          absl::StrCat(device->name, " has no host memory besides its own: give its size with memory="));
    }
    KVTIDE_ASSIGN_OR_RETURN(device->host_bytes, ParseBytes(value));
  } else if (key == "bandwidth") {
    KVTIDE_ASSIGN_OR_RETURN(device->bandwidth_gb_s, ParseBandwidth(value));
  } else if (key == "pcie") {
    KVTIDE_ASSIGN_OR_RETURN(device->pcie_gb_s, ParseBandwidth(value));
  } else if (key == "host_bandwidth") {
    KVTIDE_ASSIGN_OR_RETURN(device->host_bandwidth_gb_s, ParseBandwidth(value));
  } else if (key == "count") {
    if (!absl::SimpleAtoi(value, &device->count) || device->count < 1 || device->count > kMaxDevices) {
      return absl::InvalidArgumentError(absl::StrCat("count is '", value, "', expected 1 to ", kMaxDevices));
    }
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat("unknown key '", key,
                     "'; known: vram (or ram, memory), used, bandwidth, pcie, count, host, host_bandwidth"));
  }
  return absl::OkStatus();
}

// Unequal cards in one answer would be wrong for one of them.
std::string MixedCards(const std::string& text) {
  return absl::StrCat("device '", text,
                      "': a plan is for equal cards; plan for the smallest of them with its count "
                      "(--device '2x RTX 3090'), or for each alone");
}

std::string NotAField(const std::string& text, const std::string& field) {
  if (NamedDevice(field).ok()) return MixedCards(text);
  return absl::StrCat("device '", text, "': '", field,
                      "' is not key=value (vram=16GiB, host=64GiB, used=700MiB, ...)");
}

}  // namespace

int DeviceBudget::ComputeCapability() const {
  int capability = 0;
  return absl::StartsWith(arch, "sm_") && absl::SimpleAtoi(arch.substr(3), &capability) ? capability : 0;
}

absl::StatusOr<int64_t> ParseBytes(const std::string& text) {
  double number = 0;
  std::string unit;
  if (SplitNumber(std::string(absl::StripAsciiWhitespace(text)), &number, &unit)) {
    for (const Unit& known : kUnits) {
      if (!absl::EqualsIgnoreCase(unit, known.name)) continue;
      if (unit.empty() && number != 0 && number < kMiB) {
        return absl::InvalidArgumentError(absl::StrCat("'", text, "' has no unit; write ", text, "GiB, ",
                                                       text, "MiB, or ", text, "B for bytes"));
      }
      const double bytes = number * known.bytes;
      if (bytes > kMaxBytes)
        return absl::InvalidArgumentError(absl::StrCat("size '", text, "' is absurdly large"));
      return static_cast<int64_t>(std::llround(bytes));
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("'", text, "' is not a size; write bytes or a unit, for example 16GiB, 14.4GB, 512MiB"));
}

absl::StatusOr<double> ParseBandwidth(const std::string& text) {
  double number = 0;
  std::string unit;
  if (SplitNumber(std::string(absl::StripAsciiWhitespace(text)), &number, &unit) && number > 0) {
    if (unit.empty() || absl::EqualsIgnoreCase(unit, "GB/s")) return number;
    if (absl::EqualsIgnoreCase(unit, "TB/s")) return number * 1000;
    if (absl::EqualsIgnoreCase(unit, "GiB/s")) return number * 1.073741824;
  }
  return absl::InvalidArgumentError(
      absl::StrCat("'", text, "' is not a bandwidth; write for example 960GB/s"));
}

absl::StatusOr<DeviceBudget> ParseDevice(const std::string& text) {
  DeviceBudget device;
  bool first = true;
  for (const std::string& part : std::vector<std::string>(absl::StrSplit(text, ','))) {
    const std::string field(absl::StripAsciiWhitespace(part));
    const size_t equals = field.find('=');
    if (equals == std::string::npos) {
      if (!first) return absl::InvalidArgumentError(NotAField(text, field));
      if (absl::StrContains(field, '+')) return absl::InvalidArgumentError(MixedCards(text));
      KVTIDE_ASSIGN_OR_RETURN(device, NamedDevice(field));
    } else {
      KVTIDE_RETURN_IF_ERROR(
          Annotate(SetDeviceField(field.substr(0, equals), field.substr(equals + 1), &device),
                   absl::StrCat("device '", text, "'")));
    }
    first = false;
  }
  if (device.vram_bytes <= 0) {
    return absl::InvalidArgumentError(
        device.memory == DeviceMemory::kHost
            ? absl::StrCat("device '", text, "': how much memory? for example ", text, ",ram=64GiB")
            : absl::StrCat("device '", text, "' has no memory; give vram=16GiB or a card's name"));
  }
  if (device.name.empty()) device.name = text;
  return device;
}

}  // namespace kvtide::planner
