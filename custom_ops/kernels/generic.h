// The algorithms, written once over a vector type `Vec`; each isa_<name>.cc defines one and
// includes this file.
//
// Everything is in an unnamed namespace, and nothing of the standard library is called: a function
// shared between translation units would be kept by the linker in one version only, perhaps the one
// compiled for instructions that the host lacks.
#pragma once

#include "kernels/dispatch.h"

namespace accel_tf {
namespace {

void Pack(const float* x, int64_t batch, int64_t cols, int tile, float* packed) {
  // Sixteen columns at a time: a cache line of x, which is then read once.
  constexpr int64_t kStep = 16;
  for (int64_t k = 0; k < cols; k += kStep) {
    const int64_t stop = k + kStep < cols ? k + kStep : cols;
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t i = k; i < stop; ++i) packed[i * tile + b] = x[b * cols + i];
    }
    for (int64_t i = k; i < stop; ++i) {
      for (int64_t b = batch; b < tile; ++b) packed[i * tile + b] = 0.0f;
    }
  }
}

// [sparse-row]
// One output for `kTile` batch rows: each non-zero costs one broadcast and kTile / lanes FMAs.
template <class Vec, int kTile>
inline void MultiplyRow(const Csr& w, int64_t n, const float* packed, float* out) {
  constexpr int kVectors = kTile / Vec::kLanes;
  // Two sets of sums, for even and odd non-zeros: an FMA takes four cycles and two start in each,
  // so eight independent sums keep the unit busy; four vectors alone would leave it half idle.
  typename Vec::Reg even[kVectors], odd[kVectors];
  for (int i = 0; i < kVectors; ++i) even[i] = odd[i] = Vec::Zero();
  int64_t p = w.row_pointers[n];
  const int64_t end = w.row_pointers[n + 1];
  for (; p + 1 < end; p += 2) {
    const float* x0 = packed + int64_t{w.columns[p]} * kTile;
    const float* x1 = packed + int64_t{w.columns[p + 1]} * kTile;
    const auto v0 = Vec::Broadcast(w.values[p]), v1 = Vec::Broadcast(w.values[p + 1]);
    for (int i = 0; i < kVectors; ++i) {
      even[i] = Vec::MultiplyAdd(v0, Vec::Load(x0 + i * Vec::kLanes), even[i]);
      odd[i] = Vec::MultiplyAdd(v1, Vec::Load(x1 + i * Vec::kLanes), odd[i]);
    }
  }
  if (p < end) {
    const float* x0 = packed + int64_t{w.columns[p]} * kTile;
    const auto v0 = Vec::Broadcast(w.values[p]);
    for (int i = 0; i < kVectors; ++i)
      even[i] = Vec::MultiplyAdd(v0, Vec::Load(x0 + i * Vec::kLanes), even[i]);
  }
  for (int i = 0; i < kVectors; ++i) Vec::Store(out + i * Vec::kLanes, Vec::Add(even[i], odd[i]));
}
// [/sparse-row]

template <class Vec, int kTile>
void MultiplyTileOf(const Csr& w, const float* packed, int64_t batch, int64_t begin, int64_t end,
                    float* y, int64_t y_stride) {
  float block[kRowBlock * kTile];
  for (int64_t first = begin; first < end; first += kRowBlock) {
    const int64_t rows = end - first < kRowBlock ? end - first : kRowBlock;
    for (int64_t r = 0; r < rows; ++r)
      MultiplyRow<Vec, kTile>(w, first + r, packed, block + r * kTile);
    for (int64_t b = 0; b < batch; ++b) {
      for (int64_t r = 0; r < rows; ++r) y[b * y_stride + first + r] = block[r * kTile + b];
    }
  }
}

template <class Vec>
void MultiplyTile(const Csr& w, const float* packed, int tile, int64_t batch, int64_t begin,
                  int64_t end, float* y, int64_t y_stride) {
  switch (tile) {
    case 8:
      return MultiplyTileOf<Vec, 8>(w, packed, batch, begin, end, y, y_stride);
    case 16:
      return MultiplyTileOf<Vec, 16>(w, packed, batch, begin, end, y, y_stride);
    default:
      return MultiplyTileOf<Vec, kMaxTile>(w, packed, batch, begin, end, y, y_stride);
  }
}

// [vector-row]
// Batch 1: the lanes run along the non-zeros, and x is gathered. Memory bound: each non-zero is
// read once, from wherever it lies, and used once.
template <class Vec>
void MultiplyVector(const Csr& w, const float* x, int64_t begin, int64_t end, float* y) {
  constexpr int64_t kLanes = Vec::kLanes;
  for (int64_t n = begin; n < end; ++n) {
    auto even = Vec::Zero(), odd = Vec::Zero();
    int64_t p = w.row_pointers[n];
    const int64_t stop = w.row_pointers[n + 1];
    for (; p + 2 * kLanes <= stop; p += 2 * kLanes) {
      even = Vec::MultiplyAdd(Vec::Load(w.values + p), Vec::Gather(x, w.columns + p), even);
      odd = Vec::MultiplyAdd(Vec::Load(w.values + p + kLanes),
                             Vec::Gather(x, w.columns + p + kLanes), odd);
    }
    float sum = Vec::Sum(Vec::Add(even, odd));
    for (; p < stop; ++p) sum += w.values[p] * x[w.columns[p]];
    y[n] = sum;
  }
}
// [/vector-row]

template <class Vec, int kTile>
void SampledProductOf(const Csr& pattern, const float* dy, const float* x, int64_t begin,
                      int64_t end, float* d) {
  constexpr int kVectors = kTile / Vec::kLanes;
  for (int64_t n = begin; n < end; ++n) {
    typename Vec::Reg row[kVectors];
    for (int i = 0; i < kVectors; ++i) row[i] = Vec::Load(dy + n * kTile + i * Vec::kLanes);
    for (int64_t p = pattern.row_pointers[n]; p < pattern.row_pointers[n + 1]; ++p) {
      const float* column = x + int64_t{pattern.columns[p]} * kTile;
      auto sum = Vec::Zero();
      for (int i = 0; i < kVectors; ++i)
        sum = Vec::MultiplyAdd(row[i], Vec::Load(column + i * Vec::kLanes), sum);
      d[p] += Vec::Sum(sum);
    }
  }
}

template <class Vec>
void SampledProduct(const Csr& pattern, const float* dy, const float* x, int tile, int64_t begin,
                    int64_t end, float* d) {
  switch (tile) {
    case 8:
      return SampledProductOf<Vec, 8>(pattern, dy, x, begin, end, d);
    case 16:
      return SampledProductOf<Vec, 16>(pattern, dy, x, begin, end, d);
    default:
      return SampledProductOf<Vec, kMaxTile>(pattern, dy, x, begin, end, d);
  }
}

template <class Vec>
constexpr Kernels MakeKernels(const char* name) {
  return {name, Pack, MultiplyTile<Vec>, MultiplyVector<Vec>, SampledProduct<Vec>};
}

}  // namespace
}  // namespace accel_tf
