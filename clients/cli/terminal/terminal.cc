#include "clients/cli/terminal/terminal.h"

#include <sys/ioctl.h>
#include <unistd.h>

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

std::string Printable(const std::string& text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<unsigned char>(text[i]);
    const bool c1 = byte == 0xc2 && i + 1 < text.size() && static_cast<unsigned char>(text[i + 1]) < 0xa0;
    if (byte >= 0x20 && byte != 0x7f && !c1) {
      out += text[i];
    } else if (text[i] == '\n') {
      out += "\\n";
    } else {
      const unsigned code = c1 ? static_cast<unsigned char>(text[++i]) : byte;
      char escaped[8];
      std::snprintf(escaped, sizeof(escaped), "\\x%02x", code);
      out += escaped;
    }
  }
  return out;
}

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
