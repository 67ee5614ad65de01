// Messages that only who has the key can read or make: AES-256-GCM (NIST SP 800-38D), by OpenSSL, with a key
// for each message, which HKDF-Expand (RFC 5869, SHA-256) derives from a long-lived one, the purpose of the
// message and 32 random bytes (its salt). No nonce is used twice as each key has one message, and however
// many messages there are, two of the same salt do not occur: random nonces of 96 bits under one key would
// end at 2^32 of them.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "daemon/disk/secret_key.h"

namespace kvtide {

using Salt = std::array<std::byte, 32>;
using Tag = std::array<std::byte, 16>;

Salt NewSalt();

// One message that is encrypted or decrypted in place, piece by piece, in order. What was decrypted is not
// known to be genuine before Matches has said so.
class EncryptedStream {
 public:
  enum class Way { kEncrypt, kDecrypt };
  // `bound` is not part of the message, but a message that was encrypted with other ones does not decrypt.
  EncryptedStream(Way way, const SecretKey& key, std::string_view purpose, const Salt& salt,
                  std::span<const std::byte> bound);
  // Up to 64 GiB in all.
  void Add(std::span<std::byte> piece);
  Tag Finish();                  // kEncrypt, once
  bool Matches(const Tag& tag);  // kDecrypt, once

 private:
  struct Free {
    void operator()(void* context) const;
  };
  std::unique_ptr<void, Free> context_;
};

// A message in one piece.
Tag Encrypt(const SecretKey& key, std::string_view purpose, const Salt& salt,
            std::span<const std::byte> bound, std::span<std::byte> message);
// False: the key, the salt, the tag, what it is bound to or the message is another one; the bytes are noise.
bool Decrypt(const SecretKey& key, std::string_view purpose, const Salt& salt,
             std::span<const std::byte> bound, const Tag& tag, std::span<std::byte> message);

}  // namespace kvtide
