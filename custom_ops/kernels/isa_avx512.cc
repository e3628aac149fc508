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
  static Reg Set(float value) { return _mm512_set1_ps(value); }
  static Reg Load(const float* p) { return _mm512_loadu_ps(p); }
  static Reg Load(const int8_t* p) {
    const __m128i sixteen = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(sixteen));
  }
  static void Store(float* p, Reg a) { _mm512_storeu_ps(p, a); }
  static Reg Add(Reg a, Reg b) { return _mm512_add_ps(a, b); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm512_fmadd_ps(a, b, c); }
  static Reg Multiply(Reg a, Reg b) { return _mm512_mul_ps(a, b); }
  static Reg Max(Reg a, Reg b) { return _mm512_max_ps(a, b); }
  static Reg Min(Reg a, Reg b) { return _mm512_min_ps(a, b); }
  static void Transpose(Reg (&a)[kLanes]) {
    Reg b[kLanes];
    for (int i = 0; i < kLanes; i += 2) {
      b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
      b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
    }
    // a[i + j] has the columns j, j + 4, j + 8, j + 12 of the rows i … i + 3.
    for (int i = 0; i < kLanes; i += 4) {
      a[i] = _mm512_shuffle_ps(b[i], b[i + 2], 0x44);
      a[i + 1] = _mm512_shuffle_ps(b[i], b[i + 2], 0xee);
      a[i + 2] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0x44);
      a[i + 3] = _mm512_shuffle_ps(b[i + 1], b[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      const Reg top[2] = {_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88),
                          _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd)};
      const Reg bottom[2] = {_mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0x88),
                             _mm512_shuffle_f32x4(a[i + 8], a[i + 12], 0xdd)};
      a[i] = _mm512_shuffle_f32x4(top[0], bottom[0], 0x88);
      a[i + 4] = _mm512_shuffle_f32x4(top[1], bottom[1], 0x88);
      a[i + 8] = _mm512_shuffle_f32x4(top[0], bottom[0], 0xdd);
      a[i + 12] = _mm512_shuffle_f32x4(top[1], bottom[1], 0xdd);
    }
  }

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
