#include "daemon/disk/secret_key.h"

#include <fcntl.h>
#include <openssl/crypto.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <cstring>

#include "absl/strings/ascii.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "kernels/base/check.h"
#include "kernels/base/random_bytes.h"
#include "kernels/base/status.h"

namespace kvtide {
namespace {

constexpr size_t kPage = 4096;
constexpr size_t kMostText = 256;  // of a file with a key

// Bytes that were read from the file: gone when this is.
struct Text {
  ~Text() { explicit_bzero(bytes.data(), bytes.size()); }
  std::array<char, kMostText> bytes{};
};

bool IsHex(absl::string_view text) {
  return std::all_of(text.begin(), text.end(),
                     [](char c) { return absl::ascii_isxdigit(static_cast<unsigned char>(c)) != 0; });
}

absl::Status NoKey(const std::string& what) {
  return absl::InvalidArgumentError(
      absl::StrCat(what,
                   "; a key is 32 bytes, or 64 hexadecimal digits, or 44 characters of base64: `openssl "
                   "rand -hex 32` makes one"));
}

absl::Status CheckMode(const struct stat& info) {
  if (!S_ISREG(info.st_mode)) return absl::InvalidArgumentError("it is no file");
  const mode_t open = info.st_mode & (S_IRWXG | S_IRWXO);
  const bool by_root = info.st_uid == 0 && (open & ~mode_t{S_IRGRP}) == 0;
  if (open == 0 || by_root) return absl::OkStatus();
  return absl::FailedPreconditionError(
      absl::StrCat("its mode 0", (info.st_mode >> 6) & 7, (info.st_mode >> 3) & 7, info.st_mode & 7,
                   " lets others in; chmod 0400 it, and take another key if others have read this one"));
}

}  // namespace

SecretKey::SecretKey() {
  void* const page = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  KVTIDE_CHECK(page != MAP_FAILED, "no page for a key");
  page_.reset(static_cast<std::byte*>(page));
  madvise(page, kPage, MADV_DONTDUMP);
  mlock(page, kPage);
}

void SecretKey::Wipe::operator()(std::byte* page) const {
  explicit_bzero(page, kPage);
  munmap(page, kPage);
}

SecretKey SecretKey::Random() {
  SecretKey key;
  FillRandom(key.bytes());
  return key;
}

absl::StatusOr<SecretKey> ParseKey(std::string_view text) {
  SecretKey key;
  const auto take = [&](std::string_view bytes) -> absl::StatusOr<SecretKey> {
    // Files that were made too small or of nothing.
    if (std::all_of(bytes.begin(), bytes.end(), [&](char c) { return c == bytes[0]; }))
      return NoKey("all bytes are the same");
    std::memcpy(key.bytes().data(), bytes.data(), kKeyBytes);
    return std::move(key);
  };
  if (text.size() == kKeyBytes) {
    if (IsHex({text.data(), text.size()})) return NoKey("32 hexadecimal digits are 16 bytes");
    return take(text);
  }
  const absl::string_view digits =
      absl::StripTrailingAsciiWhitespace(absl::string_view(text.data(), text.size()));
  std::string bytes;  // room for the whole: it does not grow while it holds the key
  bytes.reserve(kMostText);
  const bool hex = digits.size() == 2 * kKeyBytes && IsHex(digits);
  if (hex) {
    bytes = absl::HexStringToBytes(digits);
  } else if (!absl::Base64Unescape(digits, &bytes) || bytes.size() != kKeyBytes) {
    OPENSSL_cleanse(bytes.data(), bytes.size());
    return NoKey(absl::StrCat("it has ", text.size(), " bytes that are no key"));
  }
  absl::StatusOr<SecretKey> made = take(bytes);
  OPENSSL_cleanse(bytes.data(), bytes.size());
  return made;
}

absl::StatusOr<SecretKey> ReadKeyFile(const std::string& path) {
  const int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd < 0) {
    const std::string text = absl::StrCat("cannot read the key in ", path, ": ", std::strerror(errno));
    return errno == ENOENT ? absl::NotFoundError(text) : absl::PermissionDeniedError(text);
  }
  Text text;
  struct stat info {};
  const bool looked = fstat(fd, &info) == 0;
  const ssize_t got = read(fd, text.bytes.data(), text.bytes.size());
  const int error = errno;
  close(fd);
  const std::string where = absl::StrCat("the key in ", path);
  if (!looked) return absl::PermissionDeniedError(absl::StrCat(where, ": ", std::strerror(error)));
  KVTIDE_RETURN_IF_ERROR(Annotate(CheckMode(info), where));
  if (got < 0) return absl::PermissionDeniedError(absl::StrCat(where, ": ", std::strerror(error)));
  absl::StatusOr<SecretKey> key = ParseKey({text.bytes.data(), static_cast<size_t>(got)});
  if (!key.ok()) return Annotate(key.status(), where);
  return key;
}

}  // namespace kvtide
