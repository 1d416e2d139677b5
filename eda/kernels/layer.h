// One decoder layer over packed tokens, on all threads of a pool.
//
// The residual stream is float32, what enters a product bfloat16, every sum float32. All pointers are to memory that
// the caller keeps alive; sizes are checked by the caller (library.py, target.py and draft.py in this folder).
#pragma once

#include <cstdlib>

#include "attention.h"
#include "threads.h"

namespace {


struct Layer {
  Packed qkv, output, gate_up, down;
  const float *attention_norm, *feed_forward_norm;
  const float *qkv_bias, *output_bias, *query_norm, *key_norm;  // null where the model has none
};

struct Shape {
  int32_t hidden, heads, key_heads, head_size, qkv_inputs, intermediate;  // intermediate: of the widest network
  float eps, attention_scale;
};

// Low-rank updates of one layer; `data` is null where there is none.
struct LowRank {
  Packed a, b;
};
struct LoraLayer {
  LowRank qkv, output, gate_up, down;
};

// Tokens `start` to `end` have further weights: a LoRA per layer, or a private network beside the feed-forward one.
struct Segment {
  int32_t start, end;
  const LoraLayer* lora;
  const Packed *private_gate_up, *private_down;
};

struct Tokens {
  int32_t count, num_segments;
  const Segment* segments;      // cover all tokens, in order
  const float *cos, *sin;       // [count, head_size]
  const int64_t* slots;         // cache slot of each token
  const Visible* visible;       // keys of each token
  bf16 *keys, *values;          // caches [layers, key_heads, num_slots, head_size]
  int64_t num_slots;
};

template <class T>
class Buffer {  // grows, is never cleared
 public:
  T* of(size_t count) {
    if (count > size_) {
      std::free(data_);
      size_ = count + count / 2;
      data_ = static_cast<T*>(std::aligned_alloc(64, (size_ * sizeof(T) + 63) & ~size_t(63)));
    }
    return data_;
  }

 private:
  T* data_ = nullptr;
  size_t size_ = 0;
};

// Scratch memory of the one pass that runs at a time.
struct Scratch {
  Buffer<float> residual, scores;
  Buffer<bf16> input, qkv, attended, normal, inner, private_inner, low_rank;
};
Scratch scratch;

struct Range {
  int first, end;
};

Range share(int count, int rank, int size) { return {int(int64_t(count) * rank / size), int(int64_t(count) * (rank + 1) / size)}; }

constexpr int TILES = 4;  // of all weights but the first halves of low-rank updates
constexpr int BLOCK = 16 * TILES;  // outputs in a block of such a weight
constexpr int FEW_ROWS = 8;  // so many rows are normalised faster by every thread for itself than waited for

struct Run {
  Pool& pool;
  const Shape& shape;
  const Tokens& tokens;
  float* residual;  // [count, hidden]
  bf16 *input, *qkv, *attended, *normal, *inner, *private_inner, *low_rank;  // `input`, `normal`: see `normalise`
  float* scores;
  int64_t score_stride, low_stride;  // of `low_rank`: the widest inner sums of all LoRAs in the pass, 0 without one

  Run(Pool& p, const Shape& s, const Tokens& t, int num_layers = 1) : pool(p), shape(s), tokens(t) {
    const size_t count = t.count;
    low_stride = widest_rank(num_layers);
    residual = scratch.residual.of(count * s.hidden);
    const size_t copies = copied() ? p.size() : 1;
    input = scratch.input.of(copies * count * s.qkv_inputs);
    qkv = scratch.qkv.of(count * qkv_size());
    attended = scratch.attended.of(count * s.heads * s.head_size);
    normal = scratch.normal.of(copies * count * s.hidden);
    inner = scratch.inner.of(count * s.intermediate);
    private_inner = scratch.private_inner.of(count * s.intermediate);
    low_rank = scratch.low_rank.of(count * low_stride);
    score_stride = 0;
    for (int i = 0; i < t.count; ++i) score_stride = std::max<int64_t>(score_stride, t.visible[i].count());
    score_stride = 2 * ((score_stride + 15) & ~15);
    scores = scratch.scores.of(score_stride * p.size());
  }

  int64_t qkv_size() const { return int64_t(shape.heads + 2 * shape.key_heads) * shape.head_size; }

  // Whether each thread has its own copy of what is normalised.
  bool copied() const { return tokens.count <= FEW_ROWS; }

  // Calls `fill(row, out)` for all rows of `buffer [count, width]`, and returns what this thread may read of them: its
  // own copy of few rows, or the buffer that all threads have filled together.
  template <class Fill>
  const bf16* normalise(int rank, bf16* buffer, int64_t width, const Fill& fill) {
    if (copied()) buffer += rank * tokens.count * width;
    const Range rows = copied() ? Range{0, tokens.count} : share(tokens.count, rank, pool.size());
    for (int row = rows.first; row < rows.end; ++row) fill(row, buffer + row * width);
    if (!copied()) pool.barrier();
    return buffer;
  }

  // Layers of a LoRA differ in rank, or have no update at all.
  int widest_rank(int num_layers) const {
    int widest = 0;
    for (int i = 0; i < tokens.num_segments; ++i)
      if (const LoraLayer* lora = tokens.segments[i].lora)
        for (int index = 0; index < num_layers; ++index)
          for (const LowRank* part : {&lora[index].qkv, &lora[index].output, &lora[index].gate_up, &lora[index].down})
            if (part->a.data) widest = std::max(widest, part->a.n);
    return widest;
  }

  // The first halves of low-rank updates, where there are any: a phase of its own.
  void inner_sums(int rank, const bf16* given, int64_t stride, int layer, LowRank LoraLayer::*part) {
    if (!low_stride) return;
    for (int i = 0; i < tokens.num_segments; ++i) {
      const Segment& segment = tokens.segments[i];
      if (!segment.lora || !(segment.lora[layer].*part).a.data) continue;
      const Packed& a = (segment.lora[layer].*part).a;
      const Term term{given, stride, &a};
      const Range blocks = share(a.n / 16, rank, pool.size());
      for (int block = blocks.first; block < blocks.end; ++block)
        multiply<1>(&term, 1, segment.start, segment.end, block, [&](int row, int at, const __m512 (&sum)[1]) {
          store_bf16(low_rank + row * low_stride + 16 * at, sum[0]);
        });
    }
    pool.barrier();
  }

  // given * weight (+ low-rank updates whose `inner_sums` are there) for some blocks of outputs, handed to `finish`.
  template <class Finish>
  void outer_product(Range blocks, const bf16* given, int64_t stride, const Packed& weight, int layer,
                     LowRank LoraLayer::*part, const Finish& finish) {
    for (int block = blocks.first; block < blocks.end; ++block)
      for (int i = 0; i < tokens.num_segments; ++i) {
        const Segment& segment = tokens.segments[i];
        Term terms[2] = {{given, stride, &weight}, {low_rank, low_stride, nullptr}};
        int num_terms = 1;
        if (segment.lora && (segment.lora[layer].*part).b.data) terms[num_terms++].weight = &(segment.lora[layer].*part).b;
        multiply<TILES>(terms, num_terms, segment.start, segment.end, block, finish);
      }
  }

  // All of it, each thread its share of the blocks.
  template <class Finish>
  void product(int rank, const bf16* given, int64_t stride, const Packed& weight, int layer, LowRank LoraLayer::*part,
               const Finish& finish) {
    inner_sums(rank, given, stride, layer, part);
    outer_product(share(weight.n / BLOCK, rank, pool.size()), given, stride, weight, layer, part, finish);
  }

  void rotate(bf16* head, const float* norm, int token) const {
    const int size = shape.head_size, half = size / 2;
    alignas(64) float x[256];
    for (int i = 0; i < size; i += 16) _mm512_store_ps(x + i, load_bf16(head + i));
    if (norm) rms_norm(x, norm, size, shape.eps, nullptr, x);
    const float *cos = tokens.cos + int64_t(token) * size, *sin = tokens.sin + int64_t(token) * size;
    for (int i = 0; i < half; i += 16) {
      const __m512 low = _mm512_load_ps(x + i), high = _mm512_load_ps(x + half + i);
      const __m512 c0 = _mm512_loadu_ps(cos + i), c1 = _mm512_loadu_ps(cos + half + i);
      const __m512 s0 = _mm512_loadu_ps(sin + i), s1 = _mm512_loadu_ps(sin + half + i);
      store_bf16(head + i, _mm512_fmsub_ps(low, c0, _mm512_mul_ps(high, s0)));
      store_bf16(head + half + i, _mm512_fmadd_ps(high, c1, _mm512_mul_ps(low, s1)));
    }
  }

  // Whether threads can take whole key heads, from their part of the projection to their attention, without waiting.
  bool by_heads() const { return shape.head_size % BLOCK == 0 && shape.key_heads % pool.size() == 0; }

  // Queries, keys and values of `given`, and attention over them: `attended`. Ends with a barrier.
  void attention(int rank, const bf16* given, const Layer& layer, int index) {
    const int size = shape.head_size, group = shape.heads / shape.key_heads;
    const int64_t row_size = qkv_size(), plane = tokens.num_slots * size;
    const auto store = [&](int row, int block, const __m512 (&sum)[TILES]) {
      for (int t = 0; t < TILES; ++t) {
        const int column = block * BLOCK + 16 * t;
        if (column >= row_size) break;
        __m512 value = sum[t];
        if (layer.qkv_bias) value = _mm512_add_ps(value, _mm512_loadu_ps(layer.qkv_bias + column));
        store_bf16(qkv + row * row_size + column, value);
      }
    };
    const int threads = pool.size(), num_items = tokens.count * shape.key_heads;
    inner_sums(rank, given, shape.qkv_inputs, index, &LoraLayer::qkv);
    const auto project = [&](Range blocks) {
      outer_product(blocks, given, shape.qkv_inputs, layer.qkv, index, &LoraLayer::qkv, store);
    };
    if (by_heads()) {
      const Range mine = share(shape.key_heads, rank, threads);
      const int blocks = size / BLOCK;  // of one head
      project({mine.first * group * blocks, mine.end * group * blocks});
      for (int first : {shape.heads, shape.heads + shape.key_heads})
        project({(first + mine.first) * blocks, (first + mine.end) * blocks});
    } else {
      project(share(layer.qkv.n / BLOCK, rank, threads));
      pool.barrier();
    }
    // Items are (head, token): tokens of a sequence see about as many keys each, so equal numbers are equal work.
    bf16 *keys = tokens.keys + index * shape.key_heads * plane, *values = tokens.values + index * shape.key_heads * plane;
    const Range items = share(num_items, rank, threads);
    // Keys first: every token's, before any token looks at them.
    for (int item = items.first; item < items.end; ++item) {
      const int token = item % tokens.count, head = item / tokens.count;
      bf16* key = qkv + token * row_size + (shape.heads + head) * size;
      rotate(key, layer.key_norm, token);
      const int64_t place = head * plane + tokens.slots[token] * size;
      std::memcpy(keys + place, key, size * sizeof(bf16));
      std::memcpy(values + place, key + shape.key_heads * size, size * sizeof(bf16));
    }
    if (!by_heads()) pool.barrier();
    float* own_scores = scores + rank * score_stride;
    for (int item = items.first; item < items.end; ++item) {
      const int token = item % tokens.count, head = item / tokens.count;
      bf16* queries = qkv + token * row_size + head * group * size;
      for (int h = 0; h < group; ++h) rotate(queries + h * size, layer.query_norm, token);
      bf16* out = attended + (int64_t(token) * shape.heads + head * group) * size;
      const Visible& seen = tokens.visible[token];
      const bf16 *k = keys + head * plane, *v = values + head * plane;
      switch (size / 32) {
        case 1: attend_group<1>(group, queries, k, v, seen, shape.attention_scale, own_scores, out); break;
        case 2: attend_group<2>(group, queries, k, v, seen, shape.attention_scale, own_scores, out); break;
        default: attend_group<4>(group, queries, k, v, seen, shape.attention_scale, own_scores, out); break;
      }
    }
    pool.barrier();
  }

  // Gate and up stand side by side in each block: half of its tiles are gates, the other half their partners.
  static void gated(bf16* out, int64_t stride, int row, int block, const __m512 (&sum)[TILES]) {
    for (int t = 0; t < TILES / 2; ++t)
      store_bf16(out + row * stride + block * (8 * TILES) + 16 * t, _mm512_mul_ps(silu_ps(sum[t]), sum[t + TILES / 2]));
  }

  void add_to_residual(int row, int block, const __m512 (&sum)[TILES], const float* bias) {
    for (int t = 0; t < TILES; ++t) {
      const int column = block * BLOCK + 16 * t;
      if (column >= shape.hidden) break;
      float* at = residual + int64_t(row) * shape.hidden + column;
      __m512 value = _mm512_add_ps(_mm512_loadu_ps(at), sum[t]);
      if (bias) value = _mm512_add_ps(value, _mm512_loadu_ps(bias + column));
      _mm512_storeu_ps(at, value);
    }
  }

  // One layer from the normalised input `given` to the sum in `residual`. Ends with a barrier.
  void layer(int rank, const bf16* given, const Layer& weights, int index) {
    attention(rank, given, weights, index);
    product(rank, attended, int64_t(shape.heads) * shape.head_size, weights.output, index, &LoraLayer::output,
            [&](int row, int block, const __m512 (&sum)[TILES]) { add_to_residual(row, block, sum, weights.output_bias); });
    pool.barrier();
    const bf16* inputs = normalise(rank, normal, shape.hidden, [&](int row, bf16* out) {
      rms_norm(residual + int64_t(row) * shape.hidden, weights.feed_forward_norm, shape.hidden, shape.eps, out);
    });
    product(rank, inputs, shape.hidden, weights.gate_up, index, &LoraLayer::gate_up,
            [&](int row, int block, const __m512 (&sum)[TILES]) { gated(inner, shape.intermediate, row, block, sum); });
    for (int i = 0; i < tokens.num_segments; ++i)
      if (const Packed* gate_up = tokens.segments[i].private_gate_up) {
        const Term term{inputs, shape.hidden, gate_up};
        const Range blocks = share(gate_up->n / BLOCK, rank, pool.size());
        for (int block = blocks.first; block < blocks.end; ++block)
          multiply<TILES>(&term, 1, tokens.segments[i].start, tokens.segments[i].end, block,
                          [&](int row, int at, const __m512 (&sum)[TILES]) {
                            gated(private_inner, shape.intermediate, row, at, sum);
                          });
      }
    pool.barrier();
    const auto add = [&](int row, int block, const __m512 (&sum)[TILES]) { add_to_residual(row, block, sum, nullptr); };
    product(rank, inner, shape.intermediate, weights.down, index, &LoraLayer::down, add);
    // Same blocks as above, so a thread adds to columns that it has finished itself.
    const Range blocks = share(weights.down.n / BLOCK, rank, pool.size());
    for (int i = 0; i < tokens.num_segments; ++i)
      if (const Packed* down = tokens.segments[i].private_down) {
        const Term term{private_inner, shape.intermediate, down};
        for (int block = blocks.first; block < blocks.end; ++block)
          multiply<TILES>(&term, 1, tokens.segments[i].start, tokens.segments[i].end, block, add);
      }
    pool.barrier();
  }
};

// [rows, outputs] float32 of `given [rows, inputs]`; a phase without a barrier.
void head_product(Pool& pool, int rank, const bf16* given, int64_t stride, int start, int end, const Packed& head,
                  int outputs, float* out) {
  const Term term{given, stride, &head};
  const Range blocks = share(head.n / BLOCK, rank, pool.size());
  for (int block = blocks.first; block < blocks.end; ++block)
    multiply<TILES>(&term, 1, start, end, block, [&](int row, int at, const __m512 (&sum)[TILES]) {
      for (int t = 0; t < TILES; ++t) {
        const int column = at * BLOCK + 16 * t;
        if (column >= outputs) break;
        const __mmask16 live = __mmask16((1u << std::min(16, outputs - column)) - 1);
        _mm512_mask_storeu_ps(out + int64_t(row) * outputs + column, live, sum[t]);
      }
    });
}


// The first place of the largest of `count` values; -1 where that is not finite or one of them is NaN.
int likeliest(const float* values, int count) {
  const float found = largest(values, count);
  if (!std::isfinite(found)) return -1;
  const __m512 top = _mm512_set1_ps(found);
  for (int first = 0; first < count; first += 16) {
    const __mmask16 live = __mmask16((1u << std::min(16, count - first)) - 1);
    const __m512 part = _mm512_mask_loadu_ps(_mm512_set1_ps(-INFINITY), live, values + first);
    if (const __mmask16 equal = __mmask16(live & _mm512_cmp_ps_mask(part, top, _CMP_EQ_OQ)))
      return first + __builtin_ctz(equal);
  }
  return -1;
}

}  // namespace
