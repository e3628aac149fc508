// Portable kernels: no intrinsics. The reference that the others are tested against.
#include "kernels/generic.h"

namespace accel_tf {
namespace {

struct Scalar {
  using Reg = float;
  static constexpr int kLanes = 1;
  static constexpr int kRows = 1, kVectors = kMaxWidth, kGradientVectors = kMaxWidth;
  static Reg Zero() { return 0.0f; }
  static Reg Set(float value) { return value; }
  template <class T>
  static Reg Load(const T* p) {
    return static_cast<float>(*p);
  }
  static void Store(float* p, Reg a) { *p = a; }
  static Reg Add(Reg a, Reg b) { return a + b; }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return a * b + c; }
  static Reg Multiply(Reg a, Reg b) { return a * b; }
  static Reg Max(Reg a, Reg b) { return a > b ? a : b; }
  static Reg Min(Reg a, Reg b) { return a < b ? a : b; }
  static void Transpose(Reg (&)[kLanes]) {}

  struct Four {
    float at[4];
  };
  static Four ZeroFour() { return {}; }
  template <class T>
  static Four LoadFour(const T* p) {
    return {{static_cast<float>(p[0]), static_cast<float>(p[1]), static_cast<float>(p[2]),
             static_cast<float>(p[3])}};
  }
  static void StoreFour(float* p, const Four& a) {
    for (int i = 0; i < 4; ++i) p[i] = a.at[i];
  }
  static Four BroadcastFour(float value) { return {{value, value, value, value}}; }
  static Four AddFour(Four a, const Four& b) {
    for (int i = 0; i < 4; ++i) a.at[i] += b.at[i];
    return a;
  }
  static Four MultiplyAddFour(const Four& a, const Four& b, Four c) {
    for (int i = 0; i < 4; ++i) c.at[i] += a.at[i] * b.at[i];
    return c;
  }
  static Four GatherFour(const float* x, uint64_t columns) {
    Four four;
    for (int i = 0; i < 4; ++i) four.at[i] = x[Column(columns, i)];
    return four;
  }
  static Four SumFour(Reg a, Reg b, Reg c, Reg d) { return {{a, b, c, d}}; }

  using Quad = Four;
  template <class T>
  static Quad LoadQuad(const T* p) {
    return LoadFour(p);
  }
  template <int i>
  static Reg Broadcast(const Quad& quad) {
    return quad.at[i];
  }
};

}  // namespace

extern const Kernels kernels_scalar;
const Kernels kernels_scalar = MakeKernels<Scalar>("scalar");

}  // namespace accel_tf
