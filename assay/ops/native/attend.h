// One query a sequence over its stored keys and values. Dao et al. 2022, arXiv 2205.14135, section 3.1; the keys cut
// into pieces that are merged at the end: Dao et al. 2023, Flash-Decoding; in pages: Kwon et al. 2023, arXiv 2309.06180.
#pragma once

#include <atomic>

#include "units.h"

namespace {

constexpr long PIECE = 64;  // keys of a piece: fixed, so that the order of a sum never changes
constexpr long AHEAD = 16;  // entries that are asked for before they are wanted: nothing guesses where a page stands
constexpr long WIDEST = 1024;  // dimensions of a head

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

// Where entry i of a row stands.
template <class T> const T* stands(const Attend& a, const Pool& pool, long row, long i) {
  const long number = i / a.page, page = a.table ? a.table[row * a.table_row + number] : row;
  return static_cast<const T*>(pool.base) + page * pool.strides[0] + (i - number * a.page) * pool.strides[1];
}

// Entries that lie behind one another, `step` apart, and where those begin that are wanted next.
template <class T> struct Run {
  const T* base;
  long step, count;
  const T* next;

  // Asks for `size` values at `offset` of the entry AHEAD of entry i. (A call that is not inlined GCC leaves out: it does
  // nothing that can be seen.)
  __attribute__((always_inline)) void ask(long i, long offset, long size) const {
    const long far = i + AHEAD;
    const T* from = (far < count ? base + far * step : next + (far - count) * step) + offset;
    for (long j = 0; j < size; j += 64 / sizeof(T)) __builtin_prefetch(from + j);
  }
};

// Calls use(i, run) for every run of entries of [first, last); `then` is wanted after the last.
template <class T, class Use>
void runs(const Attend& a, const Pool& pool, long row, long first, long last, const T* then, Use use) {
  const T* base = stands<T>(a, pool, row, first);
  for (long i = first; i < last;) {
    const long count = std::min(last - i, a.page - i % a.page);
    const T* next = i + count < last ? stands<T>(a, pool, row, i + count) : then;
    use(i - first, Run<T>{base, pool.strides[1], count, next});
    i += count;
    base = next;
  }
}

// How many heads of D vectors are worked on together: as many as there are registers for. Heads of any number of vectors
// (D: 0) are worked on SOME vectors at a time.
#if defined(__AVX512F__)
constexpr int REGISTERS = 16, SOME = 4;
#else
constexpr int REGISTERS = 4, SOME = 2;
#endif
template <int D> constexpr int HEADS = D > REGISTERS ? 1 : REGISTERS / (D ? D : SOME);

template <int N> struct Count {
  static constexpr int value = N;
};

// Calls use(Count, h) for `many` heads, up to HEADS<D> of them at a time.
template <int D, class Use> void together(long many, Use use) {
  long h = 0;
  for (; h + HEADS<D> <= many; h += HEADS<D>) use(Count<HEADS<D>>{}, h);
  switch (many - h) {
    case 3: return use(Count<std::min(3, HEADS<D>)>{}, h);
    case 2: return use(Count<std::min(2, HEADS<D>)>{}, h);
    case 1: return use(Count<1>{}, h);
  }
}

// sums[h][n] of H queries, `lines` apart, with the values at `offset` of entry n and the N - 1 behind it: the lanes of
// their products. D: vectors of a head, 0 for any number.
template <class T, int D, int H, int N>
void lanes(const Line* q, long lines, const Run<T>& k, long offset, long size, Vec (*sums)[LANES], long from, long n) {
  typedef Unit<T, Vec> U;
  const long whole = (D ? D * LANES : size) / U::size, rest = (D ? D * LANES : size) % U::size;
  const T* row = k.base + (from + n) * k.step + offset;
  for (int i = 0; i < N; i++) k.ask(from + n + i, offset, D ? D * LANES : size);
  Vec sum[H][N] = {};
  const auto add = [&](long u, const T* keys, long step) {
    for (int part = 0; part < U::parts; part++) {
      Vec key[N];
      for (int i = 0; i < N; i++) key[i] = U::part(keys + i * step, part, 0);
      for (int h = 0; h < H; h++) {
        const Vec query = load(q[h * lines + u * U::parts + part].at);
        for (int i = 0; i < N; i++) sum[h][i] = U::add(sum[h][i], key[i], query);
      }
    }
  };
  for (long u = 0; u < whole; u++) add(u, row + u * U::size, k.step);
  if (rest) {
    T last[N][U::size] = {};
    for (int i = 0; i < N; i++) std::memcpy(last[i], row + i * k.step + whole * U::size, rest * sizeof(T));
    add(whole, last[0], U::size);
  }
  for (int h = 0; h < H; h++)
    for (int i = 0; i < N; i++) sums[h][n + i] = sum[h][i];
}

// z[h, i] of H queries with up to 16 keys from entry `from` on.
template <class T, int D, int H>
void products(const Line* q, long lines, const Run<T>& k, long offset, long from, long size, float* z, long apart) {
  const long count = std::min<long>(LANES, k.count - from);
  Vec sums[H][LANES];
  long n = 0;
  for (; n + 2 <= count; n += 2) lanes<T, D, H, 2>(q, lines, k, offset, size, sums, from, n);
  if (n < count) lanes<T, D, H, 1>(q, lines, k, offset, size, sums, from, n);
  for (int h = 0; h < H; h++) {
    if (count == LANES) *reinterpret_cast<Loose*>(z + h * apart) = totals(sums[h]);
    else
      for (long i = 0; i < count; i++) z[h * apart + i] = total(sums[h][i]);
  }
}

// As `mixture`, of N vectors at `offset` of each value.
template <class T, int N, int H>
void blend(const float* z, const uint8_t* seen, const Run<T>& v, long offset, long first, float* acc, long apart) {
  Vec own[H][N];
  for (int h = 0; h < H; h++)
    for (int j = 0; j < N; j++) own[h][j] = load(acc + h * apart + j * LANES);
  const long last = std::min(v.count, first + LANES);
  for (long i = first; i < last; i++) {
    v.ask(i, offset, N * LANES);
    if (!seen[i]) continue;
    const T* from = v.base + i * v.step + offset;
    for (int j = 0; j < N; j++) {
      const Vec value = load(from + j * LANES);
      for (int h = 0; h < H; h++) own[h][j] += z[h * PIECE + i] * value;
    }
  }
  for (int h = 0; h < H; h++)
    for (int j = 0; j < N; j++) *reinterpret_cast<Loose*>(acc + h * apart + j * LANES) = own[h][j];
}

// acc[h] += the sum of z[h, i] v[i] over up to 16 values from entry `from` on, those that are seen.
template <class T, int D, int H>
void mixture(const float* z, const uint8_t* seen, const Run<T>& v, long offset, long from, long width, float* acc,
             long apart) {
  constexpr int N = D ? D : SOME;
  const long vectors = D ? D : width / LANES;
  long j = 0;
  for (; j + N <= vectors; j += N) blend<T, N, H>(z, seen, v, offset + j * LANES, from, acc + j * LANES, apart);
  for (; j < vectors; j++) blend<T, 1, H>(z, seen, v, offset + j * LANES, from, acc + j * LANES, apart);
}

// tanh to 4e-7 of itself: by its series near 0, where 1 - 2 / (e^2x + 1) would cancel.
inline Vec hyperbolic(Vec x) {
  const Vec far = 1.0f - 2.0f / (exponential(x + x) + 1.0f), s = x * x;
  const Vec near = x * (s * (s * (s * (s * 2.1869488e-2f - 5.3968254e-2f) + 1.3333333e-1f) - 3.3333333e-1f) + 1.0f);
  return s < 0.09f ? near : far;
}

// Which of the next 16 entries count, of which there are `count`.
inline auto shown(const uint8_t* seen, long count) {
  typedef uint8_t Flags __attribute__((vector_size(16), aligned(1), may_alias));
  typedef int32_t Whole __attribute__((vector_size(64)));
  uint8_t rest[LANES] = {};
  if (count < LANES) std::memcpy(rest, seen, count);
  return __builtin_convertvector(*reinterpret_cast<const Flags*>(count < LANES ? rest : seen), Whole) != 0;
}

// Logits of `count` keys from q k^T, padded to whole vectors, and the largest; -inf where nobody looks.
inline float logits(float* z, long count, float scale, float softcap, const uint8_t* seen) {
  Vec top = Vec{} - INFINITY;
  for (long i = 0; i < count; i += LANES) {
    Vec v = load(z + i) * scale;
    if (softcap > 0.0f) v = softcap * hyperbolic(v / softcap);
    v = shown(seen + i, count - i) ? v : Vec{} - INFINITY;
    *reinterpret_cast<Loose*>(z + i) = v;
    top = larger(top, v);
  }
  return largest(top);
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

// Lines that a head of a query takes.
template <class T> long lines_of(const Attend& a) {
  typedef Unit<T, Vec> U;
  return (a.size + U::size - 1) / U::size * U::parts;
}

// The entries [first, last) of a row; an empty one is none.
struct Span {
  long task, row, first, last;

  explicit operator bool() const { return first < last; }
};

// The pieces of all rows, for whoever asks next: rows are not equally long. A view is as long as its longest row, and
// what nobody sees at a row's end is left out.
struct Spans {
  const Attend& a;
  const long count = std::max<long>(1, (a.entries + PIECE - 1) / PIECE);
  std::atomic<long> turn{0};

  // The next of which something is seen; of those that are passed over, parts say so.
  Span take(float* parts) {
    for (long task; (task = turn++) < a.rows * count;) {
      const long row = task / count, first = task % count * PIECE;
      long last = std::min(a.entries, first + PIECE);
      while (last > first && !a.seen[row * a.seen_row + last - 1]) last--;
      if (first < last) return {task, row, first, last};
      for (long h = 0; h < a.heads; h++) {
        float* part = parts + at(task, h);
        part[0] = -INFINITY, part[1] = 0.0f;
      }
    }
    return {};
  }

  // Where a head's part of a task stands: the largest logit, the sum of e^(z - that), and the values in those shares.
  long at(long task, long head) const { return ((task / count * a.heads + head) * count + task % count) * (a.width + 2); }
};

// Values of an entry that something else is worked on while they come.
template <class T> const T* first_of(const Attend& a, const Pool& pool, const Span& piece) {
  return stands<T>(a, pool, piece.row, piece.first);
}

// All heads of a row with the keys of a piece, to out as `Spans::at` says, heads `apart`. q: lines of each head. Keys
// at `then` are wanted next.
template <class T, int K, int V>
void piece(const Attend& a, const Span& now, const T* then, const Line* q, float* z, float* out, long apart) {
  const long count = now.last - now.first, shared = a.shared(), lines = lines_of<T>(a);
  const uint8_t* seen = a.seen + now.row * a.seen_row + now.first;
  // All groups of an entry lie side by side: they are read together, so that memory is walked once, in its order.
  runs<T>(a, a.k, now.row, now.first, now.last, first_of<T>(a, a.v, now), [&](long at, const Run<T>& k) {
    for (long i = 0; i < k.count; i += LANES)
      for (long group = 0; group < a.groups; group++)
        together<K>(shared, [&](auto heads, long h) {
          const long head = group * shared + h;
          products<T, K, decltype(heads)::value>(q + head * lines, lines, k, group * a.k.strides[2], i, a.size,
                                                 z + head * PIECE + at + i, PIECE);
        });
  });
  for (long h = 0; h < a.heads; h++) {
    float* part = out + h * apart;
    part[0] = logits(z + h * PIECE, count, a.scale, a.softcap, seen);
    part[1] = part[0] == -INFINITY ? 0.0f : weights(z + h * PIECE, count, part[0]);
    for (long j = 0; j < a.width; j += LANES) save(part + 2 + j, Vec{});
  }
  runs<T>(a, a.v, now.row, now.first, now.last, then, [&](long at, const Run<T>& v) {
    for (long i = 0; i < v.count; i += LANES)
      for (long group = 0; group < a.groups; group++)
        together<V>(shared, [&](auto heads, long h) {
          const long head = group * shared + h;
          mixture<T, V, decltype(heads)::value>(z + head * PIECE + at, seen + at, v, group * a.v.strides[2], i, a.width,
                                                out + head * apart + 2, apart);
        });
  });
}

// The pieces of a head, from the first to the last; nothing seen gives zeros.
template <class T> void merge(const Attend& a, long head, const float* parts, long count, T* y) {
  const long step = a.width + 2;
  float top = a.sink ? a.sink[head] : -INFINITY;
  for (long p = 0; p < count; p++) top = parts[p * step] > top || std::isnan(parts[p * step]) ? parts[p * step] : top;
  float sum = a.sink && top != -INFINITY ? std::exp(a.sink[head] - top) : 0.0f;
  Vec acc[WIDEST / LANES];
  for (long j = 0; j < a.width; j += LANES) acc[j / LANES] = Vec{};
  for (long first = 0; first < count; first += LANES) {
    Vec tops = Vec{} - INFINITY;
    const long many = std::min<long>(LANES, count - first);
    for (long p = 0; p < many; p++) tops[p] = parts[(first + p) * step];
    const Vec shares = exponential(tops - top);
    for (long p = 0; p < many; p++) {
      const float* part = parts + (first + p) * step;
      if (part[0] == -INFINITY) continue;
      sum += shares[p] * part[1];
      for (long j = 0; j < a.width; j += LANES) acc[j / LANES] += shares[p] * load(part + 2 + j);
    }
  }
  const float inverse = sum == 0.0f ? 0.0f : 1.0f / sum;
  for (long j = 0; j < a.width; j += LANES) store(y + j, acc[j / LANES] * inverse, LANES);
}

template <class T, int K, int V> void attend(const Attend& a) {
  static thread_local std::vector<float> buffer;
  Spans pieces{a};
  const long step = a.width + 2, tasks = a.rows * pieces.count, lines = lines_of<T>(a);
  const long own = (a.heads * PIECE + LANES - 1) / LANES;
  buffer.resize(tasks * a.heads * step);
  float* parts = buffer.data();
#pragma omp parallel if (tasks > 1 && tasks * a.heads * PIECE * (a.size + a.width) > 4 * ALONE)
  {
    static thread_local std::vector<Line> scratch;
    scratch.resize(a.heads * lines + own);
    Line* q = scratch.data();
    // What comes after is taken before this one is worked on: a thread asks for memory of its own next piece.
    for (Span now = pieces.take(parts), next; now; now = next) {
      next = pieces.take(parts);
      for (long h = 0; h < a.heads; h++)
        lay<T, Vec>(static_cast<const T*>(a.q) + now.row * a.strides[0] + h * a.strides[1], a.size, q + h * lines, 1);
      piece<T, K, V>(a, now, first_of<T>(a, a.k, next ? next : now), q, q[a.heads * lines].at,
                     parts + pieces.at(now.task, 0), pieces.count * step);
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (long i = 0; i < a.rows * a.heads; i++)
      merge<T>(a, i % a.heads, parts + i * pieces.count * step, pieces.count, static_cast<T*>(a.y) + i * a.width);
  }
}

// The sizes of heads that are common are known to the compiler, so that sums stay in registers.
template <class T> void attend(const Attend& a) {
  if (a.size == 64 && a.width == 64) attend<T, 4, 4>(a);
  else if (a.size == 128 && a.width == 128) attend<T, 8, 8>(a);
  else if (a.size == 256 && a.width == 256) attend<T, 16, 16>(a);
  else attend<T, 0, 0>(a);
}

}  // namespace
