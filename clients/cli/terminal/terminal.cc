#include "clients/cli/terminal/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace kvtide::cli {
namespace {

const char* PaintCode(Paint paint) {
  switch (paint) {
    case Paint::kPlain:
      return "";
    case Paint::kBold:
      return "\x1b[1m";
    case Paint::kDim:
      return "\x1b[2m";
    case Paint::kGreen:
      return "\x1b[32m";
    case Paint::kYellow:
      return "\x1b[33m";
    case Paint::kRed:
      return "\x1b[31m";
    case Paint::kCyan:
      return "\x1b[36m";
  }
  return "";
}

bool IsSet(const char* variable) {
  const char* value = std::getenv(variable);
  return value != nullptr && *value != '\0';
}

// Of a colour that begins at `at`, "\x1b[1;31m": its characters; 0 where none begins.
size_t ColourLength(const std::string& text, size_t at) {
  if (text.compare(at, 2, "\x1b[") != 0) return 0;
  const size_t end = text.find_first_not_of("0123456789;", at + 2);
  return end != std::string::npos && text[end] == 'm' ? end + 1 - at : 0;
}

// Of the control character that begins at `at`: its code, and its bytes in UTF-8; 0 bytes where there is
// none.
size_t ControlLength(const std::string& text, size_t at, unsigned* code) {
  const auto byte = static_cast<unsigned char>(text[at]);
  *code = byte;
  if (byte < 0x20 || byte == 0x7f) return 1;
  if (byte != 0xc2 || at + 1 == text.size() || static_cast<unsigned char>(text[at + 1]) >= 0xa0) return 0;
  *code = static_cast<unsigned char>(text[at + 1]);
  return 2;
}

std::string Escaped(const std::string& text, const char* format, bool lines) {
  std::string out;
  for (size_t i = 0, bytes = 1; i < text.size(); i += bytes) {
    unsigned code = 0;
    const size_t control = ControlLength(text, i, &code);
    const bool kept = control == 0 || (lines && (code == '\n' || code == '\t'));
    const size_t whole = kept ? 1 : lines ? ColourLength(text, i) : 0;
    bytes = std::max(control, whole);
    if (whole > 0) {
      out.append(text, i, bytes);
    } else if (code == '\n') {
      out += "\\n";
    } else {
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), format, code);
      out += escaped;
    }
  }
  return out;
}

}  // namespace

Terminal Terminal::Of(int file_descriptor) {
  const char* term = std::getenv("TERM");
  const bool interactive =
      isatty(file_descriptor) != 0 && !(term != nullptr && std::strcmp(term, "dumb") == 0);
  winsize size{};
  int width = 100;
  if (interactive && ioctl(file_descriptor, TIOCGWINSZ, &size) == 0 && size.ws_col > 20) width = size.ws_col;
  return Terminal(interactive, interactive && !IsSet("NO_COLOR"), width);
}

std::string Terminal::Painted(const std::string& text, Paint paint) const {
  if (!colour_ || paint == Paint::kPlain) return text;
  return absl::StrCat(PaintCode(paint), text, "\x1b[0m");
}

int DisplayWidth(const std::string& text) {
  int width = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\x1b') {
      while (i < text.size() && text[i] != 'm') ++i;
    } else if ((static_cast<unsigned char>(text[i]) & 0xC0) != 0x80) {
      ++width;
    }
  }
  return width;
}

std::string Printable(const std::string& text) { return Escaped(text, "\\x%02x", false); }
std::string PrintableLines(const std::string& text) { return Escaped(text, "\\x%02x", true); }
std::string PrintableJson(const std::string& json) { return Escaped(json, "\\u%04x", true); }

std::string CountText(double count) {
  if (count < 1000) return absl::StrFormat("%.0f", count);
  if (count < 999.95e3) return absl::StrFormat("%.1fk", count / 1e3);
  return absl::StrFormat("%.1fM", count / 1e6);
}

std::string DurationText(double seconds) {
  const int64_t whole = std::llround(std::min(std::max(seconds, 0.0), 3.6e8));
  if (whole < 60) return absl::StrCat(whole, " s");
  if (whole < 3600) return absl::StrFormat("%d:%02d", whole / 60, whole % 60);
  return absl::StrFormat("%d:%02d:%02d", whole / 3600, whole / 60 % 60, whole % 60);
}

}  // namespace kvtide::cli
