// Sixteen floats at a time, on any machine: the compiler makes of it what its registers hold.
#pragma once

#include <omp.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr int LANES = 16;
typedef float Vec __attribute__((vector_size(64)));
typedef float Loose __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Bits __attribute__((vector_size(64)));
struct alignas(64) Line {
  float at[LANES];
};
typedef uint32_t LooseBits __attribute__((vector_size(64), aligned(2), may_alias));
typedef uint16_t Half __attribute__((vector_size(32), aligned(2), may_alias));

inline float widened(uint16_t h) {
  const uint32_t bits = static_cast<uint32_t>(h) << 16;
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}

// To the nearest, ties to even; a NaN stays one.
inline uint16_t narrowed(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t near = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? (bits >> 16) | 0x40u : near);
}

inline float get(const float* p) { return *p; }
inline float get(const uint16_t* p) { return widened(*p); }
inline void put(float* p, float f) { *p = f; }
inline void put(uint16_t* p, float f) { *p = narrowed(f); }

inline Vec load(const float* p) { return *reinterpret_cast<const Loose*>(p); }
inline Vec load(const uint16_t* p) {
#if defined(__AVX512F__)  // what GCC makes six instructions of
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return reinterpret_cast<Vec>(_mm512_slli_epi32(bits, 16));
#else
  const Half h = *reinterpret_cast<const Half*>(p);
  return reinterpret_cast<Vec>(__builtin_convertvector(h, Bits) << 16);
#endif
}

// Lane i with lane i + 8, then + 4, + 2, + 1.
inline float total(Vec v) {
  typedef float V8 __attribute__((vector_size(32)));
  typedef float V4 __attribute__((vector_size(16)));
  const V8 a = __builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7) +
               __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15);
  const V4 b = __builtin_shufflevector(a, a, 0, 1, 2, 3) + __builtin_shufflevector(a, a, 4, 5, 6, 7);
  return (b[0] + b[2]) + (b[1] + b[3]);
}

// The totals of sixteen vectors, each by the tree of `total`: the vectors' halves are added in pairs, twice as many of
// them in a vector each time.
inline Vec totals(const Vec* v) {
  Vec a[8], b[4], c[2];
  for (int i = 0; i < 8; i++)
    a[i] = __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  for (int i = 0; i < 4; i++)
    b[i] = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
           __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int i = 0; i < 2; i++)
    c[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
           __builtin_shufflevector(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
  return __builtin_shufflevector(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
         __builtin_shufflevector(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
}

// e^x = (less + 1) power, by Cody and Waite's reduction x = n log 2 + r: less is e^r - 1 by Cephes' polynomial, power is
// 2^n. x is held between -87 and 88.
struct Reduced {
  Vec less, power;
};
inline Reduced reduced(Vec x) {
  typedef int32_t Whole __attribute__((vector_size(64)));
  x = x < -87.0f ? Vec{} - 87.0f : x;
  x = x > 88.0f ? Vec{} + 88.0f : x;
  const Vec scaled = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number
  const Vec n = scaled - 12582912.0f;
  const Vec r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return {p * r * r + r, reinterpret_cast<Vec>((__builtin_convertvector(n, Whole) + 127) << 23)};
}

// e^x to 2 units in the last place; below -87 it is 2^-126 or so.
inline Vec exponential(Vec x) {
  const Reduced e = reduced(x);
  return (e.less + 1.0f) * e.power;
}

template <class T> inline Vec some(const T* p, long count) {  // up to 16 of them, then zeros
  if (count >= LANES) return load(p);
  T rest[LANES] = {};
  std::memcpy(rest, p, count * sizeof(T));
  return load(rest);
}

inline void save(float* p, Vec v) { *reinterpret_cast<Loose*>(p) = v; }
// To the nearest half, in the upper bits; a NaN stays one.
inline Bits nearest(Vec v) {
  const Bits u = reinterpret_cast<Bits>(v);
  return (u & 0x7fffffffu) > 0x7f800000u ? u | 0x400000u : u + 0x7fffu + ((u >> 16) & 1u);
}
inline void save(uint16_t* p, Vec v) { *reinterpret_cast<Half*>(p) = __builtin_convertvector(nearest(v) >> 16, Half); }
// What would be read again of what was saved.
inline Vec saved(const float*, Vec v) { return v; }
inline Vec saved(const uint16_t*, Vec v) { return reinterpret_cast<Vec>(nearest(v) & 0xffff0000u); }

template <class T> inline void store(T* p, Vec v, long count) {  // the first `count` of them
  if (count >= LANES) return save(p, v);
  T rest[LANES];
  save(rest, v);
  std::memcpy(p, rest, count * sizeof(T));
}

inline Vec larger(Vec a, Vec b) { return ((b > a) | (b != b)) ? b : a; }  // a NaN stays one
inline float largest(Vec v) {
  v = larger(v, __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7));
  v = larger(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11));
  v = larger(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13));
  return larger(v, __builtin_shufflevector(v, v, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14))[0];
}

// `count` things in nearly equal parts, the larger ones first.
struct Cut {
  long parts, base, extra;

  Cut(long count, long parts) : parts(parts), base(count / parts), extra(count % parts) {}
  long first(long i) const { return i * base + std::min(i, extra); }
  long size(long i) const { return base + (i < extra); }
};

// Tiles of 16 outputs, of all maps together.
template <class M> long tiles_of(const M* maps, int count) {
  long found = 0;
  for (int i = 0; i < count; i++) found += (maps[i].out + LANES - 1) / LANES;
  return found;
}

// Calls each(map, from, to) for this thread's share of them, which lie behind one another.
template <class M, class Each> void shared_out(const M* maps, int count, Each each) {
  const long tiles = tiles_of(maps, count), threads = omp_get_num_threads(), me = omp_get_thread_num();
  const long begin = tiles * me / threads, end = tiles * (me + 1) / threads;
  for (long i = 0, base = 0; i < count; i++) {
    const long own = (maps[i].out + LANES - 1) / LANES, from = std::max(begin - base, 0l), to = std::min(end - base, own);
    if (from < to) each(maps[i], from, to);
    base += own;
  }
}

template <class M, class Each> void dealt(const M* maps, int count, Each each) {
  shared_out(maps, count, [&](const M& map, long from, long to) {
    for (long t = from; t < to; t++) each(map, t);
  });
}

// Many values are shared out among threads; a few are done before the others would have woken up.
constexpr long ALONE = 1 << 15;

}  // namespace
