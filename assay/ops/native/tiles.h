// Many queries a sequence: softmax over tiles of keys that stay in cache, with a maximum and a sum that grow tile by tile
// (Dao et al. 2022, arXiv 2205.14135, algorithm 1). Products and sums are in float32, whatever the values are stored in.
#pragma once

#include "attend.h"
#include "blocks.h"

namespace {

constexpr long KEYS = 64;  // of a tile, from a multiple of it on

// `a` says where keys, values and what comes out stand, and its strides of q are those of a token and a head. seen
// [rows, tokens, entries]: which entries count for which token.
struct Tiled {
  Attend a;
  long tokens, seen_token;

  // Tokens whose heads of a group are worked on together: enough that a tile of keys is worth its preparation.
  long queries() const { return std::max<long>(16, std::min<long>(192, 384 / a.shared() / 16 * 16)); }
};

// How queries [m, depth] and a tile of keys [depth, KEYS] are laid out, and how they are multiplied: floats in their
// order; halves of odd place before those of even place, which is the order of the instruction that takes them in pairs.
template <class T> struct Scores {
  typedef Multiplied op;
  static long depth(long size) { return size; }
  static void query(const T* q, long size, float* to) {
    for (long d = 0; d < size; d += LANES) store(to + d, some(q + d, size - d), size - d);
  }
  static void key(const T* k, long size, float* to) {
    for (long d = 0; d < size; d++) to[d * KEYS] = k[d];
  }
};

template <> struct Scores<uint16_t> {
#if defined(__AVX512BF16__)
  struct op {
    static Vec add(Vec sum, float x, Vec row) { return Unit<uint16_t, Vec>::add(sum, Vec(_mm512_set1_ps(x)), row); }
  };
  static long depth(long size) { return (size + 1) / 2; }
  static void query(const uint16_t* q, long size, float* to) {
    to[size / 2] = 0.0f;  // of an odd size; else the next row's, or one that is there for this
    std::memcpy(to, q, size * sizeof(uint16_t));
  }
  static void key(const uint16_t* k, long size, float* to) {
    for (long d = 0; d < size; d += 2) {
      uint16_t pair[2] = {k[d]};
      if (d + 1 < size) pair[1] = k[d + 1];
      std::memcpy(to + d / 2 * KEYS, pair, sizeof pair);
    }
  }
#else
  typedef Multiplied op;
  static long depth(long size) { return size + size % 2; }
  static void query(const uint16_t* q, long size, float* to) {
    for (long d = 0; d < depth(size); d++) to[d ^ 1] = d < size ? get(q + d) : 0.0f;
  }
  static void key(const uint16_t* k, long size, float* to) {
    for (long d = 0; d < depth(size); d++) to[(d ^ 1) * KEYS] = d < size ? get(k + d) : 0.0f;
  }
#endif
};

// What a thread works in: m rows of queries, logits and results, and a tile of keys (turned) and values.
struct Bench {
  std::vector<float> floats;
  float *q, *z, *out, *keys, *values, *top, *sum;

  void lay(long m, long depth, long wide) {
    floats.resize(m * (depth + KEYS + wide + 2) + 1 + KEYS * (depth + wide));
    float* at = floats.data();
    for (auto [where, count] : {std::pair{&q, m * depth + 1}, {&z, m * KEYS}, {&out, m * wide}, {&keys, depth * KEYS},
                                {&values, KEYS * wide}, {&top, m}, {&sum, m}})
      *where = at, at += count;
  }
};

template <class T> void load_keys(const Attend& a, long row, long group, long first, long last, Bench& b) {
  std::memset(b.keys, 0, (last - first < KEYS) * Scores<T>::depth(a.size) * KEYS * sizeof(float));
  runs<T>(a, a.k, row, first, last, nullptr, [&](long at, const Run<T>& k) {
    for (long i = 0; i < k.count; i++)
      Scores<T>::key(k.base + i * k.step + group * a.k.strides[2], a.size, b.keys + at + i);
  });
}

template <class T> void load_values(const Attend& a, long row, long group, long first, long last, long wide, Bench& b) {
  runs<T>(a, a.v, row, first, last, nullptr, [&](long at, const Run<T>& v) {
    for (long i = 0; i < v.count; i++)
      for (long j = 0; j < wide; j += LANES)
        save(b.values + (at + i) * wide + j, some(v.base + i * v.step + group * a.v.strides[2] + j, a.width - j));
  });
}

// The largest of each of sixteen vectors, a NaN where there is one, by a tree as that of `totals`.
inline Vec largests(const Vec* v) {
  Vec a[8], b[4], c[2];
  for (int i = 0; i < 8; i++)
    a[i] = larger(
        __builtin_shufflevector(v[i], v[i + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23),
        __builtin_shufflevector(v[i], v[i + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31));
  for (int i = 0; i < 4; i++)
    b[i] = larger(
        __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27),
        __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31));
  for (int i = 0; i < 2; i++)
    c[i] = larger(
        __builtin_shufflevector(b[i], b[i + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29),
        __builtin_shufflevector(b[i], b[i + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31));
  return larger(__builtin_shufflevector(c[0], c[1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30),
                __builtin_shufflevector(c[0], c[1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31));
}

// A tile's logits of up to 16 rows become shares, e^(z - top), and what was summed before is worth less where a top
// rises. seen(r): which of `count` entries count for row r, or null: all.
template <class Seen>
void share(const Attend& a, float* z, long many, Seen seen, long count, float* top, float* sum, float* out, long wide) {
  constexpr long N = KEYS / LANES;
  const Vec none = Vec{} - INFINITY;
  Vec most[LANES], sums[LANES];
  for (long r = 0; r < LANES; r++) most[r] = none, sums[r] = Vec{};
  for (long r = 0; r < many; r++) {
    const uint8_t* flags = seen(r);
    for (long i = 0; i < N; i++) {
      float* at = z + r * KEYS + i * LANES;
      Vec v = load(at) * a.scale;
      if (a.softcap > 0.0f) v = a.softcap * hyperbolic(v / a.softcap);
      if (flags) v = i * LANES < count && shown(flags + i * LANES, count - i * LANES) ? v : none;
      save(at, v);
      most[r] = larger(most[r], v);
    }
  }
  const Vec before = some(top, many), next = larger(before, largests(most));
  const Vec base = next == -INFINITY ? Vec{} : next;
  const Vec fade = before == next ? Vec{} + 1.0f : before == -INFINITY ? Vec{} : exponential(before - base);
  for (long r = 0; r < many; r++)
    for (long i = 0; i < N; i++) {
      float* at = z + r * KEYS + i * LANES;
      const Vec v = load(at), e = v == -INFINITY ? Vec{} : exponential(v - base[r]);
      sums[r] += e;
      save(at, e);
    }
  store(sum, some(sum, many) * fade + totals(sums), many);
  store(top, next, many);
  for (long r = 0; r < many; r++)
    if (fade[r] != 1.0f)
      for (long j = 0; j < wide; j += LANES) save(out + r * wide + j, load(out + r * wide + j) * fade[r]);
}

// Tokens [from, to) of a row, with the heads of a group; those of a token stand side by side.
template <class T> void tile(const Tiled& t, long row, long group, long from, long to, Bench& b) {
  const Attend& a = t.a;
  const long shared = a.shared(), tokens = to - from, m = shared * tokens;
  const long wide = (a.width + LANES - 1) / LANES * LANES, depth = Scores<T>::depth(a.size);
  b.lay(m, depth, wide);
  for (long i = 0; i < m; i++) {
    const long head = group * shared + i % shared, token = row * t.tokens + from + i / shared;
    const T* q = static_cast<const T*>(a.q) + token * a.strides[0] + head * a.strides[1];
    Scores<T>::query(q, a.size, b.q + i * depth);
    b.top[i] = a.sink ? a.sink[head] : -INFINITY;
    b.sum[i] = a.sink ? 1.0f : 0.0f;
  }
  std::memset(b.out, 0, m * wide * sizeof(float));
  const uint8_t* seen = a.seen + row * a.seen_row + from * t.seen_token;
  for (long first = 0; first < a.entries; first += KEYS) {
    const long last = std::min(a.entries, first + KEYS), count = last - first;
    long begin = tokens, end = 0;  // the tokens that see something of this tile stand between
    bool all = count == KEYS;
    for (long i = 0; i < tokens; i++)
      if (std::memchr(seen + i * t.seen_token + first, 1, count)) begin = std::min(begin, i), end = i + 1;
    if (begin >= end) continue;
    for (long i = begin; i < end; i++) all = all && !std::memchr(seen + i * t.seen_token + first, 0, count);
    load_keys<T>(a, row, group, first, last, b);
    load_values<T>(a, row, group, first, last, wide, b);
    const long low = begin * shared, high = end * shared;
    product<false, typename Scores<T>::op>(high - low, b.q + low * depth, depth, b.keys, depth, b.z, KEYS);
    for (long i = low; i < high; i += LANES)
      share(
          a, b.z + (i - low) * KEYS, std::min<long>(LANES, high - i),
          [&](long r) { return all ? nullptr : seen + (i + r) / shared * t.seen_token + first; }, count, b.top + i,
          b.sum + i, b.out + i * wide, wide);
    product<true>(high - low, b.z, KEYS, b.values, count, b.out + low * wide, wide);
  }
  for (long i = 0; i < m; i++) {
    const long head = group * shared + i % shared, token = row * t.tokens + from + i / shared;
    const float inverse = b.sum[i] == 0.0f ? 0.0f : 1.0f / b.sum[i];
    T* y = static_cast<T*>(a.y) + (token * a.heads + head) * a.width;
    for (long j = 0; j < a.width; j += LANES) store(y + j, load(b.out + i * wide + j) * inverse, a.width - j);
  }
}

template <class T> void attend_tiled(const Tiled& t) {
  const long step = t.queries(), cuts = (t.tokens + step - 1) / step, tasks = t.a.rows * t.a.groups * cuts;
#pragma omp parallel for schedule(dynamic, 1) if (tasks > 1)
  for (long task = 0; task < tasks; task++) {
    static thread_local Bench bench;
    const long group = task % t.a.groups, row = task / t.a.groups % t.a.rows;
    const long cut = cuts - 1 - task / t.a.groups / t.a.rows;  // under a causal rule the last take longest
    tile<T>(t, row, group, cut * step, std::min(t.tokens, (cut + 1) * step), bench);
  }
}

}  // namespace
