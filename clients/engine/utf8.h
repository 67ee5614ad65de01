// Steps through UTF-8: characters, the valid part of a text, and the part that does not end inside a
// character.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace kvtide::engine {

// Reads the character at *at and moves behind it; false (and *at unchanged) for bytes that are not UTF-8:
// overlong forms, surrogates and values above U+10FFFF are not.
bool NextCharacter(std::string_view text, size_t* at, uint32_t* character);

// The length of the longest prefix that is UTF-8.
size_t ValidUtf8Prefix(std::string_view text);

// The length of the longest prefix that does not end inside a character. Bytes that can never become a
// character count as complete, so that a stream of bad bytes does not wait for ever.
size_t CompleteUtf8Prefix(std::string_view text);

}  // namespace kvtide::engine
