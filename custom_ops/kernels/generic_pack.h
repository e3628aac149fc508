// Packing: activations into tiles of the batch and back, transposed; included by generic.h.
#pragma once

#include "kernels/dispatch.h"

namespace accel_tf {
namespace {

// Both directions go along kLanes batch rows at a time, which the processor follows and fetches
// ahead of. Batch rows often lie a power of two apart, where all of them fall into the same few
// places of the cache: so a block is as wide as a cache line where it can be, and each is touched
// once.

// `rows` < kLanes: those that are missing are zeros.
template <class Vec>
inline void LoadRows(const float* x, int64_t stride, int64_t rows, typename Vec::Reg* block) {
  if (rows >= Vec::kLanes) {
    for (int j = 0; j < Vec::kLanes; ++j) block[j] = Vec::Load(x + j * stride);
  } else {
    for (int j = 0; j < Vec::kLanes; ++j) {
      block[j] = j < rows ? Vec::Load(x + j * stride) : Vec::Set(0.0f);
    }
  }
}

template <class Vec>
void Pack(const float* x, int64_t stride, int64_t batch, int64_t count, int64_t slots, int width,
          float* packed) {
  constexpr int kLanes = Vec::kLanes;
  if (width == 1) {
    for (int64_t i = 0; i < count; ++i) packed[i] = x[i];
  } else {
    const int64_t full = count - count % kLanes;
    for (int64_t b = 0; b < width; b += kLanes) {
      for (int64_t i = 0; i < full; i += kLanes) {
        typename Vec::Reg block[kLanes];
        LoadRows<Vec>(x + b * stride + i, stride, batch - b, block);
        Vec::Transpose(block);
        for (int j = 0; j < kLanes; ++j) Vec::Store(packed + (i + j) * width + b, block[j]);
      }
    }
    for (int64_t i = full; i < count; ++i) {
      for (int64_t b = 0; b < width; ++b) {
        packed[i * width + b] = b < batch ? x[b * stride + i] : 0.0f;
      }
    }
  }
  for (int64_t i = count * width; i < slots * width; ++i) packed[i] = 0.0f;
}

inline float Finish(float sum, int64_t n, const Epilogue& epilogue) {
  if (epilogue.scales != nullptr) sum *= epilogue.scales[n];
  if (epilogue.bias != nullptr) sum += epilogue.bias[n];
  // Written so that NaN stays NaN.
  if (epilogue.activation != Activation::kLinear && sum < 0.0f) sum = 0.0f;
  if (epilogue.activation == Activation::kRelu6 && sum > 6.0f) sum = 6.0f;
  return sum;
}

template <class Vec>
inline typename Vec::Reg FinishLanes(typename Vec::Reg sum, int64_t n, const Epilogue& epilogue) {
  if (epilogue.scales != nullptr) {
    sum = Vec::Multiply(Vec::Set(epilogue.scales[n]), sum);
  }
  if (epilogue.bias != nullptr) sum = Vec::Add(Vec::Set(epilogue.bias[n]), sum);
  if (epilogue.activation != Activation::kLinear) {
    sum = Vec::Max(Vec::Set(0.0f), sum);
  }
  if (epilogue.activation == Activation::kRelu6) {
    sum = Vec::Min(Vec::Set(6.0f), sum);
  }
  return sum;
}

template <class Vec>
inline void StoreRows(const typename Vec::Reg* block, float* y, int64_t stride, int64_t rows) {
  if (rows >= Vec::kLanes) {
    for (int j = 0; j < Vec::kLanes; ++j) Vec::Store(y + j * stride, block[j]);
  } else {
    for (int j = 0; j < Vec::kLanes; ++j) {
      if (j < rows) Vec::Store(y + j * stride, block[j]);
    }
  }
}

template <class Vec>
void Unpack(const float* packed, int64_t count, int64_t batch, int width, const Epilogue& epilogue,
            float* y, int64_t stride) {
  constexpr int kLanes = Vec::kLanes;
  const int64_t full = width == 1 ? 0 : count - count % kLanes;
  for (int64_t b = 0; b < batch; b += kLanes) {
    for (int64_t i = 0; i < full; i += kLanes) {
      typename Vec::Reg block[kLanes];
      for (int j = 0; j < kLanes; ++j) {
        block[j] = FinishLanes<Vec>(Vec::Load(packed + (i + j) * width + b), i + j, epilogue);
      }
      Vec::Transpose(block);
      StoreRows<Vec>(block, y + b * stride + i, stride, batch - b);
    }
  }
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = full; i < count; ++i) {
      y[b * stride + i] = Finish(packed[i * width + b], i, epilogue);
    }
  }
}

}  // namespace
}  // namespace accel_tf
