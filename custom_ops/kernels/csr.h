// The matrices of the sparse × sparse product: compressed sparse rows, and the check that makes
// them safe.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/parallel.h"

namespace accel_tf {

// A matrix of `rows` outputs × `cols` inputs. Row n holds the non-zeros p in
// [row_pointers[n], row_pointers[n + 1]): their inputs columns[p] and their weights values[p].
// Columns need not be sorted; a column that occurs twice in a row counts twice.
struct Csr {
  int64_t rows = 0;
  int64_t cols = 0;
  int64_t nonzeros = 0;
  const int64_t* row_pointers = nullptr;  // rows + 1 elements
  const int32_t* columns = nullptr;       // nonzeros elements
  const float* values = nullptr;  // nonzeros elements; may be null where only the pattern counts
};

// Returns "" when row_pointers runs from 0 to nonzeros without a step back; otherwise a sentence
// with the first offending position, what stands there and what was expected. Reads no other array.
std::string CheckRowPointers(const Csr& matrix);

// The same for columns[begin, end): each must lie in [0, cols).
std::string CheckColumns(const Csr& matrix, int64_t begin, int64_t end);

// Returns CheckRowPointers, then CheckColumns over all threads; the first fault by position.
std::string Check(const Csr& matrix, const ParallelFor& parallel_for);

}  // namespace accel_tf
