// A few rows times a weight [out, k].
#pragma once

#include "units.h"

namespace {

// Rows of x and of the weight whose sums fill the registers: up to FEW rows with NARROW, or up to ROWS with WIDE. Of
// short registers the lanes are walked in two halves.
#if defined(__AVX512F__)
constexpr int FEW = 6, NARROW = 4, ROWS = 3, WIDE = 8, HALVES = 1;
#else
constexpr int FEW = 3, NARROW = 4, ROWS = 3, WIDE = 4, HALVES = 2;
#endif
constexpr int WIDTH = LANES / HALVES;
constexpr long NEAR = 20 << 10;  // bytes of the weight that stay in the nearest cache
constexpr long SOON = 8 << 10;  // bytes of it that are worked off before memory has answered

typedef float Reg __attribute__((vector_size(4 * WIDTH)));
template <class T> using Of = Unit<T, Reg>;

// N rows of the weight as they are held, `apart` from each other.
template <class T, int N> struct Held {
  typedef Of<T> unit;
  static constexpr int outs = N;
  const T* from;
  long apart;

  Reg at(int n, long i, int part, int half) const { return unit::part(from + n * apart + i * unit::size, part, half); }
};

// Rows of the weight that will be wanted next, fetched as a tile goes along.
struct Ahead {
  const char* from;
  long rows, apart, step;  // bytes from row to row and from unit to unit
};

// acc[m][n] = (FRESH) or += M rows of x times some of the weight over `units`; x: vectors of its M rows in turns.
template <int M, bool FRESH, class W> void tile(const W& w, long units, const float* x, Line* acc, Ahead ahead) {
  const long rows = ahead.rows, apart = ahead.apart;
  constexpr int N = W::outs, NEXT = N < WIDE ? 3 : 2;  // the cache that what comes next is fetched into
  for (int half = 0; half < HALVES; half++) {
    Reg sum[M][N];
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++)
        sum[m][n] = FRESH ? Reg{} : *reinterpret_cast<const Reg*>(acc[m * N + n].at + half * WIDTH);
    const char* next = ahead.from;
    for (long i = 0; i < units; i++, next += ahead.step) {
      if (rows) __builtin_prefetch(next, 0, NEXT);
      for (long r = 1; r < rows; r++) __builtin_prefetch(next + r * apart, 0, NEXT);
      for (int part = 0; part < W::unit::parts; part++) {
        Reg v[M];
        for (int m = 0; m < M; m++)
          v[m] = *reinterpret_cast<const Reg*>(x + ((i * W::unit::parts + part) * M + m) * LANES + half * WIDTH);
        for (int n = 0; n < N; n++) {
          const Reg row = w.at(n, i, part, half);
          for (int m = 0; m < M; m++) sum[m][n] = W::unit::add(sum[m][n], row, v[m]);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int n = 0; n < N; n++) *reinterpret_cast<Reg*>(acc[m * N + n].at + half * WIDTH) = sum[m][n];
  }
}

template <bool FRESH, class W>
void tile(int m, const W& w, long units, const float* x, Line* acc, Ahead ahead) {
  switch (m) {
    case 1: return tile<1, FRESH>(w, units, x, acc, ahead);
    case 2: return tile<2, FRESH>(w, units, x, acc, ahead);
    case 3: return tile<3, FRESH>(w, units, x, acc, ahead);
  }
  if constexpr (W::outs <= NARROW && FEW > 3) switch (m) {
    case 4: return tile<4, FRESH>(w, units, x, acc, ahead);
    case 5: return tile<5, FRESH>(w, units, x, acc, ahead);
    case 6: return tile<6, FRESH>(w, units, x, acc, ahead);
  }
}

template <class W>
void tile(bool fresh, int m, const W& w, long units, const float* x, Line* acc, Ahead ahead) {
  if (fresh) tile<true>(m, w, units, x, acc, ahead);
  else tile<false>(m, w, units, x, acc, ahead);
}

// Rows of x as tiles read them: as the weight's units, padded to whole ones, the rows of a tile in turns.
struct Spread {
  Line* lines;
  long k, units, each;  // lines of a row
  Cut rows, pieces, ahead;

  const float* tile(long t, long line) const { return lines[rows.first(t) * each + line * rows.size(t)].at; }
};

template <class T> void spread(const T* x, long xs, const Spread& s, long t) {
  const long first = s.rows.first(t), count = s.rows.size(t);
  for (long m = 0; m < count; m++) lay<T, Reg>(x + (first + m) * xs, s.k, s.lines + first * s.each + m, count);
}

// What a thread needs: sums of the rows with some outputs, their totals with 16, and rows of the weight where there
// are fewer than a tile takes.
struct Scratch {
  std::vector<Line> acc, sums, few;

  void fit(long m) {
    const size_t rows = (m + 3) / 4 * 4;  // whole vectors of totals
    if (sums.size() >= rows) return;
    sums.resize(rows);
    acc.resize(rows * WIDE);
  }
};

// The units [from, to) of N rows of the weight with tile t. The last unit may be cut off: it is padded with zeros.
template <class T, int N>
void held(const T* w, const Spread& x, long t, long from, long to, Scratch& s, Ahead ahead) {
  const long whole = std::min(to, x.k / Of<T>::size), parts = Of<T>::parts;
  const int m = x.rows.size(t);
  Line* acc = &s.acc[x.rows.first(t) * N];
  tile(from == 0, m, Held<T, N>{w + from * Of<T>::size, x.k}, whole - from, x.tile(t, from * parts),
       acc, ahead);
  if (whole == to) return;
  T rest[N][Of<T>::size] = {};
  for (int n = 0; n < N; n++)
    std::memcpy(rest[n], w + n * x.k + whole * Of<T>::size, (x.k - whole * Of<T>::size) * sizeof(T));
  const Held<T, N> last{rest[0], Of<T>::size};
  tile<false>(m, last, 1, x.tile(t, whole * parts), acc, Ahead{});
}

// All rows with N of the weight: s.acc. The weight is cut so that a piece stays in the nearest cache while the tiles of
// x pass by; its next rows are fetched meanwhile.
template <class T, int N> void outputs(const T* w, const Spread& x, Scratch& s) {
  const long bytes = x.k * sizeof(T), far = N * bytes < SOON ? 2 * N : N;
  for (long p = 0; p < x.pieces.parts; p++) {
    const long from = x.pieces.first(p), to = from + x.pieces.size(p);
    const char* next = reinterpret_cast<const char*>(w + far * x.k + from * Of<T>::size);
    for (long t = 0; t < x.rows.parts; t++) {
      const long rows = t < x.ahead.parts ? x.ahead.size(t) : 0;
      held<T, N>(w, x, t, from, to, s, {rows ? next + x.ahead.first(t) * bytes : nullptr, rows, bytes, sizeof(Line)});
    }
  }
}

// One map of a fan: its weight [out, k], its bias or null, and where y [m, out] goes.
struct Map {
  const void* w;
  const void* b;
  void* y;
  long out, ys;
};

template <class T, int N> void sixteen(const Map& map, long first, long m, const Spread& x, Scratch& s) {
  const long wide = std::min<long>(LANES, map.out - first);
  for (long c = 0; c < wide; c += N) {
    const T* w = static_cast<const T*>(map.w) + (first + c) * x.k;
    if (wide - c < N) {
      s.few.resize(N * (x.k * sizeof(T) / sizeof(Line) + 1));
      w = static_cast<const T*>(std::memcpy(s.few.data(), w, (wide - c) * x.k * sizeof(T)));
    }
    outputs<T, N>(w, x, s);
    for (long i = 0; i < m * N; i += LANES) {
      const Vec found = totals(reinterpret_cast<const Vec*>(&s.acc[i]));
      const float* sums = reinterpret_cast<const float*>(&found);
      for (int j = 0; j < LANES / N; j++) std::memcpy(s.sums[i / N + j].at + c, sums + j * N, N * sizeof(float));
    }
  }
  const Vec bias = map.b ? some(static_cast<const T*>(map.b) + first, wide) : Vec{};
  for (long i = 0; i < m; i++)
    store(static_cast<T*>(map.y) + i * map.ys + first, load(s.sums[i].at) + bias, wide);
}

template <class T, int M, int N> void fan(const Map* maps, int count, const T* x, long xs, long m, long k) {
  static thread_local std::vector<Line> lines;
  const long units = (k + Of<T>::size - 1) / Of<T>::size, each = units * Of<T>::parts;
  const long tiles = (m + M - 1) / M, pieces = tiles == 1 ? 1 : (N * k * sizeof(T) + NEAR - 1) / NEAR;
  if (lines.size() < static_cast<size_t>(m * each)) lines.resize(m * each);
  const Spread s{lines.data(), k, units, each, {m, tiles}, {units, pieces}, {N, std::min<long>(N, tiles)}};
  if (tiles == 1) spread(x, xs, s, 0);
#pragma omp parallel if (tiles_of(maps, count) > 1)
  {
    if (tiles > 1) {
#pragma omp for schedule(static)
      for (long t = 0; t < tiles; t++) spread(x, xs, s, t);
    }
    static thread_local Scratch scratch;
    scratch.fit(m);
    dealt(maps, count, [&](const Map& map, long tile) { sixteen<T, N>(map, tile * LANES, m, s, scratch); });
  }
}

// Wide tiles read x less often, narrow ones the weight, whose halves have to be widened each time.
template <class T> void fan(const Map* maps, int count, const T* x, long xs, long m, long k) {
  const bool apart = k * sizeof(T) % 1024;  // else rows of the weight would share a few sets of a cache
  if (m > FEW && sizeof(T) == sizeof(float) && apart) fan<T, ROWS, WIDE>(maps, count, x, xs, m, k);
  else fan<T, FEW, NARROW>(maps, count, x, xs, m, k);
}

}  // namespace
