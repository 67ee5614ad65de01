#include "clients/cli/eval/eval_policy.h"

#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"

namespace kvtide::cli {
namespace {

constexpr const char* kChoices[] = {"default", "none", "first-block", "calibrated"};

}  // namespace

absl::StatusOr<WindowPolicy> ParseWindowPolicy(const std::string& text) {
  if (text == "default") return WindowPolicy{};
  if (text == "none") return WindowPolicy{{0, 0}, true};
  const std::vector<std::string> parts = absl::StrSplit(text, '+');
  WindowPolicy policy;
  if (parts.size() != 2 || !absl::SimpleAtoi(parts[0], &policy.window.first_blocks) ||
      !absl::SimpleAtoi(parts[1], &policy.window.last_blocks) || policy.window.first_blocks < 0 ||
      policy.window.last_blocks < 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "exact window \"", text, "\" is neither default, none nor FIRST+LAST in blocks, such as 1+2"));
  }
  return policy;
}

ProfileOptions KeyProfileOptions(CacheType key_type, const WindowPolicy& policy, client::KeyCentring centring,
                                 client::KeyEqualising equalising) {
  if (centring == client::KeyCentring::kCalibrated) return {};  // nothing is made
  ProfileOptions options = DefaultProfileOptions(key_type, !policy.seal_at_once);
  if (centring != client::KeyCentring::kDefault) options.mean = centring == client::KeyCentring::kFirstBlock;
  if (equalising == client::KeyEqualising::kNone) options.equalise = Equalise::kNone;
  return options;
}

const char* ChoiceName(client::KeyCentring centring) { return kChoices[static_cast<int>(centring)]; }
const char* ChoiceName(client::KeyEqualising equalising) { return kChoices[static_cast<int>(equalising)]; }

}  // namespace kvtide::cli
