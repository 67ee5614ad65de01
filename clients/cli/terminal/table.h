// A table for a terminal: columns as wide as their widest cell, texts to the left, numbers to the right, rows
// painted when the terminal has colours. Plain values; rendering prints nothing.
#pragma once

#include <string>
#include <vector>

#include "clients/cli/terminal/terminal.h"

namespace kvtide::cli {

enum class Align { kLeft, kRight };

class Table {
 public:
  struct Column {
    std::string title;
    Align align = Align::kRight;
  };

  explicit Table(std::vector<Column> columns) : columns_(std::move(columns)) {}

  // As many cells as there are columns; fewer are filled up with empty ones.
  // Cells are shown Printable.
  void AddRow(std::vector<std::string> cells, Paint paint = Paint::kPlain);
  bool empty() const { return rows_.empty(); }

  // Lines that end with a newline, titles first.
  std::string Render(const Terminal& terminal) const;

 private:
  struct Row {
    std::vector<std::string> cells;
    Paint paint;
  };
  std::vector<Column> columns_;
  std::vector<Row> rows_;
};

}  // namespace kvtide::cli
