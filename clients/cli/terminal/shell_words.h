// Command lines as a shell reads them.
#pragma once

#include <string>
#include <vector>

namespace kvtide::cli {

// One word of a POSIX shell's command line, quoted where it has to be; control characters are printf's numbers.
std::string ShellQuoted(const std::string& word);

// Words as one line.
std::string ShellLine(const std::vector<std::string>& words);

}  // namespace kvtide::cli
