// From a sparse matrix to the plan, the columns and the values that the kernels read: slowly, one
// rule of kernels/sliced.h after the other.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

namespace accel_tf {

// A column that a row or, with shared columns, a block of rows has, and the weight of each row.
struct Nonzero {
  int64_t column;
  std::vector<float> weights;
};

// groups[g] holds the non-zeros of row g or, if `shared`, of the rows from g · height on. They may
// stand in any order, and a column may occur more than once: it then counts as often.
struct SparseMatrix {
  int64_t rows, cols;
  int height;
  bool shared;
  std::vector<std::vector<Nonzero>> groups;

  int64_t group_rows() const { return shared ? height : 1; }
};

// Where a value belongs; -1 for no row, or for the column of zeros.
struct Place {
  int64_t row, column;
};

struct Packed {
  std::vector<int32_t> plan;
  std::vector<uint16_t> columns;
  std::vector<float> values;
  std::vector<Place> places;  // of each of the values
};

// Chunk c has the rows [chunk_rows[c], chunk_rows[c + 1]), beginning with a whole group.
inline Packed Pack(const SparseMatrix& m, int64_t tile, std::vector<int32_t> chunk_rows) {
  struct Line {
    int64_t row;  // the first one of its group
    std::vector<Nonzero> nonzeros;
  };
  Packed packed;
  std::vector<int32_t> slice_starts = {0}, step_starts = {0}, slice_rows;
  const int64_t tiles = (m.cols + tile - 1) / tile;

  for (size_t c = 0; c + 1 < chunk_rows.size(); ++c) {
    const int64_t begin = chunk_rows[c], end = chunk_rows[c + 1];
    for (int64_t t = 0; t < tiles; ++t) {
      const int64_t width = std::min(tile, m.cols - t * tile);
      // The groups of this chunk that have non-zeros in this tile, those with most of them first.
      std::vector<Line> lines;
      for (int64_t row = begin; row < end; row += m.group_rows()) {
        Line line{row, {}};
        for (const Nonzero& nonzero : m.groups[row / m.group_rows()]) {
          if (nonzero.column / tile == t) line.nonzeros.push_back(nonzero);
        }
        if (!line.nonzeros.empty()) lines.push_back(line);
      }
      std::stable_sort(lines.begin(), lines.end(), [](const Line& a, const Line& b) {
        return a.nonzeros.size() > b.nonzeros.size();
      });

      const size_t lines_per_slice = m.shared ? 1 : m.height;
      for (size_t first = 0; first < lines.size(); first += lines_per_slice) {
        const size_t steps = lines[first].nonzeros.size();
        for (size_t step = 0; step < steps; ++step) {
          for (int lane = 0; lane < m.height; ++lane) {
            const size_t index = first + (m.shared ? 0 : lane);
            const int64_t member = m.shared ? lane : 0;  // of its group
            const Line* line = index < lines.size() ? &lines[index] : nullptr;
            const int64_t row = line ? std::min(line->row + member, end) : end;
            const Nonzero* nonzero =
                line && step < line->nonzeros.size() ? &line->nonzeros[step] : nullptr;
            if (step == 0) slice_rows.push_back(static_cast<int32_t>(row - begin));
            if (lane == 0 || !m.shared) {
              // Beside `tile`, whatever is past the last column stands for zeros.
              const int64_t zeros = packed.columns.size() % 2 == 0 ? width : tile;
              packed.columns.push_back(
                  static_cast<uint16_t>(nonzero ? nonzero->column - t * tile : zeros));
            }
            packed.values.push_back(nonzero && row < end ? nonzero->weights[member] : 0.0f);
            packed.places.push_back({row < end ? row : -1, nonzero ? nonzero->column : -1});
          }
        }
        step_starts.push_back(static_cast<int32_t>(step_starts.back() + steps));
      }
      slice_starts.push_back(static_cast<int32_t>(step_starts.size() - 1));
    }
  }

  packed.plan = {static_cast<int32_t>(tile), static_cast<int32_t>(chunk_rows.size() - 1),
                 static_cast<int32_t>(step_starts.size() - 1)};
  for (const auto* part : {&chunk_rows, &slice_starts, &step_starts, &slice_rows}) {
    packed.plan.insert(packed.plan.end(), part->begin(), part->end());
  }
  return packed;
}

}  // namespace accel_tf
