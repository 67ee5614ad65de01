// The beginning of a value: frozen bytes, and every damage is noticed.
#include "daemon/remote/value_header.h"

#include <xxhash.h>

#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "gtest/gtest.h"

namespace kvtide {
namespace {

ValueHeader Example() {
  ValueHeader header;
  BlockLabel& label = header.label;
  label.write_id = 0x0102030405060708;
  label.bytes = 5'000'000;
  label.checksum = 0x1112131415161718;
  label.model_hash = 1;
  label.sequence = 2;
  label.name_space_hash = 3;
  label.tenant = 4;
  label.group = 5;
  label.index = 6;
  label.chain = {7, 8};
  label.k_type = "q8_0";
  label.v_type = "turbo4";
  label.codec_version_k = 9;
  label.codec_version_v = 10;
  label.profile_hash = 11;
  label.layout_hash = 12;
  header.piece_bytes = 2 << 20;
  return header;
}
absl::StatusOr<ValueHeader> Decode(const std::string& text) {
  return DecodeValueHeader(std::as_bytes(std::span(text.data(), text.size())));
}

TEST(ValueHeaderTest, ComesBackAndIsFrozen) {
  const std::string text = EncodeValueHeader(Example());
  ASSERT_EQ(text.size(), kValueHeaderBytes);
  const ValueHeader back = Decode(text + "bytes of the block").value();
  EXPECT_EQ(back.label, Example().label);
  EXPECT_EQ(back.piece_bytes, Example().piece_bytes);
  EXPECT_EQ(back.pieces(), 3u);
  EXPECT_EQ(absl::BytesToHexString(text.substr(0, 48)),
            "6b74696476616c310100000001000000080706050403020140"
            "4b4c0000000000181716151413121100002000000000"
            "00");
}

TEST(ValueHeaderTest, EveryChangedBitIsNoticed) {
  const std::string text = EncodeValueHeader(Example());
  for (size_t i = 0; i < text.size(); i++)
    for (int bit = 0; bit < 8; bit++) {
      std::string changed = text;
      changed[i] = static_cast<char>(changed[i] ^ (1 << bit));
      EXPECT_TRUE(absl::IsDataLoss(Decode(changed).status())) << i;
    }
  for (size_t bytes = 0; bytes < text.size(); bytes++)
    EXPECT_TRUE(absl::IsDataLoss(Decode(text.substr(0, bytes)).status()));
}

TEST(ValueHeaderTest, ANameWithoutAnEndIsDamage) {
  for (const char* const name : {"q8_0", "turbo4"}) {
    std::string text = EncodeValueHeader(Example());
    text.replace(text.find(name), 16, 16, 'x');
    const uint64_t checksum = XXH3_64bits(text.data(), text.size() - sizeof checksum);
    text.replace(text.size() - sizeof checksum, sizeof checksum, reinterpret_cast<const char*>(&checksum),
                 sizeof checksum);
    EXPECT_TRUE(absl::StrContains(Decode(text).status().message(), "without an end")) << Decode(text).status();
  }
}

TEST(ValueHeaderTest, WhatIsNotWantedHasAName) {
  const BlockLabel wanted = Example().label;
  BlockLabel any = wanted;
  any.checksum = 0;
  any.bytes = 0;
  any.write_id = any.sequence = any.profile_hash = 99;
  EXPECT_TRUE(CheckValueLabel(wanted, any).ok());
  BlockLabel other = wanted;
  other.codec_version_k++;
  EXPECT_TRUE(absl::StrContains(CheckValueLabel(other, wanted).message(), "codec version"));
}

}  // namespace
}  // namespace kvtide
