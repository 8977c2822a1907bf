// Many rows times weights in bfloat16, in float32: some of the weight is widened and transposed, and stays in cache
// while rows pass by. A value's products are added one after another, so that its bits depend on neither rows nor threads.
#pragma once

#include "blocks.h"
#include "linear.h"

namespace {

constexpr long ROWS_AT_ONCE = 1024, DEPTH = 1536;  // and inputs of a block of the weight, for the second cache
constexpr long NEAR_ROWS = 4 * TALL;  // whose sums stay in the first

struct Wide {
  const float* x;
  long m, k;
};

// What a thread works in: some of the weight, and the sums of all rows with it.
struct Desk {
  std::vector<Line> weight, sums;

  void fit(long m) {
    if (weight.empty()) weight.resize((DEPTH + 2 * LANES) * BROAD);
    if (sums.size() < static_cast<size_t>(m * BROAD)) sums.resize(m * BROAD);
  }
};

// Vectors i and i + 8 lane by lane in turns.
inline void shuffle(const Vec* v, Vec* into) {
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    const Vec a = v[i], b = v[i + 8];
    into[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    into[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}

// Columns become rows: four perfect shuffles of 256.
inline void transpose(Vec* v) {
  Vec other[LANES];
  shuffle(v, other);
  shuffle(other, v);
  shuffle(v, other);
  shuffle(other, v);
}

// into[d, j] = w[j, d] of `outs` rows of the weight, which are k apart, and zeros where there are none, up to `width`
// and the next multiple of 32 of `depth`. They are transposed in pairs, which are half as many.
inline void widen(const uint16_t* w, long k, long outs, long depth, float* into, long width) {
  for (long j = 0; j < width; j += LANES)
    for (long d = 0; d < depth; d += 2 * LANES) {
      Vec v[LANES] = {};
#pragma GCC unroll 16
      for (long i = 0; i < LANES; i++) {
        const uint16_t* from = w + (j + i) * k + d;
        if (j + i >= outs) continue;
        if (depth - d >= 2 * LANES) v[i] = reinterpret_cast<Vec>(Bits(*reinterpret_cast<const LooseBits*>(from)));
        else std::memcpy(&v[i], from, (depth - d) * sizeof(uint16_t));
      }
      transpose(v);
      float* row = into + d * width + j;
#pragma GCC unroll 16
      for (long i = 0; i < LANES; i++, row += 2 * width) {
        const Bits pair = reinterpret_cast<Bits>(v[i]);
        save(row, reinterpret_cast<Vec>(pair << 16));
        save(row + width, reinterpret_cast<Vec>(pair & 0xffff0000u));
      }
    }
}

template <bool ADD> void sums(long m, const float* x, long k, const float* w, long depth, float* c, long width) {
  switch (width / LANES) {
    case 1: return strip<1, ADD>(m, x, k, w, width, depth, c, width);
    case 2: return strip<2, ADD>(m, x, k, w, width, depth, c, width);
    case 3: return strip<3, ADD>(m, x, k, w, width, depth, c, width);
    case 4: return strip<4, ADD>(m, x, k, w, width, depth, c, width);
  }
}

// Outputs of a map from `first` on, `tiles` times sixteen or to its end, for the rows from `row` on.
inline void outputs(const Map& map, long first, long tiles, long row, const Wide& x, Desk& desk) {
  const long width = tiles * LANES, outs = std::min(width, map.out - first);
  float* w = desk.weight[0].at;
  Vec bias[BROAD] = {};
  for (long j = 0; map.b && j < outs; j += LANES)
    bias[j / LANES] = some(static_cast<const uint16_t*>(map.b) + first + j, outs - j);
  for (long from = 0; from < x.k; from += DEPTH) {
    const long depth = std::min(DEPTH, x.k - from);
    widen(static_cast<const uint16_t*>(map.w) + first * x.k + from, x.k, outs, depth, w, width);
    for (long i = 0; i < x.m; i += NEAR_ROWS) {
      const long many = std::min(NEAR_ROWS, x.m - i);
      float* c = desk.sums[0].at + (x.k > DEPTH ? i : 0) * width;
      if (from) sums<true>(many, x.x + i * x.k + from, x.k, w, depth, c, width);
      else sums<false>(many, x.x + i * x.k, x.k, w, depth, c, width);
      if (from + depth < x.k) continue;
      for (long r = 0; r < many; r++)
        for (long j = 0; j < outs; j += LANES)
          store(static_cast<uint16_t*>(map.y) + (row + i + r) * map.ys + first + j,
                load(c + r * width + j) + bias[j / LANES], outs - j);
    }
  }
}

// y = x w^T + b of each map, for any number of rows.
inline void many(const Map* maps, int count, const uint16_t* x, long xs, long m, long k) {
  static thread_local std::vector<Line> lines;
  const Cut groups{m, (m + ROWS_AT_ONCE - 1) / ROWS_AT_ONCE};
  const long most = groups.size(0);
  if (lines.size() * LANES < static_cast<size_t>(most * k)) lines.resize(most * k / LANES + 1);
  float* wide = lines[0].at;
#pragma omp parallel
  {
    static thread_local Desk desk;
    desk.fit(most);
    for (long g = 0; g < groups.parts; g++) {
      const long row = groups.first(g), rows = groups.size(g);
#pragma omp for schedule(static)
      for (long i = 0; i < rows; i++)
        for (long j = 0; j < k; j += LANES) store(wide + i * k + j, some(x + (row + i) * xs + j, k - j), k - j);
      shared_out(maps, count, [&](const Map& map, long from, long to) {
        const Cut blocks{to - from, (to - from + BROAD - 1) / BROAD};
        for (long b = 0; b < blocks.parts; b++)
          outputs(map, (from + blocks.first(b)) * LANES, blocks.size(b), row, {wide, rows, k}, desk);
      });
#pragma omp barrier
    }
  }
}

}  // namespace
