// The kernels of one instruction set, and the choice among them at run time.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "kernels/csr.h"

namespace accel_tf {

// Activations are packed in tiles of 8, 16 or 32 batch rows, input-major: packed[k * tile + b] is
// x[b, k]. A non-zero then multiplies `tile` contiguous floats: whole vectors and no gather.
// A tile that holds fewer batch rows is padded with zeros.
constexpr int kMaxTile = 32;

// Below this many batch rows, packing costs more than it saves, and `multiply_vector` runs instead.
constexpr int64_t kMinPackedBatch = 2;

// Outputs are computed in blocks of this many rows of the matrix, then written transposed.
constexpr int kRowBlock = 16;

// No kernel needs alignment, checks its input, allocates, or starts a thread. Rows [begin, end) are
// rows of `matrix`; results outside of them are left alone.
struct Kernels {
  const char* name;

  // packed[0, cols * tile) = the transpose of x[0, batch) × [0, cols), whose rows are `cols` apart.
  // 0 < batch <= tile.
  void (*pack)(const float* x, int64_t batch, int64_t cols, int tile, float* packed);

  // y[b * y_stride + n] = Σ_p values[p] · packed[columns[p], b]    for b in [0, batch), n in
  // [begin, end)
  void (*multiply_tile)(const Csr& matrix, const float* packed, int tile, int64_t batch,
                        int64_t begin, int64_t end, float* y, int64_t y_stride);

  // y[n] = Σ_p values[p] · x[columns[p]]    for n in [begin, end)
  void (*multiply_vector)(const Csr& matrix, const float* x, int64_t begin, int64_t end, float* y);

  // d[p] += Σ_b dy[n, b] · x[columns[p], b]    for p in the rows n in [begin, end), over one tile
  // of packed dy and x: the product of two dense matrices, sampled at the non-zeros.
  void (*sampled_product)(const Csr& pattern, const float* dy, const float* x, int tile,
                          int64_t begin, int64_t end, float* d);
};

// The instruction sets that this build has and this host can run, best last.
std::vector<const Kernels*> AvailableKernels();

// The kernels called `name`; the best ones when `name` is null, empty or "auto". Returns null, with
// a sentence in `error`, when there are none of that name.
const Kernels* FindKernels(const char* name, std::string* error);

}  // namespace accel_tf
