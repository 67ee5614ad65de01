#include "daemon/service/tokens.h"

#include <openssl/crypto.h>
#include <openssl/sha.h>

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <sstream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "kernels/base/status.h"

namespace kvtide::service {
namespace {

constexpr size_t kMostTokens = 10'000;

bool IsHash(absl::string_view hex) {
  if (hex.size() != 2 * SHA256_DIGEST_LENGTH) return false;
  for (const char c : hex)
    if (absl::ascii_isxdigit(static_cast<unsigned char>(c)) == 0) return false;
  return true;
}

}  // namespace

absl::StatusOr<Tokens::Entry> Tokens::ParseLine(absl::string_view line) {
  const std::vector<absl::string_view> words =
      absl::StrSplit(line, absl::ByAnyChar(" \t"), absl::SkipEmpty());
  Entry entry;
  absl::string_view hex = words[0];
  // The line itself is never repeated: it might be a token that somebody has put there as it is.
  if (words.size() < 2 || words.size() > 3 || !absl::ConsumePrefix(&hex, "sha256:") || !IsHash(hex))
    return absl::InvalidArgumentError("a line is: sha256:64_HEX_DIGITS TENANT[:admin] [until=TIME]");
  const std::string hash = absl::HexStringToBytes(hex);
  std::memcpy(entry.hash.data(), hash.data(), hash.size());
  Identity identity;
  absl::string_view tenant = words[1];
  identity.admin = absl::ConsumeSuffix(&tenant, ":admin");
  identity.tenant = std::string(tenant);
  KVTIDE_RETURN_IF_ERROR(CheckTenant(identity.tenant));
  entry.identity = std::make_shared<const Identity>(identity);
  if (words.size() == 3) {
    absl::string_view until = words[2];
    std::string error;
    if (!absl::ConsumePrefix(&until, "until=") ||
        !absl::ParseTime(absl::RFC3339_full, until, &entry.until, &error))
      return absl::InvalidArgumentError("the third word is until=TIME, such as until=2027-01-31T00:00:00Z");
  }
  return entry;
}

absl::StatusOr<std::shared_ptr<Tokens>> Tokens::Load(const std::string& path) {
  std::shared_ptr<Tokens> tokens(new Tokens(path));
  KVTIDE_RETURN_IF_ERROR(tokens->Reload());
  return tokens;
}

absl::Status Tokens::Reload() {
  std::error_code error;
  if (std::filesystem::is_directory(path_, error))
    return absl::NotFoundError(absl::StrCat("cannot read the tokens in ", path_, ": it is a folder"));
  errno = 0;
  std::ifstream file(path_);
  std::stringstream text;
  if (!file || (file.peek() != std::ifstream::traits_type::eof() && !(text << file.rdbuf())))
    return absl::NotFoundError(absl::StrCat("cannot read the tokens in ", path_, ": ",
                                            errno != 0 ? std::strerror(errno) : "it is no file"));
  auto entries = std::make_shared<std::vector<Entry>>();
  int number = 0;
  const std::string whole = text.str();
  for (absl::string_view line : absl::StrSplit(whole, '\n')) {
    number++;
    line = absl::StripAsciiWhitespace(line);
    if (line.empty() || line[0] == '#') continue;
    absl::StatusOr<Entry> entry = ParseLine(line);
    if (!entry.ok()) return Annotate(entry.status(), absl::StrCat(path_, ", line ", number));
    if (entries->size() == kMostTokens)
      return absl::InvalidArgumentError(absl::StrCat(path_, " has more than ", kMostTokens, " tokens"));
    entries->push_back(*std::move(entry));
  }
  const MutexLock lock(mutex_);
  entries_ = std::move(entries);
  return absl::OkStatus();
}

absl::StatusOr<IdentityPtr> Tokens::Identify(absl::string_view token, absl::Time now) const {
  std::array<uint8_t, 32> hash{};
  SHA256(reinterpret_cast<const uint8_t*>(token.data()), token.size(), hash.data());
  std::shared_ptr<const std::vector<Entry>> entries;
  {
    const MutexLock lock(mutex_);
    entries = entries_;
  }
  const Entry* found = nullptr;
  for (const Entry& entry : *entries)
    if (CRYPTO_memcmp(entry.hash.data(), hash.data(), hash.size()) == 0) found = &entry;
  if (found == nullptr)
    return absl::UnauthenticatedError(
        "the token is none that this kvtided knows; ask its operator for another one");
  if (now >= found->until)
    return absl::UnauthenticatedError(absl::StrCat(
        "the token of tenant '", found->identity->tenant, "' has expired at ",
        absl::FormatTime(absl::RFC3339_sec, found->until, absl::UTCTimeZone()), "; ask for another one"));
  return found->identity;
}

size_t Tokens::size() const {
  const MutexLock lock(mutex_);
  return entries_->size();
}

}  // namespace kvtide::service
