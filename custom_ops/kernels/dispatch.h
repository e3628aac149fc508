// The kernels of one instruction set, and the choice among them at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/sliced.h"

namespace accel_tf {

// Activations are packed in tiles of 16 or 32 batch rows, input-major: packed[k * width + b] is
// x[b, k]. A non-zero then multiplies `width` contiguous floats: whole vectors and no gather. A
// tile that holds fewer batch rows is padded with zeros.
constexpr int kMinWidth = 16;
constexpr int kMaxWidth = 32;

enum class Activation { kLinear, kRelu, kRelu6 };

// What becomes of a sum before it is stored: activation(scales[n] · sum + bias[n]).
struct Epilogue {
  const float* scales = nullptr;  // null: 1
  const float* bias = nullptr;    // null: 0
  Activation activation = Activation::kLinear;
};

// No kernel needs alignment, checks its input, allocates, or starts a thread. `slices` are those of
// one chunk and one tile; `x`, `dx` point to that tile's columns, and `sums`, `dy` to that chunk's
// rows, each followed by one more: a column or row of zeros, or one whose result is not wanted.
struct Kernels {
  const char* name;

  // The largest of columns[0, count); 0 if there are none.
  uint16_t (*largest_column)(const uint16_t* columns, int64_t count);

  // packed[i, b] = x[b * stride + i] for i in [0, count), b in [0, batch); zeros up to [slots,
  // width].
  void (*pack)(const float* x, int64_t stride, int64_t batch, int64_t count, int64_t slots,
               int width, float* packed);

  // y[b * stride + i] = epilogue of packed[i, b], for i in [0, count), b in [0, batch).
  void (*unpack)(const float* packed, int64_t count, int64_t batch, int width,
                 const Epilogue& epilogue, float* y, int64_t stride);

  // sums[row, b] += value · x[column, b], for all non-zeros of the slices.
  void (*multiply)(const Sliced& w, int64_t begin, int64_t end, const float* x, int width,
                   float* sums);

  // The same for one batch row: sums[row] += value · x[column].
  void (*multiply_vector)(const Sliced& w, int64_t begin, int64_t end, const float* x, float* sums);

  // dx[column, b] += value · dy[row, b].
  void (*multiply_transposed)(const Sliced& w, int64_t begin, int64_t end, const float* dy,
                              int width, float* dx);

  // d[non-zero] += Σ_b dy[row, b] · x[column, b]: the product of two dense matrices, sampled.
  void (*sample)(const Sliced& pattern, int64_t begin, int64_t end, const float* dy, const float* x,
                 int width, float* d);
};

// The instruction sets that this build has and this host can run, best last.
std::vector<const Kernels*> AvailableKernels();

// The kernels called `name`; the best ones when `name` is null, empty or "auto". Returns null, with
// a sentence in `error`, when there are none of that name.
const Kernels* FindKernels(const char* name, std::string* error);

// The kernels that the environment variable ACCEL_TF_ISA names, likewise. It is read once: a
// process uses one set of kernels throughout, in compiled code as elsewhere.
const Kernels* ChosenKernels(std::string* error);

}  // namespace accel_tf
