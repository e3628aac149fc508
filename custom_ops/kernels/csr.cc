// Checks CSR matrices.
#include "kernels/csr.h"

#include <algorithm>
#include <mutex>

namespace accel_tf {
namespace {

std::string At(const char* array, int64_t position, int64_t value) {
  return std::string(array) + "[" + std::to_string(position) + "] = " + std::to_string(value);
}

}  // namespace

std::string CheckRowPointers(const Csr& matrix) {
  const int64_t* pointers = matrix.row_pointers;
  if (pointers[0] != 0) return At("row_pointers", 0, pointers[0]) + ", expected 0";
  for (int64_t n = 0; n < matrix.rows; ++n) {
    if (pointers[n + 1] < pointers[n]) {
      return At("row_pointers", n + 1, pointers[n + 1]) + " is less than " +
             At("row_pointers", n, pointers[n]) + "; expected a sequence that never decreases";
    }
  }
  if (pointers[matrix.rows] != matrix.nonzeros) {
    return At("row_pointers", matrix.rows, pointers[matrix.rows]) +
           ", expected the number of values, " + std::to_string(matrix.nonzeros);
  }
  return "";
}

std::string CheckColumns(const Csr& matrix, int64_t begin, int64_t end) {
  const int32_t* columns = matrix.columns;
  // Branch-free, so that it vectorizes: as unsigned, a negative column is a large one.
  const uint32_t limit =
      static_cast<uint32_t>(std::min<int64_t>(matrix.cols, int64_t{INT32_MAX} + 1));
  uint32_t outside = 0;
  for (int64_t p = begin; p < end; ++p) outside |= static_cast<uint32_t>(columns[p]) >= limit;
  if (!outside) return "";
  while (static_cast<uint32_t>(columns[begin]) < limit) ++begin;
  return At("columns", begin, columns[begin]) + ", expected a value in [0, " +
         std::to_string(matrix.cols) + ")";
}

std::string Check(const Csr& matrix, const ParallelFor& parallel_for) {
  std::string fault = CheckRowPointers(matrix);
  if (!fault.empty()) return fault;
  std::mutex mutex;
  int64_t first = matrix.nonzeros;
  parallel_for(matrix.nonzeros, 1, [&](int64_t begin, int64_t end) {
    std::string found = CheckColumns(matrix, begin, end);
    if (found.empty()) return;
    std::lock_guard<std::mutex> lock(mutex);
    if (begin < first) {
      first = begin;
      fault = std::move(found);
    }
  });
  return fault;
}

}  // namespace accel_tf
