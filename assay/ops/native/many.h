// Many rows times weights in bfloat16, in float32: some of the weight is widened and transposed, and stays in cache while
// rows pass by. A value's products are added one after another, so that its bits depend on neither rows nor threads.
#pragma once

#include "blocks.h"
#include "linear.h"

namespace {

constexpr long ROWS_AT_ONCE = 1024, DEPTH = 1536;  // and inputs of a block of the weight, for the second cache

struct Wide {
  const float* x;
  long m, k;
};

// What a thread works in: some of the weight, and the sums of all rows with it.
struct Desk {
  std::vector<Line> weight, sums;

  void fit(long m) {
    if (weight.empty()) weight.resize(DEPTH * BROAD);
    if (sums.size() < static_cast<size_t>(m * BROAD)) sums.resize(m * BROAD);
  }
};

// Columns become rows, by four perfect shuffles of all 256 values.
inline void transpose(Vec* v) {
  Vec next[LANES];
  for (int round = 0; round < 4; round++) {
    for (int i = 0; i < 8; i++) {
      const Vec a = v[i], b = v[i + 8];
      next[2 * i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
      next[2 * i + 1] = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    }
    std::copy(next, next + LANES, v);
  }
}

// into[d, j] = w[j, d] of `outs` rows of the weight, which are k apart, and of zeros up to `width`.
inline void widen(const uint16_t* w, long k, long outs, long depth, float* into, long width) {
  for (long j = 0; j < width; j += LANES)
    for (long d = 0; d < depth; d += LANES) {
      Vec v[LANES];
      for (long i = 0; i < LANES; i++) v[i] = j + i < outs ? some(w + (j + i) * k + d, depth - d) : Vec{};
      transpose(v);
      for (long i = 0; i < std::min<long>(LANES, depth - d); i++) save(into + (d + i) * width + j, v[i]);
    }
}

template <bool ADD> void sums(const Wide& x, long from, long depth, const float* w, float* c, long width) {
  switch (width / LANES) {
    case 1: return strip<1, ADD>(x.m, x.x + from, x.k, w, width, depth, c, width);
    case 2: return strip<2, ADD>(x.m, x.x + from, x.k, w, width, depth, c, width);
    case 3: return strip<3, ADD>(x.m, x.x + from, x.k, w, width, depth, c, width);
    case 4: return strip<4, ADD>(x.m, x.x + from, x.k, w, width, depth, c, width);
  }
}

// Outputs of a map from `first` on, `tiles` times sixteen or to its end, for the rows from `row` on.
inline void outputs(const Map& map, long first, long tiles, long row, const Wide& x, Desk& desk) {
  const long width = tiles * LANES, outs = std::min(width, map.out - first);
  float *w = desk.weight[0].at, *c = desk.sums[0].at;
  for (long from = 0; from < x.k; from += DEPTH) {
    const long depth = std::min(DEPTH, x.k - from);
    widen(static_cast<const uint16_t*>(map.w) + first * x.k + from, x.k, outs, depth, w, width);
    if (from) sums<true>(x, from, depth, w, c, width);
    else sums<false>(x, from, depth, w, c, width);
  }
  Vec bias[BROAD] = {};
  for (long j = 0; map.b && j < outs; j += LANES)
    bias[j / LANES] = some(static_cast<const uint16_t*>(map.b) + first + j, outs - j);
  for (long i = 0; i < x.m; i++)
    for (long j = 0; j < outs; j += LANES)
      store(static_cast<uint16_t*>(map.y) + (row + i) * map.ys + first + j, load(c + i * width + j) + bias[j / LANES],
            outs - j);
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
