// The product of two sparse matrices, row by row (Gustavson 1978, ACM TOMS 4(3), 250–269).
//
//     C[i, :] = Σ_k A[i, k] · B[k, :]
//
// Row i of C is a sum of the rows of B that row i of A names. Nothing else is read, so the work is
// the number of products that can differ from zero; and rows are independent, so threads own them.
#pragma once

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "kernels/csr.h"
#include "kernels/parallel.h"

namespace accel_tf {

// A set of columns that is filled in any order and read in ascending order: one bit for each
// column, one for each word of these that is not zero, and one for each word of those in turn.
class ColumnSet {
 public:
  void Resize(int64_t columns);

  // Adds the columns 64 * word + j, j over the bits of `columns`, of which there is one at least.
  void Insert(int64_t word, uint64_t columns) {
    for (uint64_t* level : data_) {
      const bool was_empty = level[word] == 0;
      level[word] |= columns;
      if (!was_empty) return;
      columns = uint64_t{1} << (word & 63);
      word >>= 6;
    }
  }

  // Calls visit(word, columns) for each word in ascending order, and empties the set.
  template <class Visit>
  void Take(const Visit& visit) {
    for (int64_t top = 0; top < static_cast<int64_t>(levels_[2].size()); ++top) {
      TakeWord(2, top, [&](int64_t middle) {
        TakeWord(1, middle, [&](int64_t word) {
          visit(word, data_[0][word]);
          data_[0][word] = 0;
        });
      });
    }
  }

 private:
  template <class Visit>
  void TakeWord(int level, int64_t word, const Visit& visit) {
    for (uint64_t bits = data_[level][word]; bits != 0; bits &= bits - 1) {
      visit(64 * word + __builtin_ctzll(bits));
    }
    data_[level][word] = 0;
  }

  std::array<std::vector<uint64_t>, 3> levels_;
  std::array<uint64_t*, 3> data_ = {};
};

// C = A·B in two passes, between which the caller allocates C:
//
//     SparseProduct product(a, b);
//     product.Plan(threads);
//     product.Count(row_pointers, parallel_for);
//     product.Fill(row_pointers, columns, values, parallel_for);
//
//   a, b          checked, a.cols == b.rows; their arrays outlive the product
//   row_pointers  a.rows + 1 elements; columns and values: row_pointers[a.rows] elements
//
// Plan returns "", or what is too large. It alone allocates, and may throw std::bad_alloc: 8 bytes
// for each row of A and of B, 20 for each non-zero of B, and up to 17 more of these for each
// thread.
//
// Columns of C ascend within a row and occur once. A sum that cancels is stored as a zero, so that
// the pattern of C follows from those of A and B. Terms are added in the order of A's non-zeros,
// then of B's, by one thread: the bits do not depend on the number of threads.
class SparseProduct {
 public:
  SparseProduct(const Csr& a, const Csr& b) : a_(a), b_(b) {}

  std::string Plan(int threads);
  void Count(int64_t* row_pointers, const ParallelFor& parallel_for);
  void Fill(const int64_t* row_pointers, int32_t* columns, float* values,
            const ParallelFor& parallel_for);

 private:
  // A row of C in the making.
  struct Row {
    ColumnSet columns;
    std::vector<float> sums;
  };

  void RenumberColumns();
  void CompressColumns();
  void MarkRow(int64_t i, ColumnSet* columns) const;
  template <class RowWork>
  void ForEachRow(const ParallelFor& parallel_for, const RowWork& work);

  const Csr a_;
  Csr b_;
  std::vector<int64_t> work_;        // work_[i]: the products, and the rows, before row i
  std::vector<int32_t> used_;        // the columns of B that occur, if they are few; or empty
  std::vector<int32_t> renumbered_;  // the place in used_ of each column in B

  // The pattern of B with the neighbours in one word together, or empty where there are few: row k
  // has the columns of masks_[m] in words_[m], for m from mask_pointers_[k] on. The passes mark all
  // of them at once (Deveci, Trott and Rajamanickam 2018, Parallel Computing 78).
  std::vector<int64_t> mask_pointers_;
  std::vector<int32_t> words_;
  std::vector<uint64_t> masks_;

  std::vector<Row> rows_;  // one for each thread
};

}  // namespace accel_tf
