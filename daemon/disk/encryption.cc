#include "daemon/disk/encryption.h"

#include <openssl/crypto.h>
#include <openssl/evp.h>
#include <openssl/hmac.h>

#include <algorithm>
#include <climits>
#include <string>

#include "kernels/base/check.h"
#include "kernels/base/random_bytes.h"

namespace kvtide {
namespace {

// Looked up once: it takes a lock and longer than the key of a small message.
const EVP_CIPHER* Cipher() {
  static const EVP_CIPHER* const cipher = EVP_CIPHER_fetch(nullptr, "AES-256-GCM", nullptr);
  KVTIDE_CHECK(cipher != nullptr, "OpenSSL has no AES-256-GCM");
  return cipher;
}

using KeyBytes = std::array<unsigned char, kKeyBytes>;

// HKDF-Expand of one block: HMAC(key, purpose | 0 | salt | 1). The key is uniformly random, so that
// HKDF-Extract is not needed (RFC 5869, 3.3).
void DeriveKey(const SecretKey& key, std::string_view purpose, const Salt& salt, KeyBytes* derived) {
  std::string info(purpose);
  info.push_back('\0');
  info.append(reinterpret_cast<const char*>(salt.data()), salt.size());
  info.push_back('\1');
  unsigned int size = 0;
  KVTIDE_CHECK(
      HMAC(EVP_sha256(), key.bytes().data(), kKeyBytes, reinterpret_cast<const unsigned char*>(info.data()),
           info.size(), derived->data(), &size) != nullptr &&
          size == kKeyBytes,
      "HMAC-SHA256");
}

EVP_CIPHER_CTX* ContextOf(void* context) { return static_cast<EVP_CIPHER_CTX*>(context); }

}  // namespace

Salt NewSalt() {
  Salt salt;
  FillRandom(salt);
  return salt;
}

void EncryptedStream::Free::operator()(void* context) const { EVP_CIPHER_CTX_free(ContextOf(context)); }

EncryptedStream::EncryptedStream(Way way, const SecretKey& key, std::string_view purpose, const Salt& salt,
                                 std::span<const std::byte> bound)
    : context_(EVP_CIPHER_CTX_new()) {
  constexpr unsigned char kNonce[12] = {};  // of the only message of its key
  KeyBytes derived;
  DeriveKey(key, purpose, salt, &derived);
  EVP_CIPHER_CTX* const context = ContextOf(context_.get());
  const bool set = context != nullptr && EVP_CipherInit_ex2(context, Cipher(), derived.data(), kNonce,
                                                            way == Way::kEncrypt ? 1 : 0, nullptr) == 1;
  OPENSSL_cleanse(derived.data(), derived.size());
  int size = 0;
  KVTIDE_CHECK(
      set && EVP_CipherUpdate(context, nullptr, &size, reinterpret_cast<const unsigned char*>(bound.data()),
                              static_cast<int>(bound.size())) == 1,
      "AES-256-GCM cannot begin");
}

void EncryptedStream::Add(std::span<std::byte> piece) {
  constexpr size_t kMost = size_t{1} << 30;  // of one call: its sizes are ints
  while (!piece.empty()) {
    const size_t now = std::min(piece.size(), kMost);
    auto* const bytes = reinterpret_cast<unsigned char*>(piece.data());
    int size = 0;
    KVTIDE_CHECK(
        EVP_CipherUpdate(ContextOf(context_.get()), bytes, &size, bytes, static_cast<int>(now)) == 1 &&
            static_cast<size_t>(size) == now,
        "AES-256-GCM");
    piece = piece.subspan(now);
  }
}

Tag EncryptedStream::Finish() {
  Tag tag;
  int size = 0;
  unsigned char none[16];
  KVTIDE_CHECK(EVP_CipherFinal_ex(ContextOf(context_.get()), none, &size) == 1 && size == 0 &&
                   EVP_CIPHER_CTX_ctrl(ContextOf(context_.get()), EVP_CTRL_AEAD_GET_TAG,
                                       static_cast<int>(tag.size()), tag.data()) == 1,
               "AES-256-GCM cannot end");
  return tag;
}

bool EncryptedStream::Matches(const Tag& tag) {
  Tag expected = tag;
  int size = 0;
  unsigned char none[16];
  KVTIDE_CHECK(EVP_CIPHER_CTX_ctrl(ContextOf(context_.get()), EVP_CTRL_AEAD_SET_TAG,
                                   static_cast<int>(expected.size()), expected.data()) == 1,
               "AES-256-GCM takes no tag");
  return EVP_CipherFinal_ex(ContextOf(context_.get()), none, &size) == 1;
}

Tag Encrypt(const SecretKey& key, std::string_view purpose, const Salt& salt,
            std::span<const std::byte> bound, std::span<std::byte> message) {
  EncryptedStream stream(EncryptedStream::Way::kEncrypt, key, purpose, salt, bound);
  stream.Add(message);
  return stream.Finish();
}

bool Decrypt(const SecretKey& key, std::string_view purpose, const Salt& salt,
             std::span<const std::byte> bound, const Tag& tag, std::span<std::byte> message) {
  EncryptedStream stream(EncryptedStream::Way::kDecrypt, key, purpose, salt, bound);
  stream.Add(message);
  return stream.Matches(tag);
}

}  // namespace kvtide
