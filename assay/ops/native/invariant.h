// Recurrences that are the same for every token, h = a h + b x and y = Re(c h), with N numbers of state a channel, real or
// complex, and their gradients. Sixteen channels at a time; forward keeps the state before each piece of tokens, backward
// computes a piece's states again. So a result does not depend on how a text was cut into steps, on other lanes, or on
// the number of threads.
#pragma once

#include "selective.h"

namespace {

// parts: 2 where numbers are complex, which are pairs then.
struct Invariant {
  long lanes, tokens, channels, states, parts;
  Flow x;
  const float *a, *b, *c, *past;  // [C, N, parts] and [L, C, N, parts], dense
  const uint8_t* fresh;           // [L, T]: a document begins here, from nothing; or null: nowhere
  const int64_t* filled;          // [L]: how many places hold tokens; or null: all

  long blocks() const { return (channels + LANES - 1) / LANES; }
  long length(long lane) const { return filled ? filled[lane] : tokens; }
  bool begins(long lane, long t) const { return fresh && fresh[lane * tokens + t]; }
  // Where a block's states before a piece are kept: [L, blocks, pieces, N, parts] vectors.
  long kept(long lane, long block, long piece, long n) const {
    const long pieces = (tokens + TOKENS - 1) / TOKENS;
    return (((lane * blocks() + block) * pieces + piece) * states + n) * parts * LANES;
  }
};

// A number for each of sixteen channels, of which the second part is 0 and never looked at where P is 1.
template <int P> struct Number {
  Vec re = Vec{}, im = Vec{};

  Number() {}
  Number(Vec re, Vec im) : re(re), im(im) {}
  Number(const float* p, long step, long count) : re(across(p, step * P, count)) {
    if constexpr (P == 2) im = across(p + 1, step * P, count);
  }
  void put(float* p, long step, long count) const {
    apart(re, p, step * P, count);
    if constexpr (P == 2) apart(im, p + 1, step * P, count);
  }
  static Number kept(const float* p) { return {load(p), P == 2 ? load(p + LANES) : Vec{}}; }
  void keep(float* p) const {
    save(p, re);
    if constexpr (P == 2) save(p + LANES, im);
  }
  // this x + y
  Number times(const Number& x, const Number& y) const {
    if constexpr (P == 1) return {re * x.re + y.re, Vec{}};
    return {re * x.re - im * x.im + y.re, re * x.im + im * x.re + y.im};
  }
  // conj(this) x + y
  Number turned(const Number& x, const Number& y) const {
    if constexpr (P == 1) return {re * x.re + y.re, Vec{}};
    return {re * x.re + im * x.im + y.re, re * x.im - im * x.re + y.im};
  }
  Number scaled(Vec x, const Number& y) const {
    if constexpr (P == 1) return {re * x + y.re, Vec{}};
    return {re * x + y.re, im * x + y.im};
  }
  // Re(this x) and Re(conj(this) x)
  Vec real(const Number& x) const { return P == 1 ? re * x.re : re * x.re - im * x.im; }
  Vec inner(const Number& x) const { return P == 1 ? re * x.re : re * x.re + im * x.im; }
  Number conj() const { return {re, -im}; }
};

// Of a block of channels all N numbers of [C, N, parts].
template <int P> std::vector<Number<P>> numbers(const float* from, long states, long count) {
  std::vector<Number<P>> found(states);
  for (long n = 0; n < states; n++) found[n] = Number<P>(from + n * P, states, count);
  return found;
}

// What a task works on: a block of a lane's channels. from, count: its channels; place: where its states begin in
// [L, C, N, parts].
template <int P> struct Channels {
  long lane, block, from, count, place;
  std::vector<Number<P>> a, b, c;

  Channels(const Invariant& s, long task)
      : lane(task / s.blocks()), block(task % s.blocks()), from(block * LANES),
        count(std::min<long>(LANES, s.channels - from)), place((lane * s.channels + from) * s.states * P),
        a(table(s, s.a)), b(table(s, s.b)), c(table(s, s.c)) {}
  std::vector<Number<P>> table(const Invariant& s, const float* all) const {
    return numbers<P>(all + from * s.states * P, s.states, count);
  }
};

// y [L, T, C] and end [L, C, N, parts], dense; kept: null, or where the states before pieces go. Behind a lane's last
// token nothing is written.
template <int P> void invariant(const Invariant& s, float* y, float* end, float* kept) {
  const long tasks = s.lanes * s.blocks();
#pragma omp parallel for schedule(static) if (tasks * s.tokens * s.states * P * LANES > ALONE)
  for (long task = 0; task < tasks; task++) {
    const Channels<P> own(s, task);
    const long lane = own.lane, from = own.from, count = own.count, place = own.place, length = s.length(lane);
    auto now = numbers<P>(s.past + place, s.states, count);
    for (long first = 0; first < length; first += TOKENS) {
      const long size = std::min(TOKENS, length - first);
      Vec x[TOKENS], sum[TOKENS] = {};
      for (long t = 0; t < size; t++) x[t] = some(s.x.at(lane, first + t) + from, count);
      for (long n = 0; n < s.states; n++) {
        const Number<P> decay = own.a[n], enters = own.b[n], read = own.c[n];
        Number<P> state = now[n];
        if (kept) state.keep(kept + s.kept(lane, own.block, first / TOKENS, n));
        for (long t = 0; t < size; t++) {
          if (s.begins(lane, first + t)) state = Number<P>();
          state = decay.times(state, enters.scaled(x[t], Number<P>()));
          sum[t] += read.real(state);
        }
        now[n] = state;
      }
      for (long t = 0; t < size; t++) store(y + (lane * s.tokens + first + t) * s.channels + from, sum[t], count);
    }
    for (long n = 0; n < s.states; n++) now[n].put(end + place + n * P, s.states, count);
  }
}

// Gradients of y and end, dense as these; of x [L, T, C] and past [L, C, N, parts]; of a, b and c for each lane
// [L, C, N, parts], which others add up.
struct InvariantGradients {
  const float *y, *end, *kept;
  float *x, *past, *a, *b, *c;
};

template <int P> void invariant_back(const Invariant& s, const InvariantGradients& by) {
  const long tasks = s.lanes * s.blocks();
#pragma omp parallel for schedule(static) if (tasks * s.tokens * s.states * P * LANES > ALONE)
  for (long task = 0; task < tasks; task++) {
    const Channels<P> own(s, task);
    const long lane = own.lane, from = own.from, count = own.count, place = own.place, length = s.length(lane);
    auto later = numbers<P>(by.end + place, s.states, count);
    std::vector<Number<P>> by_a(s.states), by_b(s.states), by_c(s.states);
    for (long piece = (length + TOKENS - 1) / TOKENS - 1; piece >= 0; piece--) {
      const long first = piece * TOKENS, size = std::min(TOKENS, length - first);
      const long to = (lane * s.tokens + first) * s.channels + from;
      Vec x[TOKENS], given[TOKENS], by_x[TOKENS] = {};
      for (long t = 0; t < size; t++) x[t] = some(s.x.at(lane, first + t) + from, count);
      for (long t = 0; t < size; t++) given[t] = some(by.y + to + t * s.channels, count);
      for (long n = 0; n < s.states; n++) {
        const Number<P> decay = own.a[n], enters = own.b[n], read = own.c[n].conj();
        Number<P> decays = by_a[n], entered = by_b[n], reads = by_c[n], state = later[n];
        Number<P> before[TOKENS], now = Number<P>::kept(by.kept + s.kept(lane, own.block, piece, n));
        for (long t = 0; t < size; t++) {
          before[t] = now = s.begins(lane, first + t) ? Number<P>() : now;
          now = decay.times(now, enters.scaled(x[t], Number<P>()));
          reads = now.conj().scaled(given[t], reads);
        }
        for (long t = size - 1; t >= 0; t--) {
          state = read.scaled(given[t], state);
          by_x[t] += enters.inner(state);
          entered = state.scaled(x[t], entered);
          decays = before[t].turned(state, decays);
          state = s.begins(lane, first + t) ? Number<P>() : decay.turned(state, Number<P>());
        }
        later[n] = state, by_a[n] = decays, by_b[n] = entered, by_c[n] = reads;
      }
      for (long t = 0; t < size; t++) store(by.x + to + t * s.channels, by_x[t], count);
    }
    for (long n = 0; n < s.states; n++) {
      later[n].put(by.past + place + n * P, s.states, count);
      by_a[n].put(by.a + place + n * P, s.states, count);
      by_b[n].put(by.b + place + n * P, s.states, count);
      by_c[n].put(by.c + place + n * P, s.states, count);
    }
  }
}

// lanes, tokens, channels, states, parts; x with its strides; a, b, c, past, fresh, filled.
inline Invariant stepping(const long* n) {
  return {n[0], n[1], n[2], n[3], n[4], flow(n + 5), (const float*)n[8], (const float*)n[9], (const float*)n[10],
          (const float*)n[11], (const uint8_t*)n[12], (const int64_t*)n[13]};
}

}  // namespace

extern "C" {

void assay_invariant(const long* n, float* y, float* end, float* kept) {
  if (n[4] == 2) invariant<2>(stepping(n), y, end, kept);
  else invariant<1>(stepping(n), y, end, kept);
}

// n: as above, then what `InvariantGradients` lists.
void assay_invariant_back(const long* n) {
  const long* at = n + 14;
  const InvariantGradients by{(const float*)at[0], (const float*)at[1], (const float*)at[2], (float*)at[3],
                              (float*)at[4], (float*)at[5], (float*)at[6], (float*)at[7]};
  if (n[4] == 2) invariant_back<2>(stepping(n), by);
  else invariant_back<1>(stepping(n), by);
}

AGAIN(invariant)
AGAIN(invariant_back)

}  // extern "C"
