// Counts, then computes, the rows of a product of two sparse matrices.
#include "kernels/gustavson.h"

#include <algorithm>
#include <atomic>

namespace accel_tf {
namespace {

// A thread is worth its start from about this many products on.
constexpr int64_t kProductsPerThread = 1 << 15;

// Each thread takes about this many pieces, one after the other, so that no slow one delays the
// end.
constexpr int64_t kPiecesPerThread = 16;

// The rows of B that A names lie anywhere: each is asked for this many places before its turn.
constexpr int64_t kAhead = 8;

}  // namespace

void ColumnSet::Resize(int64_t columns) {
  for (size_t i = 0; i < levels_.size(); ++i) {
    columns = columns / 64 + 1;
    levels_[i].assign(columns, 0);
    data_[i] = levels_[i].data();
  }
}

std::string SparseProduct::Plan(int threads) {
  work_.assign(a_.rows + 1, 0);
  for (int64_t i = 0; i < a_.rows; ++i) {
    int64_t total = work_[i] + 1;
    for (int64_t p = a_.row_pointers[i]; p < a_.row_pointers[i + 1]; ++p) {
      const int64_t* row = b_.row_pointers + a_.columns[p];
      if (__builtin_add_overflow(total, row[1] - row[0], &total)) {
        return "the product takes more than 2^63 multiplications, counted up to row " +
               std::to_string(i);
      }
    }
    work_[i + 1] = total;
  }
  // Far more columns than non-zeros: room for each column would be a waste, and could be refused.
  if (b_.cols > 4 * b_.nonzeros + 64) RenumberColumns();
  CompressColumns();
  const int64_t useful = work_[a_.rows] / kProductsPerThread + 1;
  rows_.resize(std::clamp<int64_t>(threads, 1, useful));
  for (Row& row : rows_) {
    row.columns.Resize(b_.cols);
    row.sums.assign(b_.cols, 0.0f);
  }
  return "";
}

void SparseProduct::RenumberColumns() {
  used_.assign(b_.columns, b_.columns + b_.nonzeros);
  std::sort(used_.begin(), used_.end());
  used_.erase(std::unique(used_.begin(), used_.end()), used_.end());
  renumbered_.resize(b_.nonzeros);
  for (int64_t q = 0; q < b_.nonzeros; ++q) {
    const auto place = std::lower_bound(used_.begin(), used_.end(), b_.columns[q]);
    renumbered_[q] = static_cast<int32_t>(place - used_.begin());
  }
  b_.columns = renumbered_.data();
  b_.cols = static_cast<int64_t>(used_.size());
}

void SparseProduct::CompressColumns() {
  int64_t words = 0;
  for (int64_t q = 0; q < b_.nonzeros; ++q) {
    words += q == 0 || b_.columns[q] >> 6 != b_.columns[q - 1] >> 6;
  }
  if (2 * (words + b_.rows) > b_.nonzeros) return;
  mask_pointers_.assign(b_.rows + 1, 0);
  words_.reserve(words + b_.rows);  // a row's first column starts a word, whatever stands before it
  masks_.reserve(words + b_.rows);
  for (int64_t k = 0; k < b_.rows; ++k) {
    int32_t last = -1;
    for (int64_t q = b_.row_pointers[k]; q < b_.row_pointers[k + 1]; ++q) {
      const int32_t word = b_.columns[q] >> 6;
      if (word != last) {
        words_.push_back(last = word);
        masks_.push_back(0);
      }
      masks_.back() |= uint64_t{1} << (b_.columns[q] & 63);
    }
    mask_pointers_[k + 1] = static_cast<int64_t>(words_.size());
  }
}

void SparseProduct::MarkRow(int64_t i, ColumnSet* columns) const {
  const bool compressed = !mask_pointers_.empty();
  const int64_t* pointers = compressed ? mask_pointers_.data() : b_.row_pointers;
  for (int64_t p = a_.row_pointers[i]; p < a_.row_pointers[i + 1]; ++p) {
    const int64_t begin = pointers[a_.columns[p]], end = pointers[a_.columns[p] + 1];
    if (p + kAhead < a_.nonzeros) {
      const int64_t ahead = pointers[a_.columns[p + kAhead]];
      __builtin_prefetch((compressed ? words_.data() : b_.columns) + ahead);
      if (compressed) __builtin_prefetch(masks_.data() + ahead);
    }
    if (compressed) {
      for (int64_t m = begin; m < end; ++m) columns->Insert(words_[m], masks_[m]);
    } else {
      for (int64_t q = begin; q < end; ++q) {
        columns->Insert(b_.columns[q] >> 6, uint64_t{1} << (b_.columns[q] & 63));
      }
    }
  }
}

// Calls work(i, row) for each row i of A, with the `row` of the thread that it runs on.
template <class RowWork>
void SparseProduct::ForEachRow(const ParallelFor& parallel_for, const RowWork& work) {
  const int64_t threads = static_cast<int64_t>(rows_.size());
  const int64_t pieces = threads == 1 ? 1 : threads * kPiecesPerThread;
  const int64_t total = work_[a_.rows];
  const auto first_row = [&](int64_t piece) {
    const int64_t before = total / pieces * piece + total % pieces * piece / pieces;
    return std::lower_bound(work_.begin(), work_.end() - 1, before) - work_.begin();
  };
  std::atomic<int64_t> next{0};
  parallel_for(threads, total / threads + 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread) {
      for (int64_t piece = next++; piece < pieces; piece = next++) {
        const int64_t stop = first_row(piece + 1);
        for (int64_t i = first_row(piece); i < stop; ++i) work(i, &rows_[thread]);
      }
    }
  });
}

void SparseProduct::Count(int64_t* row_pointers, const ParallelFor& parallel_for) {
  ForEachRow(parallel_for, [&](int64_t i, Row* row) {
    MarkRow(i, &row->columns);
    int64_t count = 0;
    row->columns.Take([&](int64_t, uint64_t bits) { count += __builtin_popcountll(bits); });
    row_pointers[i + 1] = count;
  });
  row_pointers[0] = 0;
  for (int64_t i = 0; i < a_.rows; ++i) row_pointers[i + 1] += row_pointers[i];
}

void SparseProduct::Fill(const int64_t* row_pointers, int32_t* columns, float* values,
                         const ParallelFor& parallel_for) {
  ForEachRow(parallel_for, [&](int64_t i, Row* row) {
    MarkRow(i, &row->columns);
    float* const sums = row->sums.data();
    for (int64_t p = a_.row_pointers[i]; p < a_.row_pointers[i + 1]; ++p) {
      const int64_t* range = b_.row_pointers + a_.columns[p];
      const float a = a_.values[p];
      if (p + kAhead < a_.nonzeros) {
        const int64_t ahead = b_.row_pointers[a_.columns[p + kAhead]];
        __builtin_prefetch(b_.columns + ahead);
        __builtin_prefetch(b_.values + ahead);
      }
      for (int64_t q = range[0]; q < range[1]; ++q) sums[b_.columns[q]] += a * b_.values[q];
    }
    int64_t out = row_pointers[i];
    row->columns.Take([&](int64_t word, uint64_t bits) {
      for (; bits != 0; bits &= bits - 1) {
        const int64_t column = 64 * word + __builtin_ctzll(bits);
        columns[out] = used_.empty() ? static_cast<int32_t>(column) : used_[column];
        values[out++] = sums[column];
        sums[column] = 0.0f;
      }
    });
  });
}

}  // namespace accel_tf
