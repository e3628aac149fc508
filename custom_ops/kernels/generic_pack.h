// Packing: activations into tiles of the batch and back, transposed; included by generic.h.
#pragma once

#include "kernels/dispatch.h"

namespace accel_tf {
namespace {

// Both directions go through sixteen elements of a batch row at a time, which are one cache line.
// Batch rows often lie a power of two apart, where all of them fall into the same few places of the
// cache: what is not read or written at once is not there any more for the second half.
constexpr int64_t kLine = 16;

template <class Vec>
void Pack(const float* x, int64_t stride, int64_t batch, int64_t count, int64_t slots, int width,
          float* packed) {
  constexpr int kBlock = Vec::kBlock;
  const int64_t rows = batch - batch % kBlock, full = count - count % kLine;
  for (int64_t i = 0; i < full; i += kLine) {
    for (int64_t b = 0; b < rows; b += kBlock) {
      for (int64_t k = i; k < i + kLine; k += kBlock) {
        typename Vec::Block block[kBlock];
        for (int j = 0; j < kBlock; ++j) block[j] = Vec::LoadBlock(x + (b + j) * stride + k);
        Vec::Transpose(block);
        for (int j = 0; j < kBlock; ++j) Vec::StoreBlock(packed + (k + j) * width + b, block[j]);
      }
    }
  }
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = b < rows ? full : 0; i < count; ++i) packed[i * width + b] = x[b * stride + i];
  }
  if (batch < width) {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t b = batch; b < width; ++b) packed[i * width + b] = 0.0f;
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
  const int64_t rows = batch - batch % kBlock, full = count - count % kLine;
  for (int64_t i = 0; i < full; i += kLine) {
    for (int64_t b = 0; b < rows; b += kBlock) {
      for (int64_t k = i; k < i + kLine; k += kBlock) {
        typename Vec::Block block[kBlock];
        for (int j = 0; j < kBlock; ++j) {
          block[j] =
              FinishBlock<Vec>(Vec::LoadBlock(packed + (k + j) * width + b), k + j, epilogue);
        }
        Vec::Transpose(block);
        for (int j = 0; j < kBlock; ++j) Vec::StoreBlock(y + (b + j) * stride + k, block[j]);
      }
    }
  }
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t i = b < rows ? full : 0; i < count; ++i) {
      y[b * stride + i] = Finish(packed[i * width + b], i, epilogue);
    }
  }
}

}  // namespace
}  // namespace accel_tf
