// One query a sequence over its stored keys and values. Dao et al. 2022, arXiv 2205.14135, section 3.1; the keys cut
// into pieces that are merged at the end: Dao et al. 2023, Flash-Decoding; in pages: Kwon et al. 2023, arXiv 2309.06180.
#pragma once

#include "vectors.h"

namespace {

constexpr long PIECE = 128;  // keys of a piece: fixed, so that the order of a sum never changes
constexpr long WIDEST = 256;  // dimensions of a head

// Keys or values in pages [_, page, groups, size]; strides of pages, entries and groups in elements (of the size: 1).
struct Pool {
  const void* base;
  const long* strides;
};

// q [rows, heads, size]; entry i of a row stands in its page i / page, whose number is table[row, i / page], or without
// a table the row itself. seen [rows, entries]: which entries count. y [rows, heads, width] is dense.
struct Attend {
  const void* q;
  const long* strides;  // of q: row, head
  Pool k, v;
  const int64_t* table;
  const uint8_t* seen;
  void* y;
  const float* sink;
  long seen_row, rows, heads, groups, entries, size, width, page, table_row;
  float scale, softcap;

  long shared() const { return heads / groups; }
};

// Calls use(i, count, base) for every run of entries of [first, last) that lie behind one another in a page.
template <class T, class Use>
void runs(const Attend& a, const Pool& pool, long row, long group, long first, long last, Use use) {
  for (long i = first; i < last;) {
    const long number = i / a.page, inside = i - number * a.page, count = std::min(last - i, a.page - inside);
    const long page = a.table ? a.table[row * a.table_row + number] : row;
    const long* s = pool.strides;
    use(i - first, count, static_cast<const T*>(pool.base) + page * s[0] + inside * s[1] + group * s[2]);
    i += count;
  }
}

// z[i] of `count` keys behind one another with one query; D: its vectors, 0 for any number of them.
template <class T, int D> void products(const Vec* q, const T* k, long step, long count, long vectors, float* z) {
  const long width = D ? D : vectors;
  long i = 0;
  for (; i + LANES <= count; i += LANES) {
    Vec sums[LANES];
    for (int n = 0; n < LANES; n++) {
      const T* row = k + (i + n) * step;
      Vec sum = {};
      for (long j = 0; j < width; j++) sum += q[j] * load(row + j * LANES);
      sums[n] = sum;
    }
    *reinterpret_cast<Loose*>(z + i) = totals(sums);
  }
  for (; i < count; i++) {
    Vec sum = {};
    for (long j = 0; j < width; j++) sum += q[j] * load(k + i * step + j * LANES);
    z[i] = total(sum);
  }
}

// acc += the sum of z[i] v[i] over `count` values behind one another, those that are seen.
template <class T, int D>
void mixture(const float* z, const uint8_t* seen, const T* v, long step, long count, long vectors, Vec* acc) {
  const long width = D ? D : vectors;
  Vec own[D ? D : WIDEST / LANES];
  for (long j = 0; j < width; j++) own[j] = acc[j];
  for (long i = 0; i < count; i++, v += step)
    if (seen[i])
      for (long j = 0; j < width; j++) own[j] += z[i] * load(v + j * LANES);
  for (long j = 0; j < width; j++) acc[j] = own[j];
}

inline void scores(float* z, long count, const Attend& a, const uint8_t* seen) {
  for (long i = 0; i < count; i++) {
    z[i] *= a.scale;
    if (a.softcap > 0.0f) z[i] = a.softcap * std::tanh(z[i] / a.softcap);
    if (!seen[i]) z[i] = -INFINITY;
  }
  for (long i = count; i < (count + LANES - 1) / LANES * LANES; i++) z[i] = -INFINITY;
}

// e^(z - top) over z, and its sum; 0 where z is -inf.
inline float weights(float* z, long count, float top) {
  Vec sum = {};
  for (long i = 0; i < count; i += LANES) {
    const Vec v = load(z + i);
    const Vec e = v == -INFINITY ? Vec{} : exponential(v - top);
    sum += e;
    *reinterpret_cast<Loose*>(z + i) = e;
  }
  return total(sum);
}

// The query heads of a group with the keys [first, last): of each, out[0] is the largest logit, out[1] the sum of
// e^(z - out[0]), and then the values in those shares. Heads are `apart` in out.
template <class T, int K, int V>
void piece(const Attend& a, long row, long group, long first, long last, float* out, long apart) {
  const long count = last - first, shared = a.shared();
  const uint8_t* seen = a.seen + row * a.seen_row + first;
  if (!std::memchr(seen, 1, count)) {  // pages of a view that is as long as its longest row
    for (long h = 0; h < shared; h++) out[h * apart] = -INFINITY, out[h * apart + 1] = 0.0f;
    return;
  }
  for (long h = 0; h < shared; h++, out += apart) {
    Vec acc[WIDEST / LANES] = {}, q[WIDEST / LANES];
    float z[PIECE];
    const T* from = static_cast<const T*>(a.q) + row * a.strides[0] + (group * shared + h) * a.strides[1];
    for (long j = 0; j < a.size; j += LANES) q[j / LANES] = load(from + j);
    runs<T>(a, a.k, row, group, first, last, [&](long at, long many, const T* k) {
      products<T, K>(q, k, a.k.strides[1], many, a.size / LANES, z + at);
    });
    scores(z, count, a, seen);
    float top = -INFINITY;
    for (long i = 0; i < count; i++) top = z[i] > top || std::isnan(z[i]) ? z[i] : top;
    out[0] = top;
    out[1] = top == -INFINITY ? 0.0f : weights(z, count, top);
    if (top == -INFINITY) continue;
    runs<T>(a, a.v, row, group, first, last, [&](long at, long many, const T* v) {
      mixture<T, V>(z + at, seen + at, v, a.v.strides[1], many, a.width / LANES, acc);
    });
    for (long j = 0; j < a.width; j += LANES) *reinterpret_cast<Loose*>(out + 2 + j) = acc[j / LANES];
  }
}

// The pieces of a head, from the first to the last; nothing seen gives zeros.
template <class T> void merge(const Attend& a, long head, const float* parts, long count, T* y) {
  const long step = a.width + 2;
  float top = a.sink ? a.sink[head] : -INFINITY;
  for (long p = 0; p < count; p++) top = parts[p * step] > top || std::isnan(parts[p * step]) ? parts[p * step] : top;
  float sum = a.sink && top != -INFINITY ? std::exp(a.sink[head] - top) : 0.0f;
  Vec acc[WIDEST / LANES] = {};
  for (long p = 0; p < count; p++) {
    const float* part = parts + p * step;
    if (part[0] == -INFINITY) continue;
    const float share = std::exp(part[0] - top);
    sum += share * part[1];
    for (long j = 0; j < a.width; j += LANES) acc[j / LANES] += share * load(part + 2 + j);
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (long j = 0; j < a.width; j += LANES) store(y + j, acc[j / LANES] * inverse, LANES);
}

template <class T, int K, int V> void attend(const Attend& a) {
  static thread_local std::vector<float> buffer;
  const long pieces = std::max<long>(1, (a.entries + PIECE - 1) / PIECE), step = a.width + 2;
  const long shared = a.shared(), tasks = a.rows * a.groups * pieces;
  buffer.resize(a.rows * a.heads * pieces * step);
  float* parts = buffer.data();
#pragma omp parallel for schedule(static) if (tasks * shared * PIECE * a.size > ALONE)
  for (long task = 0; task < tasks; task++) {
    const long p = task % pieces, group = task / pieces % a.groups, row = task / pieces / a.groups;
    piece<T, K, V>(a, row, group, p * PIECE, std::min(a.entries, (p + 1) * PIECE),
                   parts + ((row * a.heads + group * shared) * pieces + p) * step, pieces * step);
  }
  for (long i = 0; i < a.rows * a.heads; i++)
    merge<T>(a, i % a.heads, parts + i * pieces * step, pieces, static_cast<T*>(a.y) + i * a.width);
}

// The sizes of heads that are common are known to the compiler, so that sums stay in registers.
template <class T> void attend(const Attend& a) {
  if (a.size == 64 && a.width == 64) attend<T, 4, 4>(a);
  else if (a.size == 128 && a.width == 128) attend<T, 8, 8>(a);
  else if (a.size == 256 && a.width == 256) attend<T, 16, 16>(a);
  else attend<T, 0, 0>(a);
}

}  // namespace
