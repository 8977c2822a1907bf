// Rows rounded to 8 bits, times a weight of 8 or 4 bits: assay/ops/packed.py says how both are held.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include "vectors.h"

namespace {

constexpr long GROUP = 32, LINE = 64, EARLY = 8192;  // EARLY: bytes between what is read and what is fetched

typedef int32_t Ints __attribute__((vector_size(64)));
typedef uint8_t Bytes __attribute__((vector_size(64)));
typedef uint8_t LooseBytes __attribute__((vector_size(64), aligned(1), may_alias));
typedef uint16_t Pairs __attribute__((vector_size(64)));

// Rows of x that are multiplied with a tile at once.
#if defined(__AVX512VNNI__)
constexpr int TOGETHER = 8;
#else
constexpr int TOGETHER = 2;
#endif

#if defined(__AVX2__) && !defined(__AVX512VNNI__)
// Sums of four neighbours. Pairs of products fit 16 bits when u has 7, so the eighth is counted by itself.
template <int BITS> inline __m256i four(__m256i u, __m256i q) {
  const __m256i one = _mm256_set1_epi16(1);
  if (BITS == 4) return _mm256_madd_epi16(_mm256_maddubs_epi16(u, q), one);
  const __m256i low = _mm256_and_si256(u, _mm256_set1_epi8(127));
  const __m256i high = _mm256_and_si256(_mm256_srli_epi16(u, 7), _mm256_set1_epi8(1));
  return _mm256_add_epi32(_mm256_madd_epi16(_mm256_maddubs_epi16(low, q), one),
                          _mm256_madd_epi16(_mm256_maddubs_epi16(high, q), _mm256_set1_epi16(128)));
}
#endif

// sum[i] += u[4i] q[0] + ... + u[4i + 3] q[3], exactly.
template <int BITS> inline Ints dot(Ints sum, const Bytes& u, const int8_t* q) {
#if defined(__AVX512VNNI__)
  // As _mm512_dpbusd_epi32 with _mm512_set1_epi32, for which compilers would spend another instruction.
  __asm__("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(sum) : "v"(u), "m"(*reinterpret_cast<const int8_t(*)[4]>(q)));
  return sum;
#elif defined(__AVX2__)
  int32_t some;
  std::memcpy(&some, q, 4);
  const __m256i rows = _mm256_set1_epi32(some);
  __m256i halves[2], sums[2];
  std::memcpy(halves, &u, sizeof u);
  std::memcpy(sums, &sum, sizeof sum);
  for (int i = 0; i < 2; i++) sums[i] = _mm256_add_epi32(sums[i], four<BITS>(halves[i], rows));
  std::memcpy(&sum, sums, sizeof sum);
  return sum;
#else
  for (int i = 0; i < LANES; i++)
    for (int j = 0; j < 4; j++) sum[i] += u[4 * i + j] * q[j];
  return sum;
#endif
}

// Rows as whole numbers of -127 to 127, group by group, the rows of a tile in turns: q [groups, rows, 32], scale
// [groups, rows], and what the code of zero adds to each group's sum in 8 and in 4 bits, less it, [groups, rows].
struct Rounded {
  int8_t* q;
  float* scale;
  int32_t *zero8, *zero4;
  long m, groups;
  Cut rows;

  Rounded part(long from, long count) const {
    const long at = from * groups;
    const Cut tiles{count, (count + TOGETHER - 1) / TOGETHER};
    return {q + at * GROUP, scale + at, zero8 + at, zero4 + at, count, groups, tiles};
  }
};

// Room for m rows of k, in buffers of the calling thread that are used again.
inline Rounded room(long m, long k) {
  static thread_local std::vector<int8_t> q;
  static thread_local std::vector<float> scale;
  static thread_local std::vector<int32_t> zero;
  const long groups = (k + GROUP - 1) / GROUP, size = m * groups;
  if (scale.size() < static_cast<size_t>(size)) {
    q.resize(size * GROUP);
    scale.resize(size);
    zero.resize(2 * size);
  }
  return Rounded{q.data(), scale.data(), zero.data(), zero.data() + size, m, groups, {m, 1}}.part(0, m);
}

// The largest, or the sum, of the lanes.
template <class Two> inline int32_t folded(Ints v, Two two) {
  v = two(v, __builtin_shuffle(v, Ints{8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7}));
  v = two(v, __builtin_shuffle(v, Ints{4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11}));
  v = two(v, __builtin_shuffle(v, Ints{2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13}));
  v = two(v, __builtin_shuffle(v, Ints{1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14}));
  return v[0];
}

template <class T> int32_t round_group(const T* x, long count, int8_t* q, float* scale) {
  typedef int8_t Small __attribute__((vector_size(16), aligned(1), may_alias));
  const long second = std::max(0L, count - LANES);
  const Vec v[2] = {some(x, count), second ? some(x + LANES, second) : Vec{}};
  const auto greater = [](Ints a, Ints b) { return a > b ? a : b; };
  // The bits of an absolute value are ordered as the values are, and those of a NaN stand above infinity's.
  const Ints sizes = greater(reinterpret_cast<Ints>(v[0]) & 0x7fffffff, reinterpret_cast<Ints>(v[1]) & 0x7fffffff);
  int32_t top = folded(sizes, greater);
  const bool finite = top < 0x7f800000;
  if (top < 0x04000000) top = 0;  // below 2^-119, where 127 / most has no end: nothing
  float most;
  std::memcpy(&most, &top, 4);
  const float share = finite && top ? 127.0f / most : 0.0f;
  Ints sum = {};
  for (int i = 0; i < 2; i++) {
    const Vec near = v[i] * share + 12582912.0f;  // 1.5 * 2^23: the sum is rounded to a whole number
    const Ints whole = finite ? reinterpret_cast<Ints>(near) - 0x4b400000 : Ints{};
    *reinterpret_cast<Small*>(q + i * LANES) = __builtin_convertvector(whole, Small);
    sum += whole;
  }
  *scale = finite ? most / 127.0f : NAN;
  return folded(sum, [](Ints a, Ints b) { return a + b; });
}

template <class T> void round_rows(const T* x, long xs, long k, const Rounded& r, long t) {
  const long first = r.rows.first(t), apart = r.rows.size(t);
  for (long i = 0; i < apart; i++)
    for (long g = 0; g < r.groups; g++) {
      const long at = first * r.groups + g * apart + i, rest = k - g * GROUP;
      const T* from = x + (first + i) * xs + g * GROUP;
      const int32_t sum = round_group(from, std::min(GROUP, rest), r.q + at * GROUP, r.scale + at);
      r.zero8[at] = -128 * sum;
      r.zero4[at] = -8 * sum;
    }
}

inline long scale_bytes(long groups) { return (groups * LANES * 2 + LINE - 1) / LINE * LINE; }

// A tile of M rows with a tile of the weight: y[m] holds 16 outputs.
template <int BITS, int M> void packed_tile(const uint8_t* tile, const Rounded& r, long t, Vec* y) {
  const long from = r.rows.first(t) * r.groups;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(tile);
  const uint8_t* codes = tile + scale_bytes(r.groups);
  const int8_t* q = r.q + from * GROUP;
  const float* shares = r.scale + from;
  const int32_t* zeros = (BITS == 8 ? r.zero8 : r.zero4) + from;
  Vec acc[M];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) acc[m] = Vec{};
  for (long g = 0; g < r.groups; g++, codes += BITS * LINE, q += M * GROUP, shares += M, zeros += M) {
    Ints sum[M];
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) sum[m] = Ints{} + zeros[m];
#pragma GCC unroll 8
    for (int i = 0; i < BITS; i++) {
      __builtin_prefetch(codes + i * LINE + EARLY);
      const Bytes u = *reinterpret_cast<const LooseBytes*>(codes + i * LINE);
      const Bytes low = BITS == 8 ? u : u & 15;
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sum[m] = dot<BITS>(sum[m], low, q + m * GROUP + 4 * i);
      if (BITS == 8) continue;
      const Bytes high = reinterpret_cast<Bytes>(reinterpret_cast<Pairs>(u) >> 4) & 15;
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) sum[m] = dot<BITS>(sum[m], high, q + m * GROUP + 4 * (i + 4));
    }
    const Vec scale = load(scales + g * LANES);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) acc[m] += __builtin_convertvector(sum[m], Vec) * (scale * shares[m]);
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++) y[m] = acc[m];
}

template <int BITS> void packed_rows(const uint8_t* tile, const Rounded& r, long t, Vec* y) {
  switch (r.rows.size(t)) {
    case 1: return packed_tile<BITS, 1>(tile, r, t, y);
    case 2: return packed_tile<BITS, 2>(tile, r, t, y);
#if defined(__AVX512VNNI__)
    case 3: return packed_tile<BITS, 3>(tile, r, t, y);
    case 4: return packed_tile<BITS, 4>(tile, r, t, y);
    case 5: return packed_tile<BITS, 5>(tile, r, t, y);
    case 6: return packed_tile<BITS, 6>(tile, r, t, y);
    case 7: return packed_tile<BITS, 7>(tile, r, t, y);
    case 8: return packed_tile<BITS, 8>(tile, r, t, y);
#endif
  }
}

// One of the weights that the same rows are multiplied with: its tiles, its bias or null, and where y [m, out] goes.
struct PackedMap {
  const uint8_t* w;
  const void* b;
  void* y;
  long out, bits;
};

template <class T> void packed_outputs(const PackedMap& map, long tile, const Rounded& r) {
  const long bytes = scale_bytes(r.groups) + r.groups * map.bits * LINE, first = tile * LANES;
  const uint8_t* w = map.w + tile * bytes;
  const long wide = std::min<long>(LANES, map.out - first);
  const Vec bias = map.b ? some(static_cast<const T*>(map.b) + first, wide) : Vec{};
  Vec y[TOGETHER];
  for (long t = 0; t < r.rows.parts; t++) {
    if (map.bits == 8) packed_rows<8>(w, r, t, y);
    else packed_rows<4>(w, r, t, y);
    T* to = static_cast<T*>(map.y) + r.rows.first(t) * map.out + first;
    for (long i = 0; i < r.rows.size(t); i++) store(to + i * map.out, map.b ? y[i] + bias : y[i], wide);
  }
}

template <class T> void packed_fan(const PackedMap* maps, int count, const T* x, long xs, long m, long k) {
  const Rounded r = room(m, k);
  if (r.rows.parts == 1) round_rows(x, xs, k, r, 0);  // sooner done than waited for
#pragma omp parallel if (m * k * tiles_of(maps, count) > ALONE / LANES)
  {
    if (r.rows.parts > 1) {
#pragma omp for schedule(static)
      for (long t = 0; t < r.rows.parts; t++) round_rows(x, xs, k, r, t);
    }
    dealt(maps, count, [&](const PackedMap& map, long tile) { packed_outputs<T>(map, tile, r); });
  }
}

// Rows sorted by expert, of which the first counts[0] are the first one's, each times the weight of its expert; these
// lie behind one another, and all are as `of` says.
template <class T>
void packed_grouped(const PackedMap& of, const T* x, long xs, long m, long k, const int64_t* counts, long experts) {
  struct Expert {
    PackedMap map;
    Rounded rows;
    long from;
  };
  std::vector<Expert> busy;
  const Rounded all = room(m, k);
  const long bytes = tiles_of(&of, 1) * (scale_bytes(all.groups) + all.groups * of.bits * LINE);
  for (long e = 0, from = 0; e < experts; from += counts[e++]) {
    if (!counts[e]) continue;
    busy.push_back({of, all.part(from, counts[e]), from});
    busy.back().map.w += e * bytes;
    busy.back().map.y = static_cast<T*>(of.y) + from * of.out;
  }
  const long tiles = tiles_of(&of, 1), count = busy.size();
#pragma omp parallel if (m * k * tiles > ALONE / LANES)
  {
#pragma omp for schedule(static)
    for (long e = 0; e < count; e++)
      for (long t = 0; t < busy[e].rows.rows.parts; t++) round_rows(x + busy[e].from * xs, xs, k, busy[e].rows, t);
#pragma omp for schedule(static)
    for (long t = 0; t < count * tiles; t++) packed_outputs<T>(busy[t / tiles].map, t % tiles, busy[t / tiles].rows);
  }
}

}  // namespace
