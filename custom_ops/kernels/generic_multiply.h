// The product, one chunk of rows and one tile of columns at a time; included by generic.h.
#pragma once

#include "kernels/dispatch.h"

namespace accel_tf {
namespace {

// The weights of a slice and its columns, from its first step on.
template <class Value>
struct SliceView {
  int64_t steps;
  const Value* values;
  const uint16_t* columns;
  const int32_t* rows;
};

template <class Value>
inline SliceView<Value> ViewSlice(const Sliced& w, const Value* values, int64_t s) {
  const int64_t first = w.step_starts[s];
  return {w.step_starts[s + 1] - first, values + first * w.height,
          w.columns + first * (w.shared ? 1 : w.height), w.slice_rows + s * w.height};
}

// Four columns in one register: one load instead of four.
inline uint64_t FourColumns(const uint16_t* columns) {
  uint64_t four;
  __builtin_memcpy(&four, columns, sizeof(four));
  return four;
}

// Asks for the weights and columns that lie some slices ahead: with many matrices in a row, each
// comes from memory, and the processor's own prefetching starts anew on every page. Asking beyond
// the end of an array does no harm.
constexpr int64_t kValuesAhead = 2048, kColumnsAhead = 1024;  // bytes

template <class Value>
inline void PrefetchAhead(const SliceView<Value>& slice, int64_t values_per_step,
                          int64_t columns_per_step) {
  constexpr int64_t kLine = 64;
  const char* values = reinterpret_cast<const char*>(slice.values);
  const char* columns = reinterpret_cast<const char*>(slice.columns);
  const int64_t value_bytes = slice.steps * values_per_step * sizeof(Value);
  const int64_t column_bytes = slice.steps * columns_per_step * sizeof(uint16_t);
  for (int64_t i = 0; i < value_bytes; i += kLine) __builtin_prefetch(values + kValuesAhead + i);
  for (int64_t i = 0; i < column_bytes; i += kLine) __builtin_prefetch(columns + kColumnsAhead + i);
}

inline int64_t Column(uint64_t four, int i) { return (four >> (16 * i)) & 0xffff; }

// [sparse-step]
// One step of the rows kRow … kLast of a quad: each weight is broadcast, and meets its own column.
template <class Vec, int kWidth, int kVectors, int kRow, int kLast>
inline void Step(typename Vec::Quad weights, uint64_t columns, const float* x,
                 typename Vec::Reg (*sums)[kVectors]) {
  const float* column = x + Column(columns, kRow) * kWidth;
  const auto weight = Vec::template Broadcast<kRow>(weights);
  for (int v = 0; v < kVectors; ++v) {
    sums[0][v] = Vec::MultiplyAdd(weight, Vec::Load(column + v * Vec::kLanes), sums[0][v]);
  }
  if constexpr (kRow < kLast) {
    Step<Vec, kWidth, kVectors, kRow + 1, kLast>(weights, columns, x, sums + 1);
  }
}
// [/sparse-step]

// [block-step]
// One step where all rows of the quad share a column: it is loaded once, and the multiplications
// alone set the pace.
template <class Vec, int kVectors, int kRow, int kLast>
inline void SharedStep(typename Vec::Quad weights, const typename Vec::Reg* column,
                       typename Vec::Reg (*sums)[kVectors]) {
  const auto weight = Vec::template Broadcast<kRow>(weights);
  for (int v = 0; v < kVectors; ++v) {
    sums[0][v] = Vec::MultiplyAdd(weight, column[v], sums[0][v]);
  }
  if constexpr (kRow < kLast) {
    SharedStep<Vec, kVectors, kRow + 1, kLast>(weights, column, sums + 1);
  }
}
// [/block-step]

// The rows kFirst … kFirst + kRows - 1 of one quad of a slice. The sums of kRows × kVectors
// registers stay where they are throughout: as many as hide the latency of a multiply-add.
template <class Vec, int kWidth, bool kShared, int kFirst, class Value>
inline void MultiplyRows(const SliceView<Value>& slice, int height, const float* x, float* sums) {
  constexpr int kRows = Vec::kRows;
  constexpr int kAll = kWidth / Vec::kLanes;
  constexpr int kVectors = kAll < Vec::kVectors ? kAll : Vec::kVectors;
  for (int b = 0; b < kWidth; b += kVectors * Vec::kLanes) {
    typename Vec::Reg acc[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) acc[r][v] = Vec::Zero();
    }
    for (int64_t p = 0; p < slice.steps; ++p) {
      const auto weights = Vec::LoadQuad(slice.values + p * height);
      if constexpr (kShared) {
        const float* column = x + int64_t{slice.columns[p]} * kWidth + b;
        typename Vec::Reg loaded[kVectors];
        for (int v = 0; v < kVectors; ++v) loaded[v] = Vec::Load(column + v * Vec::kLanes);
        SharedStep<Vec, kVectors, kFirst, kFirst + kRows - 1>(weights, loaded, acc);
      } else {
        Step<Vec, kWidth, kVectors, kFirst, kFirst + kRows - 1>(
            weights, FourColumns(slice.columns + p * 4), x + b, acc);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      float* sum = sums + int64_t{slice.rows[kFirst + r]} * kWidth + b;
      for (int v = 0; v < kVectors; ++v) {
        Vec::Store(sum + v * Vec::kLanes, Vec::Add(Vec::Load(sum + v * Vec::kLanes), acc[r][v]));
      }
    }
  }
}

template <class Vec, int kWidth, bool kShared, int kFirst, class Value>
inline void MultiplyQuad(const SliceView<Value>& slice, int height, const float* x, float* sums) {
  MultiplyRows<Vec, kWidth, kShared, kFirst>(slice, height, x, sums);
  if constexpr (kFirst + Vec::kRows < 4) {
    MultiplyQuad<Vec, kWidth, kShared, kFirst + Vec::kRows>(slice, height, x, sums);
  }
}

template <class Vec, int kWidth, bool kShared, class Value>
void MultiplySlices(const Sliced& w, const Value* values, int64_t begin, int64_t end,
                    const float* x, float* sums) {
  for (int64_t s = begin; s < end; ++s) {
    SliceView<Value> quad = ViewSlice(w, values, s);
    PrefetchAhead(quad, kShared ? w.height : 4, kShared ? 1 : 4);
    for (int h = 0; h < w.height; h += 4, quad.values += 4, quad.rows += 4) {
      MultiplyQuad<Vec, kWidth, kShared, 0>(quad, kShared ? w.height : 4, x, sums);
    }
  }
}

// One slice for a single batch row: the lanes are its rows, four at a time.
template <class Vec, bool kShared, class Value>
inline void MultiplyVectorQuad(const SliceView<Value>& slice, const float* x, float* sums) {
  constexpr int kSets = 4;  // of sums, for the latency
  typename Vec::Four acc[kSets];
  for (int i = 0; i < kSets; ++i) acc[i] = Vec::ZeroFour();
  const auto step = [&](int64_t p, int i) {
    const auto column = [&] {
      if constexpr (kShared)
        return Vec::BroadcastFour(x[slice.columns[p]]);
      else
        return Vec::GatherFour(x, FourColumns(slice.columns + p * 4));
    }();
    acc[i] = Vec::MultiplyAddFour(Vec::LoadFour(slice.values + p * 4), column, acc[i]);
  };
  int64_t p = 0;
  for (; p + kSets <= slice.steps; p += kSets) {
    if constexpr (!kShared) {
      // Four steps are a cache line of values: no loop of its own is needed to fetch ahead.
      __builtin_prefetch(reinterpret_cast<const char*>(slice.values + p * 4) + kValuesAhead);
      __builtin_prefetch(reinterpret_cast<const char*>(slice.columns + p * 4) + kColumnsAhead);
    }
    for (int i = 0; i < kSets; ++i) step(p + i, i);
  }
  for (; p < slice.steps; ++p) step(p, 0);
  float sum[4];
  Vec::StoreFour(sum, Vec::AddFour(Vec::AddFour(acc[0], acc[1]), Vec::AddFour(acc[2], acc[3])));
  for (int r = 0; r < 4; ++r) sums[slice.rows[r]] += sum[r];
}

// The same for a slice of kTallest rows that share their columns: whole registers of them at a
// time.
template <class Vec, class Value>
inline void MultiplyVectorTallest(const SliceView<Value>& slice, const float* x, float* sums) {
  constexpr int kRegs = kTallest / Vec::kLanes;
  constexpr int kSets = kRegs < 4 ? 4 / kRegs : 1;  // of sums, for the latency
  typename Vec::Reg acc[kSets][kRegs];
  for (int i = 0; i < kSets; ++i) {
    for (int r = 0; r < kRegs; ++r) acc[i][r] = Vec::Zero();
  }
  const auto step = [&](int64_t p, int i) {
    const auto column = Vec::Set(x[slice.columns[p]]);
    const Value* values = slice.values + p * kTallest;
    __builtin_prefetch(reinterpret_cast<const char*>(values) + kValuesAhead);
    for (int r = 0; r < kRegs; ++r) {
      acc[i][r] = Vec::MultiplyAdd(Vec::Load(values + r * Vec::kLanes), column, acc[i][r]);
    }
  };
  int64_t p = 0;
  for (; p + kSets <= slice.steps; p += kSets) {
    for (int i = 0; i < kSets; ++i) step(p + i, i);
  }
  for (; p < slice.steps; ++p) step(p, 0);
  float sum[kTallest];
  for (int r = 0; r < kRegs; ++r) {
    for (int i = 1; i < kSets; ++i) acc[0][r] = Vec::Add(acc[0][r], acc[i][r]);
    Vec::Store(sum + r * Vec::kLanes, acc[0][r]);
  }
  for (int r = 0; r < kTallest; ++r) sums[slice.rows[r]] += sum[r];
}

template <class Vec, bool kShared, class Value>
void MultiplyVectorSlices(const Sliced& w, const Value* values, int64_t begin, int64_t end,
                          const float* x, float* sums) {
  for (int64_t s = begin; s < end; ++s) {
    const SliceView<Value> slice = ViewSlice(w, values, s);
    if constexpr (kShared) {
      if (w.height == kTallest) {
        MultiplyVectorTallest<Vec>(slice, x, sums);
        continue;
      }
      PrefetchAhead(slice, 4, 1);
    }
    MultiplyVectorQuad<Vec, kShared>(slice, x, sums);
  }
}

template <class Vec, int kWidth, class Value>
void MultiplyAs(const Sliced& w, const Value* values, int64_t begin, int64_t end, const float* x,
                float* sums) {
  return w.shared ? MultiplySlices<Vec, kWidth, true>(w, values, begin, end, x, sums)
                  : MultiplySlices<Vec, kWidth, false>(w, values, begin, end, x, sums);
}

template <class Vec>
void Multiply(const Sliced& w, int64_t begin, int64_t end, const float* x, int width, float* sums) {
  const auto with = [&](const auto* values) {
    return width == kMinWidth ? MultiplyAs<Vec, kMinWidth>(w, values, begin, end, x, sums)
                              : MultiplyAs<Vec, kMaxWidth>(w, values, begin, end, x, sums);
  };
  return w.int8_values != nullptr ? with(w.int8_values) : with(w.values);
}

template <class Vec>
void MultiplyVector(const Sliced& w, int64_t begin, int64_t end, const float* x, float* sums) {
  const auto with = [&](const auto* values) {
    return w.shared ? MultiplyVectorSlices<Vec, true>(w, values, begin, end, x, sums)
                    : MultiplyVectorSlices<Vec, false>(w, values, begin, end, x, sums);
  };
  return w.int8_values != nullptr ? with(w.int8_values) : with(w.values);
}

}  // namespace
}  // namespace accel_tf
