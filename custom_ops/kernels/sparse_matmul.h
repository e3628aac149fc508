// The products on whole arrays: cut into pieces of work, each of which owns its outputs.
//
// Results do not depend on how the pieces are spread over threads: every output is summed by one
// call of one kernel, in an order that the matrix and the batch size alone decide.
#pragma once

#include <cstdint>
#include <functional>
#include <string>

#include "kernels/csr.h"
#include "kernels/dispatch.h"

namespace accel_tf {

// Calls work(begin, end) on ranges that cover [0, total) exactly once, on any threads, and returns
// when all are done. `cost` is the work of one unit, in cycles, roughly.
using Work = std::function<void(int64_t begin, int64_t end)>;
using ParallelFor = std::function<void(int64_t total, int64_t cost, const Work& work)>;

// Returns CheckRowPointers, then CheckColumns over all threads; the first fault by position.
std::string Check(const Csr& matrix, const ParallelFor& parallel_for);

// The number of floats that packing `batch` rows of `cols` takes; -1 if it does not fit int64.
int64_t PackedSize(int64_t batch, int64_t cols);

// y[b, n] = Σ_k W[n, k] · x[b, k]
//   w        checked; x: batch × w.cols; y: batch × w.rows
//   scratch  MultiplyScratch floats
int64_t MultiplyScratch(const Csr& w, int64_t batch);
void Multiply(const Kernels& kernels, const Csr& w, const float* x, int64_t batch, float* y,
              float* scratch, const ParallelFor& parallel_for);

// d[p] = Σ_b dy[b, n(p)] · x[b, columns[p]], n(p) being the row of non-zero p
//   pattern  checked; dy: batch × pattern.rows; x: batch × pattern.cols; d: pattern.nonzeros
//   scratch  PackedSize(batch, rows) + PackedSize(batch, cols) floats
void MultiplySampled(const Kernels& kernels, const Csr& pattern, const float* dy, const float* x,
                     int64_t batch, float* d, float* scratch, const ParallelFor& parallel_for);

}  // namespace accel_tf
