#include "clients/cli/terminal/table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace kvtide::cli {

void Table::AddRow(std::vector<std::string> cells, Paint paint) {
  cells.resize(columns_.size());
  for (std::string& cell : cells) cell = Printable(cell);
  rows_.push_back({std::move(cells), paint});
}

std::string Table::Render(const Terminal& terminal) const {
  std::vector<int> widths;
  for (size_t c = 0; c < columns_.size(); ++c) {
    int width = DisplayWidth(columns_[c].title);
    for (const Row& row : rows_) width = std::max(width, DisplayWidth(row.cells[c]));
    widths.push_back(width);
  }
  const auto line = [&](const std::vector<std::string>& cells) {
    std::string text;
    for (size_t c = 0; c < columns_.size(); ++c) {
      const std::string pad(widths[c] - DisplayWidth(cells[c]), ' ');
      if (c > 0) text += "  ";
      text += columns_[c].align == Align::kLeft ? cells[c] + pad : pad + cells[c];
    }
    while (!text.empty() && text.back() == ' ') text.pop_back();
    return text;
  };
  std::vector<std::string> titles;
  for (const Column& column : columns_) titles.push_back(column.title);
  std::string out = terminal.Painted(line(titles), Paint::kBold) + "\n";
  for (const Row& row : rows_) absl::StrAppend(&out, terminal.Painted(line(row.cells), row.paint), "\n");
  return out;
}

}  // namespace kvtide::cli
