// The two products that gradients are made of, over the same slices; included by generic.h.
#pragma once

#include "kernels/generic_multiply.h"

namespace accel_tf {
namespace {

// dy of four rows, for kVectors registers of the batch.
template <class Vec, int kWidth, int kVectors>
struct FourRows {
  typename Vec::Reg dy[4][kVectors];

  FourRows(const int32_t* rows, const float* all, int b) {
    for (int r = 0; r < 4; ++r) {
      const float* row = all + int64_t{rows[r]} * kWidth + b;
      for (int v = 0; v < kVectors; ++v) dy[r][v] = Vec::Load(row + v * Vec::kLanes);
    }
  }
};

// dx[column] += weight · dy[row] for the rows kRow … 3 of one step. The tile of dx stays in the L1
// cache: that is why the transposed matrix need not exist.
template <class Vec, int kWidth, int kVectors, int kRow>
inline void ScatterStep(typename Vec::Quad weights, uint64_t columns,
                        const FourRows<Vec, kWidth, kVectors>& rows, float* dx) {
  float* column = dx + Column(columns, kRow) * kWidth;
  const auto weight = Vec::template Broadcast<kRow>(weights);
  for (int v = 0; v < kVectors; ++v) {
    float* at = column + v * Vec::kLanes;
    Vec::Store(at, Vec::MultiplyAdd(weight, rows.dy[kRow][v], Vec::Load(at)));
  }
  if constexpr (kRow < 3) {
    ScatterStep<Vec, kWidth, kVectors, kRow + 1>(weights, columns, rows, dx);
  }
}

// The same where the rows share the column, which is read and written once for all four.
template <class Vec, int kWidth, int kVectors>
inline void SharedScatterStep(typename Vec::Quad weights,
                              const FourRows<Vec, kWidth, kVectors>& rows, float* column) {
  const auto w0 = Vec::template Broadcast<0>(weights), w1 = Vec::template Broadcast<1>(weights);
  const auto w2 = Vec::template Broadcast<2>(weights), w3 = Vec::template Broadcast<3>(weights);
  for (int v = 0; v < kVectors; ++v) {
    float* at = column + v * Vec::kLanes;
    auto sum = Vec::MultiplyAdd(w0, rows.dy[0][v], Vec::Load(at));
    sum = Vec::MultiplyAdd(w1, rows.dy[1][v], sum);
    sum = Vec::MultiplyAdd(w2, rows.dy[2][v], sum);
    Vec::Store(at, Vec::MultiplyAdd(w3, rows.dy[3][v], sum));
  }
}

template <class Vec, int kWidth>
constexpr int GradientVectors() {
  constexpr int kAll = kWidth / Vec::kLanes;
  return kAll < Vec::kGradientVectors ? kAll : Vec::kGradientVectors;
}

template <class Vec, int kWidth, bool kShared, class Value>
void TransposedSlices(const Sliced& w, const Value* values, int64_t begin, int64_t end,
                      const float* dy, float* dx) {
  constexpr int kVectors = GradientVectors<Vec, kWidth>();
  for (int64_t s = begin; s < end; ++s) {
    SliceView<Value> quad = ViewSlice(w, values, s);
    const int stride = kShared ? w.height : 4;
    for (int h = 0; h < w.height; h += 4, quad.values += 4, quad.rows += 4) {
      for (int b = 0; b < kWidth; b += kVectors * Vec::kLanes) {
        const FourRows<Vec, kWidth, kVectors> rows(quad.rows, dy, b);
        for (int64_t p = 0; p < quad.steps; ++p) {
          const auto weights = Vec::LoadQuad(quad.values + p * stride);
          if constexpr (kShared) {
            SharedScatterStep(weights, rows, dx + int64_t{quad.columns[p]} * kWidth + b);
          } else {
            ScatterStep<Vec, kWidth, kVectors, 0>(weights, FourColumns(quad.columns + p * 4), rows,
                                                  dx + b);
          }
        }
      }
    }
  }
}

template <class Vec, int kWidth, bool kShared>
void SampleSlices(const Sliced& pattern, int64_t begin, int64_t end, const float* dy,
                  const float* x, float* d) {
  constexpr int kVectors = GradientVectors<Vec, kWidth>();
  for (int64_t s = begin; s < end; ++s) {
    SliceView<float> quad = ViewSlice(pattern, d, s);
    const int stride = kShared ? pattern.height : 4;
    float* out = d + pattern.step_starts[s] * int64_t{pattern.height};
    for (int h = 0; h < pattern.height; h += 4, out += 4, quad.rows += 4) {
      for (int b = 0; b < kWidth; b += kVectors * Vec::kLanes) {
        const FourRows<Vec, kWidth, kVectors> rows(quad.rows, dy, b);
        for (int64_t p = 0; p < quad.steps; ++p) {
          const uint64_t columns = kShared ? 0 : FourColumns(quad.columns + p * 4);
          typename Vec::Reg sums[4];
          for (int r = 0; r < 4; ++r) {
            const int64_t column = kShared ? quad.columns[p] : Column(columns, r);
            const float* at = x + column * kWidth + b;
            sums[r] = Vec::Zero();
            for (int v = 0; v < kVectors; ++v) {
              sums[r] = Vec::MultiplyAdd(rows.dy[r][v], Vec::Load(at + v * Vec::kLanes), sums[r]);
            }
          }
          float* element = out + p * stride;
          Vec::StoreFour(element, Vec::AddFour(Vec::LoadFour(element),
                                               Vec::SumFour(sums[0], sums[1], sums[2], sums[3])));
        }
      }
    }
  }
}

template <class Vec>
void MultiplyTransposed(const Sliced& w, int64_t begin, int64_t end, const float* dy, int width,
                        float* dx) {
  const auto with = [&](const auto* values) {
    if (width == kMinWidth) {
      return w.shared ? TransposedSlices<Vec, kMinWidth, true>(w, values, begin, end, dy, dx)
                      : TransposedSlices<Vec, kMinWidth, false>(w, values, begin, end, dy, dx);
    }
    return w.shared ? TransposedSlices<Vec, kMaxWidth, true>(w, values, begin, end, dy, dx)
                    : TransposedSlices<Vec, kMaxWidth, false>(w, values, begin, end, dy, dx);
  };
  return w.int8_values != nullptr ? with(w.int8_values) : with(w.values);
}

template <class Vec>
void Sample(const Sliced& pattern, int64_t begin, int64_t end, const float* dy, const float* x,
            int width, float* d) {
  if (width == kMinWidth) {
    return pattern.shared ? SampleSlices<Vec, kMinWidth, true>(pattern, begin, end, dy, x, d)
                          : SampleSlices<Vec, kMinWidth, false>(pattern, begin, end, dy, x, d);
  }
  return pattern.shared ? SampleSlices<Vec, kMaxWidth, true>(pattern, begin, end, dy, x, d)
                        : SampleSlices<Vec, kMaxWidth, false>(pattern, begin, end, dy, x, d);
}

}  // namespace
}  // namespace accel_tf
