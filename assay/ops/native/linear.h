// A few rows times a weight [out, k].
#pragma once

#include "vectors.h"

namespace {

// Rows of x and rows of the weight that are multiplied together: as many sums as there are registers for.
#if defined(__AVX512F__)
constexpr int ROWS = 6, OUTS = 4;
#else
constexpr int ROWS = 2, OUTS = 2;
#endif

// One step over the weight: 16 floats, or 32 halves as the 16 of even and the 16 of odd place.
template <class T> struct Unit;
template <> struct Unit<float> {
  static constexpr int parts = 1, size = LANES;
  static Vec part(const float* w, int) { return load(w); }
};
template <> struct Unit<uint16_t> {
  static constexpr int parts = 2, size = 2 * LANES;
  static Vec part(const uint16_t* w, int odd) {
    const Bits u = *reinterpret_cast<const LooseBits*>(w);
    return reinterpret_cast<Vec>(odd ? (u & 0xffff0000u) : (u << 16));
  }
};

template <class T, int M, int N>
inline void step(Vec (&acc)[M][N], const T* const (&w)[N], long at, const float* x, long xs) {
  for (int part = 0; part < Unit<T>::parts; part++) {
    Vec row[N];
    for (int n = 0; n < N; n++) row[n] = Unit<T>::part(w[n] + at, part);
    for (int m = 0; m < M; m++) {
      const Vec v = load(x + m * xs + part * LANES);
      for (int n = 0; n < N; n++) acc[m][n] += row[n] * v;
    }
  }
}

// M rows of x (float32, in Unit order, padded with zeros to whole units) with N rows of w: sums[m][n].
template <class T, int M, int N>
void tile(const T* w, long ws, const float* x, long xs, long k, float* sums) {
  Vec acc[M][N];
  const T* row[N];
  for (int n = 0; n < N; n++) row[n] = w + n * ws;
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) acc[m][n] = Vec{};
  const long whole = k / Unit<T>::size * Unit<T>::size;
  for (long i = 0; i < whole; i += Unit<T>::size) {
    for (int n = 0; n < N; n++) __builtin_prefetch(row[n] + i + N * ws);  // the tile after this one
    step<T, M, N>(acc, row, i, x + i, xs);
  }
  if (whole < k) {
    T rest[N][Unit<T>::size] = {};
    const T* tail[N];
    for (int n = 0; n < N; n++) {
      std::memcpy(rest[n], row[n] + whole, (k - whole) * sizeof(T));
      tail[n] = rest[n];
    }
    step<T, M, N>(acc, tail, 0, x + whole, xs);
  }
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) sums[m * N + n] = total(acc[m][n]);
}

template <class T, int N> void rows(int m, const T* w, long ws, const float* x, long xs, long k, float* sums) {
  switch (m) {
    case 1: return tile<T, 1, N>(w, ws, x, xs, k, sums);
    case 2: return tile<T, 2, N>(w, ws, x, xs, k, sums);
#if defined(__AVX512F__)
    case 3: return tile<T, 3, N>(w, ws, x, xs, k, sums);
    case 4: return tile<T, 4, N>(w, ws, x, xs, k, sums);
    case 5: return tile<T, 5, N>(w, ws, x, xs, k, sums);
    case 6: return tile<T, 6, N>(w, ws, x, xs, k, sums);
#endif
  }
}

// The rows of x as `tile` reads them.
template <class T> const float* spread(const T* x, long xs, int m, long k, long width) {
  static thread_local std::vector<float> buffer;
  buffer.resize(m * width);
  const long whole = k / Unit<T>::size * Unit<T>::size;
  for (int i = 0; i < m; i++) {
    float* to = buffer.data() + i * width;
    const T* from = x + i * xs;
    T rest[Unit<T>::size] = {};
    std::memcpy(rest, from + whole, (k - whole) * sizeof(T));
    for (long j = 0; j < width; j += Unit<T>::size)
      for (int part = 0; part < Unit<T>::parts; part++)
        *reinterpret_cast<Loose*>(to + j + part * LANES) = Unit<T>::part(j < whole ? from + j : rest, part);
  }
  return buffer.data();
}

// One map of a fan: its weight [out, k], its bias or null, and where y [m, out] goes.
struct Map {
  const void* w;
  const void* b;
  void* y;
  long out, ys;
};

template <class T> void columns(const Map& map, long first, long n, const float* x, long xs, int m, long k) {
  const T* w = static_cast<const T*>(map.w) + first * k;
  const T* b = static_cast<const T*>(map.b);
  T* y = static_cast<T*>(map.y);
  float sums[ROWS * OUTS];
  for (int i = 0; i < m; i += ROWS) {
    const int many = std::min(ROWS, m - i);
    const int wide = n == OUTS ? OUTS : 1;
    for (long j = 0; j < n; j += wide) {
      if (wide == OUTS) rows<T, OUTS>(many, w, k, x + i * xs, xs, k, sums);
      else rows<T, 1>(many, w + j * k, k, x + i * xs, xs, k, sums);
      for (int r = 0; r < many; r++)
        for (int c = 0; c < wide; c++) {
          const long at = first + j + c;
          put(y + (i + r) * map.ys + at, sums[r * wide + c] + (b ? get(b + at) : 0.0f));
        }
    }
  }
}

template <class T> void fan(const Map* maps, int count, const T* x, long xs, int m, long k) {
  const long width = (k + Unit<T>::size - 1) / Unit<T>::size * Unit<T>::size;
  const float* spreaded = spread<T>(x, xs, m, k, width);
  long tiles = 0;
  for (int i = 0; i < count; i++) tiles += (maps[i].out + OUTS - 1) / OUTS;
#pragma omp parallel if (tiles > 1)
  {
    const long threads = omp_get_num_threads(), me = omp_get_thread_num();
    long t = tiles * me / threads;
    const long end = tiles * (me + 1) / threads;
    long base = 0;
    for (int i = 0; i < count; i++) {
      const long here = (maps[i].out + OUTS - 1) / OUTS;
      for (; t < end && t < base + here; t++) {
        const long first = (t - base) * OUTS;
        columns<T>(maps[i], first, std::min<long>(OUTS, maps[i].out - first), spreaded, width, m, k);
      }
      base += here;
    }
  }
}

}  // namespace
