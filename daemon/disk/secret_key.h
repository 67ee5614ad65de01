// A key of 256 bits and the file that an operator keeps it in.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string>
#include <string_view>

#include "absl/status/statusor.h"

namespace kvtide {

constexpr size_t kKeyBytes = 32;

// Bytes in a page of their own that is kept out of core dumps, out of swap where the limit of locked memory
// (RLIMIT_MEMLOCK) has room for it, and is wiped in the end. Moved, never copied; nothing prints it.
class SecretKey {
 public:
  SecretKey();  // zeros
  static SecretKey Random();
  std::span<std::byte, kKeyBytes> bytes() { return std::span<std::byte, kKeyBytes>(page_.get(), kKeyBytes); }
  std::span<const std::byte, kKeyBytes> bytes() const {
    return std::span<const std::byte, kKeyBytes>(page_.get(), kKeyBytes);
  }

 private:
  struct Wipe {
    void operator()(std::byte* page) const;
  };
  std::unique_ptr<std::byte, Wipe> page_;
};

// 32 bytes as they are, 64 hexadecimal digits, or 44 characters of base64; white space may stand behind
// digits. InvalidArgument for anything else, NotFound where no file is, PermissionDenied for one that this
// process may not read, FailedPrecondition for one that others may read or write: only its owner may, and a
// group if the owner is root (as Kubernetes and systemd hand out secrets).
absl::StatusOr<SecretKey> ReadKeyFile(const std::string& path);
// What such a file holds, as ReadKeyFile reads it. `text` stays the caller's to wipe.
absl::StatusOr<SecretKey> ParseKey(std::string_view text);

}  // namespace kvtide
