// Cuts the products into tiles of the batch, chunks of rows and tiles of columns, and hands them to
// the kernels.
#include "kernels/sparse_matmul.h"

#include <algorithm>
#include <atomic>
#include <cstddef>
#include <functional>
#include <limits>
#include <mutex>
#include <new>
#include <vector>

namespace accel_tf {
namespace {

// The batch in tiles: all of kMaxWidth rows, but for the last one, which is as narrow as will do.
struct Batch {
  int64_t size;
  int64_t tiles() const { return size / kMaxWidth + (size % kMaxWidth != 0); }
  int64_t rows(int64_t t) const { return std::min<int64_t>(kMaxWidth, size - t * kMaxWidth); }
  int width(int64_t t) const { return rows(t) <= kMinWidth ? kMinWidth : kMaxWidth; }
  // Of all tiles together.
  int64_t widths() const { return size == 0 ? 0 : (tiles() - 1) * kMaxWidth + width(tiles() - 1); }
};

// An axis of a matrix, cut into parts, each of which is followed by one spare slot when it is
// packed.
struct Axis {
  int64_t size;
  int64_t parts;
  std::function<int64_t(int64_t)> start;  // of part 0 … parts

  int64_t slots() const { return size + parts; }
  int64_t count(int64_t part) const { return start(part + 1) - start(part); }
  int64_t slot(int64_t part) const { return start(part) + part; }
};

Axis Rows(const Sliced& w) {
  return {w.rows, w.chunks, [&w](int64_t c) -> int64_t { return w.chunk_rows[c]; }};
}

Axis Columns(const Sliced& w) {
  // Every tile is packed to its full width, that a column which is past the last one reads zeros.
  return {w.tiles * w.tile, w.tiles, [&w](int64_t t) { return t * w.tile; }};
}

int64_t PackedSize(int64_t widths, int64_t slots) {
  int64_t size;
  return __builtin_mul_overflow(widths, slots, &size) ? -1 : size;
}

int64_t Sum(int64_t a, int64_t b) {
  int64_t sum;
  return a < 0 || b < 0 || __builtin_add_overflow(a, b, &sum) ? -1 : sum;
}

// Packed activations: tile t of the batch starts at t · kMaxWidth · axis.slots().
const float* PackedAt(const float* packed, const Axis& axis, const Batch& batch, int64_t t,
                      int64_t part) {
  return packed + t * kMaxWidth * axis.slots() + axis.slot(part) * batch.width(t);
}

void PackAll(const Kernels& kernels, const float* x, int64_t stride, const Batch& batch,
             const Axis& axis, float* packed, const ParallelFor& parallel_for) {
  const int64_t cost = axis.slots() / std::max<int64_t>(axis.parts, 1) * kMaxWidth / 2;
  parallel_for(batch.tiles() * axis.parts, cost, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / axis.parts, part = i % axis.parts, first = axis.start(part);
      // The last tile of columns may be narrower than the others.
      const int64_t count = std::min(axis.count(part), stride - first);
      kernels.pack(x + t * kMaxWidth * stride + first, stride, batch.rows(t), count,
                   axis.count(part) + 1, batch.width(t),
                   const_cast<float*>(PackedAt(packed, axis, batch, t, part)));
    }
  });
}

// Remembers the fault of the lowest chunk, whichever thread finds it first.
class Faults {
 public:
  bool Check(const Kernels& kernels, const Sliced& w, int64_t chunk) {
    const int64_t begin = w.columns_before(chunk), count = w.columns_before(chunk + 1) - begin;
    if (kernels.largest_column(w.columns + begin, count) <= w.tile) return true;
    return Add(chunk, CheckColumns(w, chunk));
  }

  // Whether `fault` of `chunk` is none.
  bool Add(int64_t chunk, std::string fault) {
    if (fault.empty()) return true;
    std::lock_guard<std::mutex> lock(mutex_);
    if (chunk < chunk_) {
      chunk_ = chunk;
      fault_ = std::move(fault);
    }
    return false;
  }
  std::string first() const { return fault_; }

 private:
  std::mutex mutex_;
  int64_t chunk_ = std::numeric_limits<int64_t>::max();
  std::string fault_;
};

std::string CheckAllColumns(const Kernels& kernels, const Sliced& w,
                            const ParallelFor& parallel_for) {
  Faults faults;
  parallel_for(w.chunks, w.steps() / std::max<int64_t>(w.chunks, 1) / 4 + 1,
               [&](int64_t begin, int64_t end) {
                 for (int64_t c = begin; c < end; ++c) faults.Check(kernels, w, c);
               });
  return faults.first();
}

// The cycles that the non-zeros of one of `parts` take, roughly.
int64_t Cost(const Sliced& w, int64_t parts, int64_t batch_rows) {
  const int64_t values = w.steps() * w.height / std::max<int64_t>(parts, 1) + 1;
  return values * std::max<int64_t>(batch_rows / 16, 1) + w.rows;
}

// Fetches what will be written when the sums are done. The rows of y lie far apart, and are not in
// the cache: written without notice, each would be waited for.
void PrefetchForWriting(const float* y, int64_t stride, int64_t rows, int64_t count) {
  constexpr int64_t kLine = 16;
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t i = 0; i < count; i += kLine) __builtin_prefetch(y + b * stride + i, 1);
  }
}

Epilogue OfRows(Epilogue epilogue, int64_t first) {
  if (epilogue.scales != nullptr) epilogue.scales += first;
  if (epilogue.bias != nullptr) epilogue.bias += first;
  return epilogue;
}

// The activations of one tile of the batch, packed by the thread that multiplies them: that takes a
// thread a few per cent of the time of the product, and less than waiting until others have done
// it, or than touching fresh memory. A thread keeps the memory for its next product.
class PackedTile {
 public:
  // Returns tile t of `x`, packed; at once if that is what the thread packed last in this `call`.
  // Returns null where there is not so much memory.
  const float* Get(int64_t call, const Kernels& kernels, const Sliced& w, const Axis& columns,
                   const float* x, const Batch& batch, int64_t t) {
    if (call == call_ && t == t_) return data();
    // A single row is copied as it is, to be multiplied by multiply_vector.
    const int width = batch.size == 1 ? 1 : batch.width(t);
    const size_t size = columns.slots() * width + kAlignment;
    call_ = -1;
    try {
      if (floats_.size() < size) floats_.resize(size);
    } catch (const std::bad_alloc&) {
      return nullptr;
    }
    for (int64_t part = 0; part < w.tiles; ++part) {
      const int64_t first = part * w.tile;
      kernels.pack(x + t * kMaxWidth * w.cols + first, w.cols, batch.rows(t),
                   std::min(w.tile, w.cols - first), w.tile + 1, width,
                   data() + columns.slot(part) * width);
    }
    call_ = call;
    t_ = t;
    return data();
  }

  static PackedTile& OfThisThread() {
    static thread_local PackedTile tile;
    return tile;
  }

 private:
  static constexpr size_t kAlignment = 16;  // floats: a cache line
  float* data() {
    const size_t past = reinterpret_cast<uintptr_t>(floats_.data()) / sizeof(float) % kAlignment;
    return floats_.data() + (kAlignment - past) % kAlignment;
  }

  std::vector<float> floats_;
  int64_t call_ = -1, t_ = -1;
};

}  // namespace

std::string Multiply(const Kernels& kernels, const Sliced& w, const float* x, int64_t batch_size,
                     const Epilogue& epilogue, float* y, const ParallelFor& parallel_for) {
  static std::atomic<int64_t> calls{0};
  const int64_t call = calls.fetch_add(1);
  const Batch batch{batch_size};
  const Axis columns = Columns(w);
  // With one tile of the batch, the thread that multiplies a chunk checks it, and finds it in its
  // cache; with more, that would be done more than once.
  const bool check_as_we_go = batch.tiles() == 1;
  if (!check_as_we_go) {
    const std::string fault = CheckAllColumns(kernels, w, parallel_for);
    if (!fault.empty()) return fault;
  }
  Faults faults;
  const auto work = [&](int64_t begin, int64_t end) {
    PackedTile& tile = PackedTile::OfThisThread();
    alignas(64) float sums[(kMaxChunkRows + 1) * kMaxWidth];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t t = i / w.chunks, c = i % w.chunks;
      if (check_as_we_go && !faults.Check(kernels, w, c)) continue;
      const float* packed = tile.Get(call, kernels, w, columns, x, batch, t);
      if (packed == nullptr) {
        faults.Add(c, "there is no memory for the packed activations of a thread");
        return;
      }
      const int64_t first = w.chunk_rows[c], rows = w.rows_of(c);
      const int width = batch_size == 1 ? 1 : batch.width(t);
      float* out = y + t * kMaxWidth * w.rows + first;
      PrefetchForWriting(out, w.rows, batch.rows(t), rows);
      std::fill(sums, sums + (rows + 1) * width, 0.0f);
      for (int64_t part = 0; part < w.tiles; ++part) {
        const int32_t* slices = w.slice_starts + c * w.tiles + part;
        const float* at = packed + columns.slot(part) * width;
        if (width == 1) {
          kernels.multiply_vector(w, slices[0], slices[1], at, sums);
        } else {
          kernels.multiply(w, slices[0], slices[1], at, width, sums);
        }
      }
      kernels.unpack(sums, rows, batch.rows(t), width, OfRows(epilogue, first), out, w.rows);
    }
  };
  parallel_for(batch.tiles() * w.chunks, Cost(w, w.chunks, batch.size == 1 ? 1 : kMaxWidth), work);
  return faults.first();
}

int64_t MultiplyTransposedScratch(const Sliced& w, int64_t batch) {
  return PackedSize(Batch{batch}.widths(), Sum(Rows(w).slots(), Columns(w).slots()));
}

std::string MultiplyTransposed(const Kernels& kernels, const Sliced& w, const float* dy,
                               int64_t batch_size, float* dx, float* scratch,
                               const ParallelFor& parallel_for) {
  const std::string fault = CheckAllColumns(kernels, w, parallel_for);
  if (!fault.empty()) return fault;
  const Batch batch{batch_size};
  const Axis rows = Rows(w), columns = Columns(w);
  float* packed_dx = scratch + batch.widths() * rows.slots();
  PackAll(kernels, dy, w.rows, batch, rows, scratch, parallel_for);
  // Each piece owns one tile of columns of dx, which stays in the L1 cache, and goes through the
  // slices of all chunks in that tile.
  parallel_for(batch.tiles() * w.tiles, Cost(w, w.tiles, kMaxWidth) * 2,
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t t = i / w.tiles, part = i % w.tiles;
                   const int width = batch.width(t);
                   float* tile = const_cast<float*>(PackedAt(packed_dx, columns, batch, t, part));
                   std::fill(tile, tile + (w.tile + 1) * width, 0.0f);
                   for (int64_t c = 0; c < w.chunks; ++c) {
                     const int32_t* slices = w.slice_starts + c * w.tiles + part;
                     kernels.multiply_transposed(w, slices[0], slices[1],
                                                 PackedAt(scratch, rows, batch, t, c), width, tile);
                   }
                   const int64_t first = part * w.tile;
                   kernels.unpack(tile, std::min(w.tile, w.cols - first), batch.rows(t), width,
                                  Epilogue{}, dx + t * kMaxWidth * w.cols + first, w.cols);
                 }
               });
  return "";
}

int64_t SampleScratch(const Sliced& pattern, int64_t batch) {
  return MultiplyTransposedScratch(pattern, batch);
}

std::string Sample(const Kernels& kernels, const Sliced& pattern, const float* dy, const float* x,
                   int64_t batch_size, float* d, float* scratch, const ParallelFor& parallel_for) {
  const Batch batch{batch_size};
  const Axis rows = Rows(pattern), columns = Columns(pattern);
  float* packed_x = scratch + batch.widths() * rows.slots();
  PackAll(kernels, dy, pattern.rows, batch, rows, scratch, parallel_for);
  PackAll(kernels, x, pattern.cols, batch, columns, packed_x, parallel_for);
  Faults faults;
  parallel_for(
      pattern.chunks, Cost(pattern, pattern.chunks, batch.size) * 2,
      [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) {
          if (!faults.Check(kernels, pattern, c)) continue;
          const int32_t* slices = pattern.slice_starts + c * pattern.tiles;
          std::fill(d + pattern.step_starts[slices[0]] * int64_t{pattern.height},
                    d + pattern.step_starts[slices[pattern.tiles]] * int64_t{pattern.height}, 0.0f);
          for (int64_t part = 0; part < pattern.tiles; ++part) {
            for (int64_t t = 0; t < batch.tiles(); ++t) {
              kernels.sample(pattern, slices[part], slices[part + 1],
                             PackedAt(scratch, rows, batch, t, c),
                             PackedAt(packed_x, columns, batch, t, part), batch.width(t), d);
            }
          }
        }
      });
  return faults.first();
}

}  // namespace accel_tf
