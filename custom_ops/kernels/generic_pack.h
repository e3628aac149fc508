// Packing: activations into tiles of the batch and back, transposed; included by generic.h.
#pragma once

#include "kernels/dispatch.h"

namespace accel_tf {
namespace {

template <class Vec>
void Pack(const float* x, int64_t stride, int64_t batch, int64_t count, int64_t slots, int width,
          float* packed) {
  constexpr int kBlock = Vec::kBlock;
  const int64_t full = count - count % kBlock;
  int64_t b = 0;
  for (; b + kBlock <= batch; b += kBlock) {
    for (int64_t i = 0; i < full; i += kBlock) {
      typename Vec::Block block[kBlock];
      for (int j = 0; j < kBlock; ++j) block[j] = Vec::LoadBlock(x + (b + j) * stride + i);
      Vec::Transpose(block);
      for (int j = 0; j < kBlock; ++j) Vec::StoreBlock(packed + (i + j) * width + b, block[j]);
    }
    for (int64_t i = full; i < count; ++i) {
      for (int j = 0; j < kBlock; ++j) packed[i * width + b + j] = x[(b + j) * stride + i];
    }
  }
  for (; b < batch; ++b) {
    for (int64_t i = 0; i < count; ++i) packed[i * width + b] = x[b * stride + i];
  }
  if (batch < width) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t j = batch; j < width; ++j) packed[i * width + j] = 0.0f;
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
inline typename Vec::Block FinishBlock(typename Vec::Block sum, int64_t n,
                                       const Epilogue& epilogue) {
  if (epilogue.scales != nullptr) {
    sum = Vec::MultiplyBlock(Vec::BroadcastBlock(epilogue.scales[n]), sum);
  }
  if (epilogue.bias != nullptr) sum = Vec::AddBlock(Vec::BroadcastBlock(epilogue.bias[n]), sum);
  if (epilogue.activation != Activation::kLinear) {
    sum = Vec::MaxBlock(Vec::BroadcastBlock(0.0f), sum);
  }
  if (epilogue.activation == Activation::kRelu6) {
    sum = Vec::MinBlock(Vec::BroadcastBlock(6.0f), sum);
  }
  return sum;
}

template <class Vec>
void Unpack(const float* packed, int64_t count, int64_t batch, int width, const Epilogue& epilogue,
            float* y, int64_t stride) {
  constexpr int kBlock = Vec::kBlock;
  const int64_t rows = count - count % kBlock, columns = batch - batch % kBlock;
  for (int64_t b = 0; b < columns; b += kBlock) {
    for (int64_t i = 0; i < rows; i += kBlock) {
      typename Vec::Block block[kBlock];
      for (int j = 0; j < kBlock; ++j) {
        block[j] = FinishBlock<Vec>(Vec::LoadBlock(packed + (i + j) * width + b), i + j, epilogue);
      }
      Vec::Transpose(block);
      for (int j = 0; j < kBlock; ++j) Vec::StoreBlock(y + (b + j) * stride + i, block[j]);
    }
  }
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = b < columns ? rows : 0; i < count; ++i) {
      y[b * stride + i] = Finish(packed[i * width + b], i, epilogue);
    }
  }
}

}  // namespace
}  // namespace accel_tf
