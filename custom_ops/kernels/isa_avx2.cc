// Kernels for x86-64 with AVX2 and FMA: eight lanes, sixteen registers.
#include "kernels/generic.h"
#include "kernels/x86.h"

namespace accel_tf {
namespace {

struct Avx2 : X86 {
  using Reg = __m256;
  static constexpr int kLanes = 8;
  static constexpr int kRows = 2, kVectors = 4, kGradientVectors = 2;
  static Reg Zero() { return _mm256_setzero_ps(); }
  static Reg Set(float value) { return _mm256_set1_ps(value); }
  static Reg Load(const float* p) { return _mm256_loadu_ps(p); }
  static Reg Load(const int8_t* p) {
    const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(eight));
  }
  static void Store(float* p, Reg a) { _mm256_storeu_ps(p, a); }
  static Reg Add(Reg a, Reg b) { return _mm256_add_ps(a, b); }
  static Reg MultiplyAdd(Reg a, Reg b, Reg c) { return _mm256_fmadd_ps(a, b, c); }
  static Reg Multiply(Reg a, Reg b) { return _mm256_mul_ps(a, b); }
  static Reg Max(Reg a, Reg b) { return _mm256_max_ps(a, b); }
  static Reg Min(Reg a, Reg b) { return _mm256_min_ps(a, b); }
  static void Transpose(Reg (&a)[kLanes]) {
    Reg pairs[kLanes], quads[kLanes];
    for (int i = 0; i < kLanes; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
    }
    for (int i = 0; i < kLanes; i += 4) {
      quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
    for (int i = 0; i < 4; ++i) {
      a[i] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20);
      a[i + 4] = _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31);
    }
  }

  // The four floats, in both halves: a shuffle within each then broadcasts any of them, and needs
  // no load, of which the processor has too few.
  using Quad = Reg;
  static Quad LoadQuad(const float* p) {
    return _mm256_broadcast_ps(reinterpret_cast<const __m128*>(p));
  }
  static Quad LoadQuad(const int8_t* p) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_broadcastd_epi32(FourBytes(p))));
  }
  template <int i>
  static Reg Broadcast(Quad quad) {
    return _mm256_permute_ps(quad, i * 0x55);
  }
};

}  // namespace

extern const Kernels kernels_avx2;
const Kernels kernels_avx2 = MakeKernels<Avx2>("avx2");

}  // namespace accel_tf
