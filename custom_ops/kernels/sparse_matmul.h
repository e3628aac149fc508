// The products on whole arrays: cut into pieces of work, each of which owns its outputs.
//
// Results do not depend on how the pieces are spread over threads: every output is summed by one
// piece, in an order that the matrix and the batch size alone decide.
#pragma once

#include <cstdint>
#include <string>

#include "kernels/dispatch.h"
#include "kernels/parallel.h"
#include "kernels/sliced.h"

namespace accel_tf {

// Each product takes a matrix from ReadPlan, and checks its columns before it uses them: it returns
// "", or a sentence about the first chunk at fault, the output being undefined then. The gradients
// need scratch memory of as many floats as the function before them says, or -1 if that does not
// fit int64; the product keeps a tile of activations for each thread.

// y[b, n] = epilogue of Σ_k W[n, k] · x[b, k]; x: batch × cols, y: batch × rows
std::string Multiply(const Kernels& kernels, const Sliced& w, const float* x, int64_t batch,
                     const Epilogue& epilogue, float* y, const ParallelFor& parallel_for);

// dx[b, k] = Σ_n W[n, k] · dy[b, n]; dy: batch × rows, dx: batch × cols
int64_t MultiplyTransposedScratch(const Sliced& w, int64_t batch);
std::string MultiplyTransposed(const Kernels& kernels, const Sliced& w, const float* dy,
                               int64_t batch, float* dx, float* scratch,
                               const ParallelFor& parallel_for);

// d[p] = Σ_b dy[b, n] · x[b, k], of the row n and the column k of each of the steps() · height
// values p, pads included; dy: batch × rows, x: batch × cols
int64_t SampleScratch(const Sliced& pattern, int64_t batch);
std::string Sample(const Kernels& kernels, const Sliced& pattern, const float* dy, const float* x,
                   int64_t batch, float* d, float* scratch, const ParallelFor& parallel_for);

}  // namespace accel_tf
