// What the terminal can do, and numbers as people read them. Colours only where a person looks (a terminal,
// no NO_COLOR, TERM other than dumb).
#pragma once

#include <cstdint>
#include <string>

namespace kvtide::cli {

enum class Paint { kPlain, kBold, kDim, kGreen, kYellow, kRed, kCyan };

class Terminal {
 public:
  // For standard output or standard error (1 or 2).
  static Terminal Of(int file_descriptor);
  Terminal(bool interactive, bool colour, int width)
      : interactive_(interactive), colour_(colour), width_(width) {}

  bool interactive() const { return interactive_; }
  bool colour() const { return colour_; }
  int width() const { return width_; }
  std::string Painted(const std::string& text, Paint paint) const;

 private:
  bool interactive_;
  bool colour_;
  int width_;
};

// Columns that a text takes: UTF-8 characters, escape sequences not counted.
int DisplayWidth(const std::string& text);

// A text of somebody else's, such as a name, as it may be shown: control characters (also the C1 ones in
// UTF-8) become \n, \x1b.
std::string Printable(const std::string& text);

// The same of a text of several lines, such as a report or the end of a log: line ends, tabs and colours
// stay.
std::string PrintableLines(const std::string& text);

// JSON as it may be shown: control characters that it lets through, DEL and the C1 ones, become \u009b; its
// values stay the same.
std::string PrintableJson(const std::string& json);

std::string CountText(double count);       // "950", "12.3k", "4.1M"
std::string DurationText(double seconds);  // "8 s", "2:05", "1:02:05"

}  // namespace kvtide::cli
