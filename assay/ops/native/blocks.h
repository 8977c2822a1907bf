// Products of matrices in float32 whose sums stay in registers: a value's products are added one after another.
#pragma once

#include "vectors.h"

namespace {

#if defined(__AVX512F__)
constexpr int TALL = 6, BROAD = 4;  // rows and vectors of a product that stay in registers
#else
constexpr int TALL = 4, BROAD = 1;
#endif

// What a value of a row adds to a sum with a vector of the other factor.
struct Multiplied {
  static Vec add(Vec sum, float x, Vec row) { return sum + x * row; }
};

// c[i, :] = (or +=) a[i, :depth] b[:depth, :], with M rows and N vectors.
template <int M, int N, bool ADD, class Op>
void block(const float* a, long as, const float* b, long bs, long depth, float* c, long cs) {
  Vec acc[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) acc[i][n] = ADD ? load(c + i * cs + n * LANES) : Vec{};
  for (long d = 0; d < depth; d++) {
    Vec row[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) row[n] = load(b + d * bs + n * LANES);
#pragma GCC unroll 8
    for (int i = 0; i < M; i++) {
      const float x = a[i * as + d];
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) acc[i][n] = Op::add(acc[i][n], x, row[n]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; i++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) save(c + i * cs + n * LANES, acc[i][n]);
}

template <int N, bool ADD, class Op = Multiplied>
void strip(long m, const float* a, long as, const float* b, long bs, long depth, float* c, long cs) {
  long i = 0;
  for (; i + TALL <= m; i += TALL) block<TALL, N, ADD, Op>(a + i * as, as, b, bs, depth, c + i * cs, cs);
  for (; i < m; i++) block<1, N, ADD, Op>(a + i * as, as, b, bs, depth, c + i * cs, cs);
}

// The same with m rows and any number of whole vectors.
template <bool ADD, class Op = Multiplied>
void product(long m, const float* a, long as, const float* b, long depth, float* c, long width) {
  long j = 0;
  for (; j + BROAD * LANES <= width; j += BROAD * LANES)
    strip<BROAD, ADD, Op>(m, a, as, b + j, width, depth, c + j, width);
  for (; j < width; j += LANES) strip<1, ADD, Op>(m, a, as, b + j, width, depth, c + j, width);
}

}  // namespace
