// The products on whole arrays: cut into pieces of work, each of which owns its outputs.
//
// Results do not depend on how the pieces are spread over threads: every output is summed by one
// call of one kernel, in an order that the matrix and the batch size alone decide.
#pragma once

#include <cstdint>

#include "kernels/csr.h"
#include "kernels/dispatch.h"
#include "kernels/parallel.h"

namespace accel_tf {

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
