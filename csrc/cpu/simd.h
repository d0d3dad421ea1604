// Vectors of ADAPTLORA_LANES floats in the compiler's vector extension, and their loads and stores in each dtype.
// Included once per ISA by kernels.h, into a namespace of its own and with internal linkage (see isa.h for why).
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define ADAPTLORA_INLINE static inline __attribute__((always_inline))
#define ADAPTLORA_INLINE_LAMBDA __attribute__((always_inline))
#define ADAPTLORA_UNROLL _Pragma("GCC unroll 16")

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the dropout bits are laid out for little-endian machines");

namespace adaptlora::ADAPTLORA_ISA_NAMESPACE {
namespace {

constexpr int kLanes = ADAPTLORA_LANES;

typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef uint32_t vu __attribute__((vector_size(kLanes * 4)));
typedef uint64_t vu64 __attribute__((vector_size(kLanes * 4)));
typedef uint16_t vh __attribute__((vector_size(kLanes * 2)));

template <class V, class T>
ADAPTLORA_INLINE V load_raw(const T* p) {
  V v;
  memcpy(&v, p, sizeof(V));
  return v;
}

template <class V, class T>
ADAPTLORA_INLINE void store_raw(T* p, V v) {
  memcpy(p, &v, sizeof(V));
}

// v where the mask is ~0, and 0 where it is 0.
ADAPTLORA_INLINE vf masked(vf v, vi mask) { return (vf)((vi)v & mask); }
ADAPTLORA_INLINE vf masked(vf v, const uint32_t* mask) { return masked(v, load_raw<vi>(mask)); }
ADAPTLORA_INLINE vu select(vi mask, vu a, vu b) { return (a & (vu)mask) | (b & ~(vu)mask); }

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

ADAPTLORA_INLINE vf load(const float* p) { return load_raw<vf>(p); }
ADAPTLORA_INLINE void store(float* p, vf v) { store_raw(p, v); }

ADAPTLORA_INLINE vf load(const bf16* p) { return (vf)(__builtin_convertvector(load_raw<vh>(p), vu) << 16); }

ADAPTLORA_INLINE void store(bf16* p, vf v) {
  const vu bits = (vu)v;
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
  const vi is_nan = v != v;
  store_raw(p, __builtin_convertvector(select(is_nan, vu{} + 0x7fc0, rounded), vh));
}

// The masked forms, with every lane set: gcc 12 warns about its own header for the others.
#if ADAPTLORA_LANES == 16
ADAPTLORA_INLINE vf load(const f16* p) { return (vf)_mm512_maskz_cvtph_ps(-1, load_raw<__m256i>(p)); }
ADAPTLORA_INLINE void store(f16* p, vf v) {
  store_raw(p, _mm512_maskz_cvtps_ph(-1, (__m512)v, _MM_FROUND_TO_NEAREST_INT));
}
#elif ADAPTLORA_LANES == 8
ADAPTLORA_INLINE vf load(const f16* p) { return (vf)_mm256_cvtph_ps(load_raw<__m128i>(p)); }
ADAPTLORA_INLINE void store(f16* p, vf v) { store_raw(p, _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT)); }
#else
ADAPTLORA_INLINE vf load(const f16* p) {
  const vu h = __builtin_convertvector(load_raw<vh>(p), vu);
  // Moving the exponent by 112 with a multiplication makes subnormal halves right as well.
  const vu magnitude = (vu)((vf)((h & 0x7fff) << 13) * 0x1p112f);
  const vi is_special = (vi)(h & 0x7c00) == 0x7c00;
  return (vf)(select(is_special, magnitude | 0x7f800000, magnitude) | ((h & 0x8000) << 16));
}

ADAPTLORA_INLINE void store(f16* p, vf v) {
  const vu bits = (vu)v;
  const vu magnitude = bits & 0x7fffffff;
  const vu normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;  // to nearest, ties to even
  // Below 2^-14 a half counts in units of 2^-24: adding 0.5 leaves that count, rounded, in the low bits of the sum.
  const vu subnormal = (vu)((vf)magnitude + 0.5f) - 0x3f000000;
  vu half = select((vi)magnitude < 0x38800000, subnormal, normal);
  half = select((vi)magnitude >= 0x47800000, vu{} + 0x7c00, half);  // 2^16 and above: infinity
  half = select((vi)magnitude > 0x7f800000, vu{} + 0x7e00, half);   // NaN
  store_raw(p, __builtin_convertvector(half | ((bits >> 16) & 0x8000), vh));
}
#endif

// The first n < kLanes elements; the rest is zero, or not written.
template <class T>
ADAPTLORA_INLINE vf load_partial(const T* p, int64_t n) {
  T buffer[kLanes] = {};
  memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}

template <class T>
ADAPTLORA_INLINE void store_partial(T* p, vf v, int64_t n) {
  T buffer[kLanes];
  store(buffer, v);
  memcpy(p, buffer, n * sizeof(T));
}

template <class T>
ADAPTLORA_INLINE float load_one(const T* p) {
  return load_partial(p, 1)[0];
}

// n <= kLanes elements that lie `stride` apart; the rest is zero, or not written.
template <class T>
ADAPTLORA_INLINE vf gather(const T* p, int64_t stride, int64_t n) {
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i * stride];
  return load(buffer);
}

template <class T>
ADAPTLORA_INLINE void scatter(T* p, int64_t stride, vf v, int64_t n) {
  T buffer[kLanes];
  store(buffer, v);
  for (int64_t i = 0; i < n; ++i) p[i * stride] = buffer[i];
}

// The low 32 bits of each 64-bit lane times c, in 64 bits; the high 32 bits of the input do not matter.
ADAPTLORA_INLINE vu64 multiply_low32(vu64 a, uint32_t c) {
#if ADAPTLORA_LANES == 16
  return (vu64)_mm512_maskz_mul_epu32(-1, (__m512i)a, _mm512_set1_epi64(c));
#elif ADAPTLORA_LANES == 8
  return (vu64)_mm256_mul_epu32((__m256i)a, _mm256_set1_epi64x(c));
#elif defined(__x86_64__)
  return (vu64)_mm_mul_epu32((__m128i)a, _mm_set1_epi64x(c));
#elif defined(__aarch64__)
  return (vu64)vmull_u32(vmovn_u64((uint64x2_t)a), vdup_n_u32(c));
#else
  return (a & 0xffffffffu) * c;
#endif
}

#if ADAPTLORA_LANES == 16
#define ADAPTLORA_EVEN 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30
#define ADAPTLORA_ODD 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31
#define ADAPTLORA_LOW_WORDS 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30
#define ADAPTLORA_HIGH_WORDS 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31
#elif ADAPTLORA_LANES == 8
#define ADAPTLORA_EVEN 0, 2, 4, 6, 8, 10, 12, 14
#define ADAPTLORA_ODD 1, 3, 5, 7, 9, 11, 13, 15
#define ADAPTLORA_LOW_WORDS 0, 2, 8, 10, 4, 6, 12, 14
#define ADAPTLORA_HIGH_WORDS 1, 3, 9, 11, 5, 7, 13, 15
#else
#define ADAPTLORA_EVEN 0, 2, 4, 6
#define ADAPTLORA_ODD 1, 3, 5, 7
#define ADAPTLORA_LOW_WORDS 0, 2, 4, 6
#define ADAPTLORA_HIGH_WORDS 1, 3, 5, 7
#endif

// sums[i] += sum of the lanes of v[i], for N vectors at once: a tree of pairwise additions, in a fixed order.
template <int N>
ADAPTLORA_INLINE void add_lane_sums(const vf (&v)[N], float (&sums)[N]) {
  ADAPTLORA_UNROLL
  for (int first = 0; first < N; first += kLanes) {
    vf t[kLanes] = {};
    ADAPTLORA_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (first + i < N) t[i] = v[first + i];
    }
    ADAPTLORA_UNROLL
    for (int width = kLanes; width > 1; width /= 2) {
      ADAPTLORA_UNROLL
      for (int i = 0; i < width / 2; ++i) {
        const vf a = t[2 * i], b = t[2 * i + 1];
        t[i] = __builtin_shufflevector(a, b, ADAPTLORA_EVEN) + __builtin_shufflevector(a, b, ADAPTLORA_ODD);
      }
    }
    ADAPTLORA_UNROLL
    for (int i = 0; i < kLanes; ++i) {
      if (first + i < N) sums[first + i] += t[0][i];
    }
  }
}

}  // namespace
}  // namespace adaptlora::ADAPTLORA_ISA_NAMESPACE
