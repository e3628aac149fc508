// Kernels for x86-64 with AVX-512: sixteen lanes, thirty-two registers.
#include "kernels/generic.h"
#include "kernels/x86.h"

namespace accel_tf {
namespace {

struct Avx512 : X86 {
  using Reg = __m512;
  static constexpr int kLanes = 16;
  static constexpr int kRows = 4, kVectors = 2, kGradientVectors = 2;
  static Reg Zero() { return _mm512_setzero_ps(); }
  static Reg Load(const float* p) { return _mm512_loadu_ps(p); }
  static void Store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
  static Reg Add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }

  // As in isa_avx2.cc.
  using Quad = Reg;
  static Quad LoadQuad(const float* p) { return _mm512_broadcast_f32x4(_mm_loadu_ps(p)); }
  static Quad LoadQuad(const int8_t* p) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_broadcastd_epi32(FourBytes(p))));
  }
  template <int i>
  static Reg Broadcast(Quad quad) {
    return _mm512_permute_ps(quad, i * 0x55);
  }

  using X86::SumFour;
  static Four SumFour(Reg a, Reg b, Reg c, Reg d) {
    return SumFour(Halves(a), Halves(b), Halves(c), Halves(d));
  }
  static __m256 Halves(Reg a) {
    return _mm256_add_ps(_mm512_castps512_ps256(a),
                         _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(a), 1)));
  }
};

}  // namespace

extern const Kernels kernels_avx512;
const Kernels kernels_avx512 = MakeKernels<Avx512>("avx512");

}  // namespace accel_tf
