#include "clients/engine/utf8.h"

#include <algorithm>

namespace kvtide::engine {
namespace {

// Bytes of the character that starts with `lead`; 0 when no character does.
size_t CharacterBytes(unsigned char lead) {
  if (lead < 0x80) return 1;
  if (lead >= 0xC2 && lead <= 0xDF) return 2;
  if (lead >= 0xE0 && lead <= 0xEF) return 3;
  if (lead >= 0xF0 && lead <= 0xF4) return 4;
  return 0;
}

bool IsContinuation(char c) { return (static_cast<unsigned char>(c) & 0xC0) == 0x80; }

}  // namespace

bool NextCharacter(std::string_view text, size_t* at, uint32_t* character) {
  if (*at >= text.size()) return false;
  const unsigned char lead = static_cast<unsigned char>(text[*at]);
  const size_t bytes = CharacterBytes(lead);
  if (bytes == 0 || *at + bytes > text.size()) return false;
  uint32_t value = bytes == 1 ? lead : lead & (0xFFu >> (bytes + 1));
  for (size_t i = 1; i < bytes; ++i) {
    const char c = text[*at + i];
    if (!IsContinuation(c)) return false;
    value = value << 6 | (static_cast<unsigned char>(c) & 0x3Fu);
  }
  const uint32_t smallest = bytes == 3 ? 0x800 : bytes == 4 ? 0x10000 : 0;
  if (value < smallest || value > 0x10FFFF || (value >= 0xD800 && value <= 0xDFFF)) return false;
  *at += bytes;
  *character = value;
  return true;
}

size_t ValidUtf8Prefix(std::string_view text) {
  size_t at = 0;
  uint32_t character = 0;
  while (NextCharacter(text, &at, &character)) {
  }
  return at;
}

size_t CompleteUtf8Prefix(std::string_view text) {
  const size_t look_back = std::min<size_t>(3, text.size());
  for (size_t back = 1; back <= look_back; ++back) {
    const char c = text[text.size() - back];
    if (IsContinuation(c)) continue;
    return CharacterBytes(static_cast<unsigned char>(c)) > back ? text.size() - back : text.size();
  }
  return text.size();
}

}  // namespace kvtide::engine
