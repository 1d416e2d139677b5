// Distributions that tokens are drawn from: softmax at a temperature, top-k, top-p and min-p, and the draw itself.
//
// Mirrors eda/sampling/processors.py and `draw` of eda/sampling/draws.py. Weights stay without a common factor: the likeliest token's is 1.
#pragma once

#include <functional>
#include <vector>

#include "simd.h"

namespace {

// top_k 0, top_p 1 and min_p 0 cut nothing. At temperature 0 nothing is drawn.
struct Sampling {
  double top_p;
  float temperature, min_p;
  int32_t top_k, unused;
};

inline double sum_of(const float* values, int count) {
  Total total;
  for (int first = 0; first < count; first += WIDTH) total.add(load_first(values + first, count - first));
  return total.value();
}

inline void multiply_by(float factor, float* values, int count) {
  for (int first = 0; first < count; first += WIDTH)
    store_first(values + first, load_first(values + first, count - first) * splat(factor), count - first);
}

// Walks the weights from the largest down to the first for which `is_last(weight)` holds, and returns it; the smallest
// that is not 0 where none does. Only those that it comes to are sorted.
template <class IsLast>
float walk_down(const float* weights, int count, IsLast is_last) {
  constexpr float SMALLEST = 1.2e-38f;  // below all that `exp` gives, and still a normal number
  std::vector<float> band;
  float last = 1.0f;
  for (float upper = INFINITY, lower = 0.125f; upper > SMALLEST; upper = lower, lower = std::max(lower / 8, SMALLEST)) {
    band.clear();
    for (int first = 0; first < count; first += WIDTH) {
      const Floats part = load_first(weights + first, count - first);
      uint32_t found = bits(splat(upper) > part) & bits(part >= splat(lower));
      for (; found; found &= found - 1) band.push_back(weights[first + __builtin_ctz(found)]);
    }
    std::sort(band.begin(), band.end(), std::greater<float>());
    for (float weight : band) {
      last = weight;
      if (is_last(weight)) return last;
    }
  }
  return last;
}

// Weights below `limit` become 0; returns the sum of the others.
double cut_below(float limit, float* weights, int count) {
  Total total;
  for (int first = 0; first < count; first += WIDTH) {
    const Floats part = load_first(weights + first, count - first);
    const Floats rest = kept(part >= splat(limit), part);
    store_first(weights + first, rest, count - first);
    total.add(rest);
  }
  return total.value();
}

// Writes exp((logit - largest) / temperature) of what top-k, then top-p, then min-p leave, 0 elsewhere; returns the sum.
// Weights equal to the last one that is kept are kept too. Returns NaN, and writes 0 only, where a logit is NaN or the
// largest is not finite.
double weigh(const float* logits, int count, const Sampling& sampling, float* weights) {
  const float found = largest(logits, count);
  if (!std::isfinite(found)) {
    std::fill(weights, weights + count, 0.0f);
    return NAN;
  }
  const Floats top = splat(found), inverse = splat(1.0f / sampling.temperature);
  Total sums;
  for (int first = 0; first < count; first += WIDTH) {
    const Floats weight = exp((load_first(logits + first, count - first, -INFINITY) - top) * inverse);
    store_first(weights + first, weight, count - first);
    sums.add(weight);
  }
  double total = sums.value();
  if (sampling.top_k > 0 && sampling.top_k < count) {
    int number = 0;
    total = cut_below(walk_down(weights, count, [&](float) { return ++number >= sampling.top_k; }), weights, count);
  }
  if (sampling.top_p < 1.0) {
    // A token stays when the tokens likelier than it hold less than top_p.
    double reached = 0.0;
    const double wanted = sampling.top_p * total;
    total = cut_below(walk_down(weights, count, [&](float weight) { return (reached += weight) >= wanted; }), weights, count);
  }
  return sampling.min_p > 0.0f ? cut_below(sampling.min_p, weights, count) : total;
}

// The place at which the cumulative sum of `weights` passes `uniform * total`, for a uniform from [0, 1). A weight of 0 is
// never drawn, unless there is no other.
int draw_by(const float* weights, int count, double total, double uniform) {
  const double wanted = uniform * total;
  double reached = 0.0;
  int last = -1;  // the last block with any mass, in case rounding never reaches what is wanted
  for (int first = 0; first < count; first += 16) {
    const double block = sum_of(weights + first, std::min(WIDTH, count - first));
    if (block > 0.0) last = first;
    if (reached + block <= wanted) {
      reached += block;
      continue;
    }
    for (int place = first; place < std::min(first + 16, count); ++place) {
      reached += weights[place];
      if (reached > wanted && weights[place] > 0.0f) return place;
    }
  }
  if (last < 0) return 0;
  for (int place = std::min(last + 16, count) - 1; place > last; --place)
    if (weights[place] > 0.0f) return place;
  return last;
}

}  // namespace
