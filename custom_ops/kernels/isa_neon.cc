// Kernels for AArch64: four lanes, thirty-two registers.
#include <arm_neon.h>

#include "kernels/generic.h"

namespace accel_tf {
namespace {

struct Neon {
  using Reg = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr int kRows = 2, kVectors = 8, kGradientVectors = 4;
  static Reg Zero() { return vdupq_n_f32(0.0f); }
  static Reg Load(const float* p) { return vld1q_f32(p); }
  static Reg Load(const int8_t* p) {
    const int8_t four[8] = {p[0], p[1], p[2], p[3]};
    return vcvtq_f32_s32(vmovl_s16(vget_low_s16(vmovl_s8(vld1_s8(four)))));
  }
  static void Store(float* p, Reg a) { vst1q_f32(p, a); }
  static Reg Add(Reg a, Reg b) { return vaddq_f32(a, b); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return vfmaq_f32(c, a, b); }
  static Reg Set(float value) { return vdupq_n_f32(value); }
  static Reg Multiply(Reg a, Reg b) { return vmulq_f32(a, b); }
  static Reg Max(Reg a, Reg b) { return vmaxq_f32(a, b); }
  static Reg Min(Reg a, Reg b) { return vminq_f32(a, b); }
  static void Transpose(Reg (&a)[kLanes]) {
    const float32x4x2_t low = vzipq_f32(a[0], a[2]), high = vzipq_f32(a[1], a[3]);
    const float32x4x2_t first = vzipq_f32(low.val[0], high.val[0]);
    const float32x4x2_t second = vzipq_f32(low.val[1], high.val[1]);
    a[0] = first.val[0];
    a[1] = first.val[1];
    a[2] = second.val[0];
    a[3] = second.val[1];
  }

  using Quad = Reg;
  template <class T>
  static Quad LoadQuad(const T* p) {
    return Load(p);
  }
  template <int i>
  static Reg Broadcast(Quad quad) {
    return vdupq_laneq_f32(quad, i);
  }

  using Four = Reg;
  static Four ZeroFour() { return Zero(); }
  template <class T>
  static Four LoadFour(const T* p) {
    return Load(p);
  }
  static void StoreFour(float* p, Four a) { Store(p, a); }
  static Four BroadcastFour(float value) { return Set(value); }
  static Four AddFour(Four a, Four b) { return Add(a, b); }
  static Four MultiplyAddFour(Four a, Four b, Four c) { return MultiplyAdd(a, b, c); }
  static Four GatherFour(const float* x, uint64_t columns) {
    const float four[4] = {x[columns & 0xffff], x[columns >> 16 & 0xffff],
                           x[columns >> 32 & 0xffff], x[columns >> 48]};
    return Load(four);
  }
  static Four SumFour(Reg a, Reg b, Reg c, Reg d) {
    return vpaddq_f32(vpaddq_f32(a, b), vpaddq_f32(c, d));
  }
};

}  // namespace

extern const Kernels kernels_neon;
const Kernels kernels_neon = MakeKernels<Neon>("neon");

}  // namespace accel_tf
