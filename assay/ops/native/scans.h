// Recurrences with a matrix [K, V] a head as their state, one token after another, and what stands before them.
//
// The columns of a state do not touch each other: a block of them stays in the nearest cache from the first token to the
// last. So a result does not depend on how a text was cut into steps, on other lanes, or on the number of threads.
#pragma once

#include "pointwise.h"
#include "tape.h"

namespace {

// Numbers of float32 [L, T, heads, size], the last axis dense; `shared` heads of the state have one of these heads.
struct Stream {
  const float* base;
  long lane, time, head, shared;

  const float* at(long l, long t, long h) const { return base + l * lane + t * time + h / shared * head; }
};

// S = Diag(w) S + b p^T + k v^T and o = q S + skip v, with w = e^decay and p = s + a S, where S is decayed before if
// `late`. With a rate p = rate (s - a S), or without a rate v is written for v. Without a nothing is corrected, without k
// nothing else is written, without decay w is 1.
struct Scan {
  long lanes, tokens, heads, keys, values, channels, late;
  Stream q, k, v, decay, a, b, s, rate, skip;
  const float* past;    // [_, H, K, V], dense
  const int64_t* rows;  // where each lane's past stands there
  float *y, *end;       // [L, T, H, V] and [L, H, K, V], dense
};

// w [keys] of a token.
inline void decays(const Scan& s, long lane, long t, long head, float* w) {
  const float* from = s.decay.at(lane, t, head);
  if (!s.channels) {
    const float one = std::exp(*from);
    for (long k = 0; k < s.keys; k++) w[k] = one;
    return;
  }
  for (long k = 0; k < s.keys; k += LANES) {
    const Vec x = some(from + k, s.keys - k);
    store(w + k, x < -87.0f ? Vec{} : exponential(x), s.keys - k);
  }
}

// N vectors of columns of a row of the state.
template <int N> struct Columns {
  Vec c[N];

  Columns() : c{} {}
  Columns(const float* p, long count) {
    for (int n = 0; n < N; n++) c[n] = n * LANES < count ? some(p + n * LANES, count - n * LANES) : Vec{};
  }
  void put(float* p, long count) const {
    for (int n = 0; n < N && n * LANES < count; n++) store(p + n * LANES, c[n], count - n * LANES);
  }
};

// sum of x[k] S[k], the even and the odd keys apart; S has `step` numbers a row.
template <int N> Columns<N> product(const float* x, const float* state, long step, long keys) {
  Columns<N> even, odd;
  long k = 0;
  for (; k + 2 <= keys; k += 2)
    for (int n = 0; n < N; n++) {
      even.c[n] += x[k] * load(state + k * step + n * LANES);
      odd.c[n] += x[k + 1] * load(state + (k + 1) * step + n * LANES);
    }
  for (; k < keys; k++)
    for (int n = 0; n < N; n++) even.c[n] += x[k] * load(state + k * step + n * LANES);
  for (int n = 0; n < N; n++) even.c[n] += odd.c[n];
  return even;
}

// The state after a token, and what q finds in it.
template <int N, bool Corrects, bool Writes>
Columns<N> updated(const float* q, const float* w, const float* b, const Columns<N>& p, const float* k,
                   const Columns<N>& v, const float* from, long fs, float* to, long ts, long keys) {
  Columns<N> even, odd;
  const auto row = [&](long i, Columns<N>& found) {
    for (int n = 0; n < N; n++) {
      Vec state = w[i] * load(from + i * fs + n * LANES);
      if constexpr (Corrects) state += b[i] * p.c[n];
      if constexpr (Writes) state += k[i] * v.c[n];
      save(to + i * ts + n * LANES, state);
      found.c[n] += q[i] * state;
    }
  };
  long i = 0;
  for (; i + 2 <= keys; i += 2) row(i, even), row(i + 1, odd);
  if (i < keys) row(i, even);
  for (int n = 0; n < N; n++) even.c[n] += odd.c[n];
  return even;
}

// All tokens of a lane, of `count` columns of a head from `first` on: N vectors, the last of them perhaps not full.
template <int N, bool Corrects, bool Writes>
void walk(const Scan& s, long lane, long head, long first, long count) {
  static thread_local std::vector<float> buffer;
  constexpr long WIDE = N * LANES;
  buffer.resize(s.keys * (WIDE + 2) + 2 * LANES);
  float *own = buffer.data(), *w = own + s.keys * WIDE, *read = w + s.keys;
  const long place = (lane * s.heads + head) * s.keys * s.values + first;
  const bool whole = count == WIDE;
  const float* from = s.past + (s.rows[lane] * s.heads + head) * s.keys * s.values + first;
  long step = s.values;
  if (!whole) {
    for (long k = 0; k < s.keys; k++) Columns<N>(from + k * s.values, count).put(own + k * WIDE, WIDE);
    from = own, step = WIDE;
  }
  if (!s.decay.base) std::fill(w, w + s.keys, 1.0f);
  for (long t = 0; t < s.tokens; t++) {
    if (s.decay.base) decays(s, lane, t, head, w);
    Columns<N> p, v, given;
    const float *b = nullptr, *k = nullptr;
    if constexpr (Corrects) {
      const float* a = s.a.at(lane, t, head);
      for (long i = 0; i < s.keys; i++) read[i] = s.late ? a[i] * w[i] : a[i];
      const Columns<N> now = product<N>(read, from, step, s.keys), wanted(s.s.at(lane, t, head) + first, count);
      const float rate = s.rate.base ? *s.rate.at(lane, t, head) : 0.0f;
      for (int n = 0; n < N; n++) p.c[n] = s.rate.base ? rate * (wanted.c[n] - now.c[n]) : wanted.c[n] + now.c[n];
      b = s.b.at(lane, t, head);
    }
    if constexpr (Writes) {
      k = s.k.at(lane, t, head);
      given = v = Columns<N>(s.v.at(lane, t, head) + first, count);
      if (!Corrects && s.rate.base)
        for (int n = 0; n < N; n++) v.c[n] *= *s.rate.at(lane, t, head);
    }
    const bool last = whole && t + 1 == s.tokens;
    float* to = last ? s.end + place : own;
    const long wide = last ? s.values : WIDE;
    Columns<N> found =
        updated<N, Corrects, Writes>(s.q.at(lane, t, head), w, b, p, k, v, from, step, to, wide, s.keys);
    if (s.skip.base)
      for (int n = 0; n < N; n++) found.c[n] += *s.skip.at(lane, t, head) * given.c[n];
    found.put(s.y + ((lane * s.tokens + t) * s.heads + head) * s.values + first, count);
    from = to, step = wide;
  }
  if (!whole)
    for (long k = 0; k < s.keys; k++) Columns<N>(own + k * WIDE, WIDE).put(s.end + place + k * s.values, count);
}

template <bool Corrects, bool Writes> void scan(const Scan& s) {
  // Of many keys fewer columns are in the nearest cache at once.
  const long wide = s.keys <= 96 ? 4 * LANES : 2 * LANES, blocks = (s.values + wide - 1) / wide;
  const long tasks = s.lanes * s.heads * blocks;
#pragma omp parallel for schedule(static) if (tasks * s.tokens * s.keys * wide > ALONE)
  for (long task = 0; task < tasks; task++) {
    const long block = task % blocks, head = task / blocks % s.heads, lane = task / blocks / s.heads;
    const long first = block * wide, count = std::min(wide, s.values - first);
    if (count > 2 * LANES) walk<4, Corrects, Writes>(s, lane, head, first, count);
    else if (count > LANES) walk<2, Corrects, Writes>(s, lane, head, first, count);
    else walk<1, Corrects, Writes>(s, lane, head, first, count);
  }
}

// y_t = sum_j w_j x_(t - K + 1 + j) of each channel, and the last K - 1 inputs of each lane. wide: y is float32.
struct Conv {
  long lanes, tokens, channels, taps, silu, wide;
  const void* x;  // [L, T, C], the last axis dense, with these strides
  long lane, time;
  const void *weight, *bias;  // [C, K] and [C] or null
  const void* past;           // [_, K - 1, C], the last axis dense, with these strides
  long past_lane, past_time;
  const int64_t *rows, *filled;  // where each lane's past stands; how many places hold tokens, or null: all
  void *y, *tail;                // [L, T, C], dense, and [L, K - 1, C] with these strides
  long tail_lane, tail_time;
};

// The input `at` places behind the first one of the past.
template <class T> const T* entered(const Conv& c, long lane, long at) {
  const long before = at - (c.taps - 1);
  if (before < 0) return static_cast<const T*>(c.past) + c.rows[lane] * c.past_lane + at * c.past_time;
  return static_cast<const T*>(c.x) + lane * c.lane + before * c.time;
}

template <class T, int N> void convolve(const Conv& c, long lane, long first, long count) {
  static thread_local std::vector<Vec> taps;
  taps.resize(c.taps * N);
  const T* weight = static_cast<const T*>(c.weight) + first * c.taps;
  for (long j = 0; j < c.taps; j++)
    for (long i = 0; i < N * LANES; i++) taps[j * N + i / LANES][i % LANES] = i < count ? get(weight + i * c.taps + j) : 0.0f;
  Vec bias[N] = {};
  for (int n = 0; n < N && c.bias && n * LANES < count; n++)
    bias[n] = some(static_cast<const T*>(c.bias) + first + n * LANES, count - n * LANES);
  long at = lane * c.tokens * c.channels + first;
  for (long t = 0; t < c.tokens; t++, at += c.channels) {
    Vec sum[N] = {};
    for (long j = c.taps - 1; j >= 0; j--) {
      const T* x = entered<T>(c, lane, t + j) + first;
      for (int n = 0; n < N && n * LANES < count; n++) sum[n] += taps[j * N + n] * some(x + n * LANES, count - n * LANES);
    }
    for (int n = 0; n < N && n * LANES < count; n++) {
      const Vec plain = sum[n] + bias[n], found = c.silu ? silu(plain) : plain;
      if (c.wide) store(static_cast<float*>(c.y) + at + n * LANES, found, count - n * LANES);
      else store(static_cast<T*>(c.y) + at + n * LANES, found, count - n * LANES);
    }
  }
}

template <class T> void conv(const Conv& c) {
  constexpr int N = 4;
  constexpr long WIDE = N * LANES;
  const long blocks = (c.channels + WIDE - 1) / WIDE, tasks = c.lanes * blocks;
#pragma omp parallel for schedule(static) if (tasks * WIDE * c.tokens > ALONE)
  for (long task = 0; task < tasks; task++) {
    const long lane = task / blocks, first = task % blocks * WIDE, count = std::min(WIDE, c.channels - first);
    convolve<T, N>(c, lane, first, count);
    for (long j = 0; j < c.taps - 1; j++) {
      const long at = (c.filled ? c.filled[lane] : c.tokens) + j;
      T* to = static_cast<T*>(c.tail) + lane * c.tail_lane + j * c.tail_time + first;
      std::memcpy(to, entered<T>(c, lane, at) + first, count * sizeof(T));
    }
  }
}

// ln(1 + e^x) = max(x, 0) + ln(1 + u) with u = e^-|x|, and ln(1 + u) = 2 artanh(u / (2 + u)), a series in squares of at
// most 1/9: to 2e-7 of the result.
inline Vec softplus(Vec x) {
  const Vec u = exponential(x > 0.0f ? -x : x), z = u / (2.0f + u), square = z * z;
  Vec sum = Vec{} + 1.0f / 17.0f;
  for (int n = 15; n > 0; n -= 2) sum = sum * square + 1.0f / n;
  return (x > 0.0f ? x : Vec{}) + 2.0f * z * sum;
}

// Of each row of x [m, heads]: step = softplus(x + bias) between two bounds, and decay = -e^a step.
template <class T>
void rates(const T* x, long xs, long m, long heads, const T* bias, const T* a, float low, float high, float* step,
           float* decay) {
#pragma omp parallel for if (m * heads > ALONE)
  for (long i = 0; i < m; i++)
    for (long h = 0; h < heads; h += LANES) {
      Vec found = softplus(some(x + i * xs + h, heads - h) + some(bias + h, heads - h));
      found = found < low ? Vec{} + low : found > high ? Vec{} + high : found;
      store(step + i * heads + h, found, heads - h);
      store(decay + i * heads + h, -exponential(some(a + h, heads - h)) * found, heads - h);
    }
}

// y = scale x / sqrt(|x|^2 + eps) of each head of x [m, heads, size], with these strides of rows and heads; y is dense.
template <class T>
void unit(const T* x, long xs, long xh, long m, long heads, long size, float eps, float scale, float* y) {
#pragma omp parallel for if (m * heads * size > ALONE)
  for (long i = 0; i < m * heads; i++) {
    const T* from = x + i / heads * xs + i % heads * xh;
    Vec squares = {};
    for (long j = 0; j < size; j += LANES) {
      const Vec v = some(from + j, size - j);
      squares += v * v;
    }
    const float factor = scale / std::sqrt(total(squares) + eps);
    for (long j = 0; j < size; j += LANES) store(y + i * size + j, some(from + j, size - j) * factor, size - j);
  }
}

inline Stream stream(const long* n) { return {(const float*)n[0], n[1], n[2], n[3], n[4]}; }

}  // namespace

extern "C" {

// sizes, then q, k, v, decay, a, b, s, rate and skip (base or 0, strides, shared), then past, rows, y and end.
void assay_scan(const long* n) {
  const long* at = n + 7;
  const Scan s{n[0], n[1], n[2], n[3], n[4], n[5], n[6], stream(at), stream(at + 5), stream(at + 10), stream(at + 15),
               stream(at + 20), stream(at + 25), stream(at + 30), stream(at + 35), stream(at + 40),
               (const float*)at[45], (const int64_t*)at[46], (float*)at[47], (float*)at[48]};
  if (!s.a.base) scan<false, true>(s);
  else if (!s.k.base) scan<true, false>(s);
  else scan<true, true>(s);
}

void assay_conv(int half, const long* n) {
  const Conv c{n[0], n[1], n[2], n[3], n[4], n[5], (const void*)n[6], n[7], n[8], (const void*)n[9],
               (const void*)n[10], (const void*)n[11], n[12], n[13], (const int64_t*)n[14], (const int64_t*)n[15],
               (void*)n[16], (void*)n[17], n[18], n[19]};
  if (half) conv<uint16_t>(c);
  else conv<float>(c);
}

void assay_rates(int half, const void* x, long xs, long m, long heads, const void* bias, const void* a, float low,
                 float high, float* step, float* decay) {
  if (half) rates((const uint16_t*)x, xs, m, heads, (const uint16_t*)bias, (const uint16_t*)a, low, high, step, decay);
  else rates((const float*)x, xs, m, heads, (const float*)bias, (const float*)a, low, high, step, decay);
}

void assay_unit(int half, const void* x, long xs, long xh, long m, long heads, long size, float eps, float scale,
                float* y) {
  if (half) unit((const uint16_t*)x, xs, xh, m, heads, size, eps, scale, y);
  else unit((const float*)x, xs, xh, m, heads, size, eps, scale, y);
}

AGAIN(scan)
AGAIN(conv)
AGAIN(rates)
AGAIN(unit)

}  // extern "C"
