// The algorithms, written once over a vector type `Vec`; each isa_<name>.cc defines one and
// includes this file.
//
// Everything is in an unnamed namespace, and nothing of the standard library is called: a function
// shared between translation units would be kept by the linker in one version only, perhaps the one
// compiled for instructions that the host lacks.
//
// A `Vec` has
//   Reg     kLanes floats: Zero, Set, Load, Store, Add, Multiply, MultiplyAdd, Max and Min (of
//   which
//           a NaN in the second operand survives); Transpose(Reg[kLanes])
//   Four    four floats: ZeroFour, LoadFour, StoreFour, BroadcastFour, AddFour, MultiplyAddFour;
//           GatherFour(x, columns), whose elements are x[column] of four packed 16-bit columns;
//           SumFour(a, b, c, d), whose elements are the sums of those four registers
//   Quad    four floats at hand to be broadcast: LoadQuad; Broadcast<i>(quad), a Reg of the i-th
//   kRows, kVectors: how many sums the registers can hold, rows × vectors
//   kGradientVectors: the same where four rows are held
// Load, LoadFour and LoadQuad also convert from int8.
#pragma once

#include "kernels/dispatch.h"
#include "kernels/generic_gradients.h"
#include "kernels/generic_multiply.h"
#include "kernels/generic_pack.h"

namespace accel_tf {
namespace {

// Plain C++, which the compiler turns into vectors of the instruction set: it is to cost little
// beside a product, although each one begins with it.
inline uint16_t LargestColumn(const uint16_t* columns, int64_t count) {
  uint16_t largest = 0;
  for (int64_t p = 0; p < count; ++p) largest = columns[p] > largest ? columns[p] : largest;
  return largest;
}

template <class Vec>
constexpr Kernels MakeKernels(const char* name) {
  return {name,
          LargestColumn,
          Pack<Vec>,
          Unpack<Vec>,
          Multiply<Vec>,
          MultiplyVector<Vec>,
          MultiplyTransposed<Vec>,
          Sample<Vec>};
}

}  // namespace
}  // namespace accel_tf
