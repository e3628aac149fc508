// Portable kernels: one lane, no intrinsics. The reference that the others are tested against.
#include "kernels/generic.h"

namespace accel_tf {
namespace {

struct Scalar {
  using Reg = float;
  static constexpr int kLanes = 1;
  static Reg Zero() { return 0.0f; }
  static Reg Broadcast(float value) { return value; }
  static Reg Load(const float* p) { return *p; }
  static void Store(float* p, Reg a) { *p = a; }
  static Reg Add(Reg a, Reg b) { return a + b; }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg Gather(const float* base, const int32_t* index) { return base[*index]; }
  static float Sum(Reg a) { return a; }
};

}  // namespace

extern const Kernels kernels_scalar;
const Kernels kernels_scalar = MakeKernels<Scalar>("scalar");

}  // namespace accel_tf
