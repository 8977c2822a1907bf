// The selective scan of Gu and Dao 2023, arXiv 2312.00752, and its gradients: h = exp(dt A) h + B b, y = C h with
// b = dt x, or by zero-order hold (exp(dt A) - 1) / A x. Sixteen channels at a time, each with its own N numbers of state.
//
// Forward keeps the state before each piece of `PIECE` tokens; backward computes a piece's states again. A number of the
// state stays in a register while its piece passes by. So a result does not depend on how a text was cut into steps, on
// other lanes, or on the number of threads.
#pragma once

#include "tape.h"
#include "vectors.h"

namespace {

constexpr long TOKENS = LANES;  // of a piece: as many as `totals` adds up at once

// Numbers of float32 [L, T, size], the last axis dense.
struct Flow {
  const float* base;
  long lane, time;

  const float* at(long l, long t) const { return base + l * lane + t * time; }
};

struct Selective {
  long lanes, tokens, channels, states;
  Flow x, dt, into, out;
  const float *rates, *past;  // [C, N] and [L, C, N], dense but for the stride of lanes
  long past_lane;
  const uint8_t* fresh;  // [L, T]: a document begins here, from nothing; or null: nowhere

  long blocks() const { return (channels + LANES - 1) / LANES; }
  long pieces() const { return (tokens + TOKENS - 1) / TOKENS; }
  // Where a block's states before a piece are kept: [L, blocks, pieces, N] vectors.
  long kept(long lane, long block, long piece) const {
    return ((lane * blocks() + block) * pieces() + piece) * states * LANES;
  }
};

// Of sixteen channels of [C, N] the n-th numbers, and back; `found` is what stands where there is no channel.
inline Vec across(const float* from, long step, long count, Vec found = Vec{}) {
  for (long c = 0; c < count; c++) found[c] = from[c * step];
  return found;
}
inline void apart(Vec v, float* to, long step, long count) {
  for (long c = 0; c < count; c++) to[c * step] = v[c];
}

// e^x and e^x - 1, which is exact to some roundings for small x too.
struct Growth {
  Vec whole, more;
};
inline Growth growth(Vec x) {
  const Reduced e = reduced(x);
  return {(e.less + 1.0f) * e.power, e.less * e.power + (e.power - 1.0f)};
}

// (x e^x - e^x + 1) / x^2 = sum of x^k (k + 1) / (k + 2)!, which the difference would lose for small x.
inline Vec second(Vec x, Growth e) {
  Vec sum = {};
  for (int k = 9; k >= 0; k--) {
    static constexpr float FACTORIAL[] = {2, 6, 24, 120, 720, 5040, 40320, 362880, 3628800, 39916800};
    sum = sum * x + static_cast<float>(k + 1) / FACTORIAL[k];
  }
  const Vec direct = (x * e.whole - e.more) / (x * x);
  return x * x < 1.0f ? sum : direct;
}

// What the tokens of a piece bring to a block of channels.
struct Piece {
  long first, size;
  Vec dt[TOKENS], x[TOKENS];

  Piece(const Selective& s, long lane, long block, long piece)
      : first(piece * TOKENS), size(std::min(TOKENS, s.tokens - first)) {
    const long from = block * LANES, count = s.channels - from;
    for (long t = 0; t < size; t++) {
      dt[t] = some(s.dt.at(lane, first + t) + from, count);
      x[t] = some(s.x.at(lane, first + t) + from, count);
    }
  }
};

// Of one number of the state: its decay at each token, and what b is of x there.
template <bool Zoh> void factors(const Selective& s, long lane, const Piece& p, Vec rate, Vec* decay, Vec* gain) {
  for (long t = 0; t < p.size; t++) {
    if constexpr (Zoh) {
      const Growth e = growth(p.dt[t] * rate);
      decay[t] = e.whole, gain[t] = e.more / rate;
    } else decay[t] = exponential(p.dt[t] * rate), gain[t] = p.dt[t];
  }
  if (s.fresh)
    for (long t = 0; t < p.size; t++)
      if (s.fresh[lane * s.tokens + p.first + t]) decay[t] = Vec{};
}

// y [L, T, C] and end [L, C, N], dense; kept: null, or where the states before pieces go.
template <bool Zoh> void selective(const Selective& s, float* y, float* end, float* kept) {
  const long tasks = s.lanes * s.blocks();
#pragma omp parallel for schedule(static) if (tasks * s.tokens * s.states * LANES > ALONE)
  for (long task = 0; task < tasks; task++) {
    const long lane = task / s.blocks(), block = task % s.blocks(), from = block * LANES;
    const long count = std::min<long>(LANES, s.channels - from);
    static thread_local std::vector<Line> buffer;
    buffer.resize(2 * s.states);
    Vec* rates = reinterpret_cast<Vec*>(buffer.data());
    Vec* state = rates + s.states;
    for (long n = 0; n < s.states; n++) {
      rates[n] = across(s.rates + from * s.states + n, s.states, count, Vec{} - 1.0f);
      state[n] = across(s.past + lane * s.past_lane + from * s.states + n, s.states, count);
    }
    for (long piece = 0; piece < s.pieces(); piece++) {
      const Piece p(s, lane, block, piece);
      Vec decay[TOKENS], gain[TOKENS], sum[TOKENS] = {};
      for (long n = 0; n < s.states; n++) {
        Vec now = state[n];
        if (kept) save(kept + s.kept(lane, block, piece) + n * LANES, now);
        factors<Zoh>(s, lane, p, rates[n], decay, gain);
        for (long t = 0; t < p.size; t++) {
          now = decay[t] * now + gain[t] * p.x[t] * s.into.at(lane, p.first + t)[n];
          sum[t] += s.out.at(lane, p.first + t)[n] * now;
        }
        state[n] = now;
      }
      for (long t = 0; t < p.size; t++)
        store(y + (lane * s.tokens + p.first + t) * s.channels + from, sum[t], count);
    }
    for (long n = 0; n < s.states; n++)
      apart(state[n], end + (lane * s.channels + from) * s.states + n, s.states, count);
  }
}

// by: gradients. Of y and end, dense as these; of x, dt [L, T, C] and past [L, C, N]; of rates for each lane [L, C, N]
// and of into and out for each block [L, blocks, N, T], which others add up.
struct Gradients {
  const float *y, *end, *kept;
  float *x, *dt, *past, *rates, *into, *out;
};

// The gradients that a number of the state gives and takes in a piece; `later` is that of the state behind it.
template <bool Zoh>
Vec back(const Selective& s, const Gradients& by, long lane, long block, const Piece& p, long n, Vec rate, Vec& later,
         const Vec* given, Vec* x, Vec* dt) {
  Vec decay[TOKENS], gain[TOKENS], before[TOKENS], into[TOKENS] = {}, out[TOKENS] = {}, rates = {};
  factors<Zoh>(s, lane, p, rate, decay, gain);
  Vec now = load(by.kept + s.kept(lane, block, p.first / TOKENS) + n * LANES);
  for (long t = 0; t < p.size; t++) {
    before[t] = now;
    now = decay[t] * now + gain[t] * p.x[t] * s.into.at(lane, p.first + t)[n];
    out[t] = given[t] * now;
  }
  for (long t = p.size - 1; t >= 0; t--) {
    const Vec state = given[t] * s.out.at(lane, p.first + t)[n] + later, entered = state * s.into.at(lane, p.first + t)[n];
    const Vec power = state * before[t] * decay[t];
    into[t] = state * gain[t] * p.x[t];
    x[t] += entered * gain[t];
    dt[t] += power * rate;
    rates += power * p.dt[t];
    if constexpr (Zoh) {
      const Growth e = growth(p.dt[t] * rate);
      dt[t] += entered * p.x[t] * e.whole;
      rates += entered * p.x[t] * p.dt[t] * p.dt[t] * second(p.dt[t] * rate, e);
    } else dt[t] += entered * p.x[t];
    later = decay[t] * state;
  }
  const long to = ((lane * s.blocks() + block) * s.states + n) * s.tokens + p.first;
  store(by.into + to, totals(into), p.size);
  store(by.out + to, totals(out), p.size);
  return rates;
}

template <bool Zoh> void selective_back(const Selective& s, const Gradients& by) {
  const long tasks = s.lanes * s.blocks();
#pragma omp parallel for schedule(static) if (tasks * s.tokens * s.states * LANES > ALONE)
  for (long task = 0; task < tasks; task++) {
    const long lane = task / s.blocks(), block = task % s.blocks(), from = block * LANES;
    const long count = std::min<long>(LANES, s.channels - from), place = (lane * s.channels + from) * s.states;
    static thread_local std::vector<Line> buffer;
    buffer.resize(3 * s.states);
    Vec* rates = reinterpret_cast<Vec*>(buffer.data());
    Vec *later = rates + s.states, *by_rates = later + s.states;
    for (long n = 0; n < s.states; n++) {
      rates[n] = across(s.rates + from * s.states + n, s.states, count, Vec{} - 1.0f);
      later[n] = across(by.end + place + n, s.states, count);
      by_rates[n] = Vec{};
    }
    for (long piece = s.pieces() - 1; piece >= 0; piece--) {
      const Piece p(s, lane, block, piece);
      Vec given[TOKENS], x[TOKENS] = {}, dt[TOKENS] = {};
      const long at = (lane * s.tokens + p.first) * s.channels + from;
      for (long t = 0; t < p.size; t++) given[t] = some(by.y + at + t * s.channels, count);
      for (long n = 0; n < s.states; n++)
        by_rates[n] += back<Zoh>(s, by, lane, block, p, n, rates[n], later[n], given, x, dt);
      for (long t = 0; t < p.size; t++) {
        store(by.x + at + t * s.channels, x[t], count);
        store(by.dt + at + t * s.channels, dt[t], count);
      }
    }
    for (long n = 0; n < s.states; n++) {
      apart(later[n], by.past + place + n, s.states, count);
      apart(by_rates[n], by.rates + place + n, s.states, count);
    }
  }
}

inline Flow flow(const long* n) { return {(const float*)n[0], n[1], n[2]}; }

// lanes, tokens, channels, states; x, dt, into and out with their strides; rates, past, its stride, fresh.
inline Selective selecting(const long* n) {
  return {n[0], n[1], n[2], n[3], flow(n + 4), flow(n + 7), flow(n + 10), flow(n + 13),
          (const float*)n[16], (const float*)n[17], n[18], (const uint8_t*)n[19]};
}

}  // namespace

extern "C" {

void assay_selective(int zoh, const long* n, float* y, float* end, float* kept) {
  if (zoh) selective<true>(selecting(n), y, end, kept);
  else selective<false>(selecting(n), y, end, kept);
}

// n: as above, then what `Gradients` lists.
void assay_selective_back(int zoh, const long* n) {
  const long* at = n + 20;
  const Gradients by{(const float*)at[0], (const float*)at[1], (const float*)at[2], (float*)at[3], (float*)at[4],
                     (float*)at[5], (float*)at[6], (float*)at[7], (float*)at[8]};
  if (zoh) selective_back<true>(selecting(n), by);
  else selective_back<false>(selecting(n), by);
}

AGAIN(selective)
AGAIN(selective_back)

}  // extern "C"
