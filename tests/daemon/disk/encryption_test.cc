// Encrypted messages against what others have computed: HKDF and AES-256-GCM put together by Python's
// cryptography package (tests/golden/disk/decrypt.py has it); and that any difference keeps them shut.
#include "daemon/disk/encryption.h"

#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

using Bytes = std::vector<std::byte>;

Bytes BytesOf(const std::string& text) {
  const auto* const data = reinterpret_cast<const std::byte*>(text.data());
  return Bytes(data, data + text.size());
}
template <class Range>
std::string Hex(const Range& bytes) {
  return absl::BytesToHexString({reinterpret_cast<const char*>(bytes.data()), bytes.size()});
}

SecretKey CountingKey() {
  SecretKey key;
  for (size_t i = 0; i < kKeyBytes; i++) key.bytes()[i] = static_cast<std::byte>(i);
  return key;
}
Salt CountingSalt() {
  Salt salt;
  for (size_t i = 0; i < salt.size(); i++) salt[i] = static_cast<std::byte>(100 + i);
  return salt;
}

TEST(Encryption, IsHkdfAndAesGcmAsOthersComputeThem) {
  Bytes message = BytesOf("sixty-four tokens of one sequence");
  const Tag tag = Encrypt(CountingKey(), "purpose", CountingSalt(), BytesOf("place 7"), message);
  EXPECT_EQ(Hex(message), "71d084ccbaa26a6947391cbcc80f79d3acc9d1602e176183002578483418d2d6ea");
  EXPECT_EQ(Hex(tag), "f08ac19ae21d28a1634a2b7156a1a62c");
}

TEST(Encryption, PiecesAreOneMessage) {
  for (const size_t cut : {0u, 1u, 15u, 16u, 17u, 4096u, 9999u}) {
    Bytes whole(10'000), pieces(10'000);
    const Tag tag = Encrypt(CountingKey(), "p", CountingSalt(), {}, whole);
    EncryptedStream stream(EncryptedStream::Way::kEncrypt, CountingKey(), "p", CountingSalt(), {});
    stream.Add(std::span(pieces).first(cut));
    stream.Add(std::span(pieces).subspan(cut));
    EXPECT_EQ(stream.Finish(), tag);
    EXPECT_EQ(pieces, whole);
    EXPECT_TRUE(Decrypt(CountingKey(), "p", CountingSalt(), {}, tag, whole));
    EXPECT_EQ(whole, Bytes(10'000));
  }
}

TEST(Encryption, AnyDifferenceKeepsItShut) {
  const Bytes plain = BytesOf("message"), bound = BytesOf("bound");
  Bytes encrypted = plain;
  const Tag tag = Encrypt(CountingKey(), "p", CountingSalt(), bound, encrypted);
  const auto opens = [&](const SecretKey& key, std::string_view purpose, const Salt& salt, const Bytes& to,
                         const Tag& with,
                         Bytes message) { return Decrypt(key, purpose, salt, to, with, message); };
  EXPECT_TRUE(opens(CountingKey(), "p", CountingSalt(), bound, tag, encrypted));
  SecretKey key = CountingKey();
  key.bytes()[31] ^= std::byte{1};
  EXPECT_FALSE(opens(key, "p", CountingSalt(), bound, tag, encrypted));
  EXPECT_FALSE(opens(CountingKey(), "q", CountingSalt(), bound, tag, encrypted));
  Salt salt = CountingSalt();
  salt[0] ^= std::byte{1};
  EXPECT_FALSE(opens(CountingKey(), "p", salt, bound, tag, encrypted));
  EXPECT_FALSE(opens(CountingKey(), "p", CountingSalt(), BytesOf("bounD"), tag, encrypted));
  for (size_t i = 0; i < tag.size(); i++) {
    Tag other = tag;
    other[i] ^= std::byte{128};
    EXPECT_FALSE(opens(CountingKey(), "p", CountingSalt(), bound, other, encrypted)) << i;
  }
  for (size_t i = 0; i < encrypted.size(); i++) {
    Bytes other = encrypted;
    other[i] ^= std::byte{1};
    EXPECT_FALSE(opens(CountingKey(), "p", CountingSalt(), bound, tag, other)) << i;
  }
  encrypted.pop_back();
  EXPECT_FALSE(opens(CountingKey(), "p", CountingSalt(), bound, tag, encrypted));
}

TEST(Encryption, SaltsDiffer) { EXPECT_NE(NewSalt(), NewSalt()); }

}  // namespace
}  // namespace kvtide
