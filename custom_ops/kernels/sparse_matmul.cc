// Cuts the products into tiles of the batch and blocks of rows, and hands them to the kernels.
#include "kernels/sparse_matmul.h"

#include <algorithm>

namespace accel_tf {
namespace {

int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The batch in tiles: all of kMaxTile rows, but for the last one, which is the smallest that fits.
struct Tiles {
  int64_t batch;
  int64_t count() const { return CeilDiv(batch, kMaxTile); }
  int64_t rows(int64_t t) const { return std::min<int64_t>(kMaxTile, batch - t * kMaxTile); }
  int width(int64_t t) const {
    const int64_t r = rows(t);
    return r <= 8 ? 8 : r <= 16 ? 16 : kMaxTile;
  }
};

int64_t CostPerRow(const Csr& w, int64_t batch) {
  return (w.nonzeros / std::max<int64_t>(w.rows, 1) + 1) * std::max<int64_t>(batch / 8, 1);
}

void PackAll(const Kernels& kernels, const float* x, int64_t batch, int64_t cols, float* packed,
             const ParallelFor& parallel_for) {
  const Tiles tiles{batch};
  parallel_for(tiles.count(), cols * kMaxTile, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      kernels.pack(x + t * kMaxTile * cols, tiles.rows(t), cols, tiles.width(t),
                   packed + t * kMaxTile * cols);
    }
  });
}

}  // namespace

int64_t PackedSize(int64_t batch, int64_t cols) {
  int64_t size;
  if (batch == 0) return 0;
  const Tiles tiles{batch};
  const int64_t last = tiles.count() - 1;
  return __builtin_mul_overflow(last * kMaxTile + tiles.width(last), cols, &size) ? -1 : size;
}

int64_t MultiplyScratch(const Csr& w, int64_t batch) {
  return batch < kMinPackedBatch ? 0 : PackedSize(batch, w.cols);
}

void Multiply(const Kernels& kernels, const Csr& w, const float* x, int64_t batch, float* y,
              float* scratch, const ParallelFor& parallel_for) {
  if (batch == 0 || w.rows == 0) return;
  const int64_t blocks = CeilDiv(w.rows, kRowBlock);
  const auto rows_of = [&](int64_t block) {
    return std::min<int64_t>((block + 1) * kRowBlock, w.rows);
  };
  if (batch < kMinPackedBatch) {
    parallel_for(blocks, CostPerRow(w, batch) * kRowBlock, [&](int64_t begin, int64_t end) {
      for (int64_t b = 0; b < batch; ++b) {
        kernels.multiply_vector(w, x + b * w.cols, begin * kRowBlock, rows_of(end - 1),
                                y + b * w.rows);
      }
    });
    return;
  }
  PackAll(kernels, x, batch, w.cols, scratch, parallel_for);
  const Tiles tiles{batch};
  // Unit i is block i % blocks of tile i / blocks: neighbours share a packed tile.
  parallel_for(tiles.count() * blocks, CostPerRow(w, kMaxTile) * kRowBlock,
               [&](int64_t begin, int64_t end) {
                 while (begin < end) {
                   const int64_t t = begin / blocks, first = begin % blocks;
                   const int64_t last = std::min(blocks, first + end - begin);
                   kernels.multiply_tile(w, scratch + t * kMaxTile * w.cols, tiles.width(t),
                                         tiles.rows(t), first * kRowBlock, rows_of(last - 1),
                                         y + t * kMaxTile * w.rows, w.rows);
                   begin += last - first;
                 }
               });
}

void MultiplySampled(const Kernels& kernels, const Csr& pattern, const float* dy, const float* x,
                     int64_t batch, float* d, float* scratch, const ParallelFor& parallel_for) {
  std::fill(d, d + pattern.nonzeros, 0.0f);
  if (batch == 0 || pattern.rows == 0) return;
  float* packed_x = scratch + PackedSize(batch, pattern.rows);
  PackAll(kernels, dy, batch, pattern.rows, scratch, parallel_for);
  PackAll(kernels, x, batch, pattern.cols, packed_x, parallel_for);
  const Tiles tiles{batch};
  parallel_for(pattern.rows, CostPerRow(pattern, batch), [&](int64_t begin, int64_t end) {
    for (int64_t t = 0; t < tiles.count(); ++t) {
      kernels.sampled_product(pattern, scratch + t * kMaxTile * pattern.rows,
                              packed_x + t * kMaxTile * pattern.cols, tiles.width(t), begin, end,
                              d);
    }
  });
}

}  // namespace accel_tf
