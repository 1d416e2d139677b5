// One decoder layer over packed tokens, on all threads of a pool.
//
// The residual stream is float32, and so is every sum; what enters a product is `Input` (bfloat16.h), or rounded to 8 bits. All pointers are to memory that
// the caller keeps alive; sizes are checked by the caller (library.py, target.py and draft.py in this folder).
#pragma once

#include <cstdlib>

#include "attention.h"
#include "matrix.h"
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

// Room for rows of inputs and their groups. `of` forgets what was there.
struct Inputs {
  Input* values = nullptr;
  int64_t width = 0;
  Group* groups = nullptr;

  Input* row(int64_t index) const { return values + index * width; }
  Rows rows() const { return {values, width, groups}; }
  Inputs from(int64_t index) const { return {row(index), width, groups + index * num_groups(width)}; }

  // Rounds `count` values from `first` on, a multiple of 32, of a row that holds them.
  void round(int64_t index, int64_t first, int64_t count) const {
    quantise_row(row(index) + first, int(count), groups + index * num_groups(width) + first / GROUP);
  }
};

class InputBuffer {
 public:
  Inputs of(size_t count, int64_t width) {
    return {values_.of(count * width), width, groups_.of(count * num_groups(width))};
  }

 private:
  Buffer<Input> values_;
  Buffer<Group> groups_;
};

// Scratch memory of the one pass that runs at a time.
struct Scratch {
  Buffer<float> residual, scores;
  Buffer<bf16> qkv;
  InputBuffer input, attended, normal, inner, private_inner, low_rank;
};
Scratch scratch;

inline bool is_rounded(const Packed& weight) { return weight.format != BFLOAT16; }

struct Range {
  int first, end;
};

Range share(int count, int rank, int size) { return {int(int64_t(count) * rank / size), int(int64_t(count) * (rank + 1) / size)}; }

constexpr int TILES = BLOCK_TILES;  // of all weights but the first halves of low-rank updates
constexpr int FEW_ROWS = 8;  // so many rows are normalised faster by every thread for itself than waited for

struct Run {
  Pool& pool;
  const Shape& shape;
  const Tokens& tokens;
  float* residual;  // [count, hidden]
  bf16* qkv;        // [count, qkv_size()]
  Inputs input, attended, normal, inner, private_inner;  // `input`, `normal`: see `normalise`
  Inputs low_rank;  // as wide as the widest inner sums of all LoRAs in the pass; 0 without one
  float* scores;
  int64_t score_stride;

  Run(Pool& p, const Shape& s, const Tokens& t, int num_layers = 1) : pool(p), shape(s), tokens(t) {
    const size_t count = t.count;
    residual = scratch.residual.of(count * s.hidden);
    qkv = scratch.qkv.of(count * qkv_size());
    const size_t copies = copied() ? p.size() : 1;
    input = scratch.input.of(copies * count, s.qkv_inputs);
    attended = scratch.attended.of(count, int64_t(s.heads) * s.head_size);
    normal = scratch.normal.of(copies * count, s.hidden);
    inner = scratch.inner.of(count, s.intermediate);
    private_inner = scratch.private_inner.of(count, s.intermediate);
    low_rank = scratch.low_rank.of(count, widest_rank(num_layers));
    score_stride = 0;
    for (int i = 0; i < t.count; ++i) score_stride = std::max<int64_t>(score_stride, t.visible[i].count());
    score_stride = 3 * ((score_stride + 15) & ~15);
    scores = scratch.scores.of(score_stride * p.size());
  }

  int64_t qkv_size() const { return int64_t(shape.heads + 2 * shape.key_heads) * shape.head_size; }

  // Whether each thread has its own copy of what is normalised.
  bool copied() const { return tokens.count <= FEW_ROWS; }

  // Calls `fill(row, out)` for all rows of `buffer`, rounds them where that is wanted, and returns what this thread may
  // read of them: its own copy of few rows, or the buffer that all threads have filled together.
  template <class Fill>
  Rows normalise(int rank, Inputs buffer, bool rounds, const Fill& fill) {
    if (copied()) buffer = buffer.from(rank * tokens.count);
    const Range rows = copied() ? Range{0, tokens.count} : share(tokens.count, rank, pool.size());
    for (int row = rows.first; row < rows.end; ++row) {
      fill(row, buffer.row(row));
      if (rounds) buffer.round(row, 0, buffer.width);
    }
    if (!copied()) pool.barrier();
    return buffer.rows();
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
  void inner_sums(int rank, const Rows& given, int layer, LowRank LoraLayer::*part) {
    if (!low_rank.width) return;
    for (int i = 0; i < tokens.num_segments; ++i) {
      const Segment& segment = tokens.segments[i];
      if (!segment.lora || !(segment.lora[layer].*part).a.data) continue;
      const Packed& a = (segment.lora[layer].*part).a;
      const Term term{given, &a};
      const Range blocks = share(a.n / 16, rank, pool.size());
      for (int block = blocks.first; block < blocks.end; ++block)
        multiply<1>(&term, 1, segment.start, segment.end, block, [&](int row, int at, const Floats (&sum)[1]) {
          store_input(low_rank.row(row) + 16 * at, sum[0]);
        });
    }
    pool.barrier();
  }

  // given * weight (+ low-rank updates whose `inner_sums` are there) for some blocks of outputs, handed to `finish`.
  template <class Finish>
  void outer_product(Range blocks, const Rows& given, const Packed& weight, int layer, LowRank LoraLayer::*part,
                     const Finish& finish) {
    for (int block = blocks.first; block < blocks.end; ++block)
      for (int i = 0; i < tokens.num_segments; ++i) {
        const Segment& segment = tokens.segments[i];
        Term terms[2] = {{given, &weight}, {low_rank.rows(), nullptr}};
        int num_terms = 1;
        if (segment.lora && (segment.lora[layer].*part).b.data) terms[num_terms++].weight = &(segment.lora[layer].*part).b;
        multiply<TILES>(terms, num_terms, segment.start, segment.end, block, finish);
      }
  }

  // All of it, each thread its share of the blocks.
  template <class Finish>
  void product(int rank, const Rows& given, const Packed& weight, int layer, LowRank LoraLayer::*part,
               const Finish& finish) {
    inner_sums(rank, given, layer, part);
    outer_product(share(weight.n / BLOCK, rank, pool.size()), given, weight, layer, part, finish);
  }

  void rotate(bf16* head, const float* norm, int token) const {
    const int size = shape.head_size, half = size / 2;
    alignas(64) float x[256];
    for (int i = 0; i < size; i += 16) store(x + i, load_bf16(head + i));
    if (norm) rms_norm(x, norm, size, shape.eps, nullptr, x);
    const float *cos = tokens.cos + int64_t(token) * size, *sin = tokens.sin + int64_t(token) * size;
    for (int i = 0; i < half; i += 16) {
      const Floats low = load(x + i), high = load(x + half + i);
      store_bf16(head + i, fma(low, load(cos + i), splat(-0.0f) - high * load(sin + i)));
      store_bf16(head + half + i, fma(high, load(cos + half + i), low * load(sin + half + i)));
    }
  }

  // Whether threads can take whole key heads, from their part of the projection to their attention, without waiting.
  bool by_heads() const { return shape.head_size % BLOCK == 0 && shape.key_heads % pool.size() == 0; }

  // Queries, keys and values of `given`, and attention over them: `attended`. Ends with a barrier.
  void attention(int rank, const Rows& given, const Layer& layer, int index) {
    const int size = shape.head_size, group = shape.heads / shape.key_heads;
    const int64_t row_size = qkv_size(), plane = tokens.num_slots * size;
    const auto finish = [&](int row, int block, const Floats (&sum)[TILES]) {
      for (int t = 0; t < TILES; ++t) {
        const int column = block * BLOCK + 16 * t;
        if (column >= row_size) break;
        Floats value = sum[t];
        if (layer.qkv_bias) value = value + load(layer.qkv_bias + column);
        store_bf16(qkv + row * row_size + column, value);
      }
    };
    const int threads = pool.size(), num_items = tokens.count * shape.key_heads;
    inner_sums(rank, given, index, &LoraLayer::qkv);
    const auto project = [&](Range blocks) {
      outer_product(blocks, given, layer.qkv, index, &LoraLayer::qkv, finish);
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
      const int first = head * group * size;
      Input* out = attended.row(token) + first;
      const Visible& seen = tokens.visible[token];
      const bf16 *k = keys + head * plane, *v = values + head * plane;
      switch (size / 32) {
        case 1: attend_group<1>(group, queries, k, v, seen, shape.attention_scale, own_scores, out); break;
        case 2: attend_group<2>(group, queries, k, v, seen, shape.attention_scale, own_scores, out); break;
        default: attend_group<4>(group, queries, k, v, seen, shape.attention_scale, own_scores, out); break;
      }
      if (is_rounded(layer.output)) attended.round(token, first, group * size);
    }
    pool.barrier();
  }

  // Gate and up stand side by side in each block: half of its tiles are gates, the other half their partners.
  static void gated(const Inputs& out, bool rounds, int row, int block, const Floats (&sum)[TILES]) {
    const int first = block * (BLOCK / 2);
    for (int t = 0; t < TILES / 2; ++t) store_input(out.row(row) + first + 16 * t, silu(sum[t]) * sum[t + TILES / 2]);
    if (rounds) out.round(row, first, BLOCK / 2);
  }

  void add_to_residual(int row, int block, const Floats (&sum)[TILES], const float* bias) {
    for (int t = 0; t < TILES; ++t) {
      const int column = block * BLOCK + 16 * t;
      if (column >= shape.hidden) break;
      float* at = residual + int64_t(row) * shape.hidden + column;
      Floats value = load(at) + sum[t];
      if (bias) value = value + load(bias + column);
      store(at, value);
    }
  }

  // One layer from the normalised input `given` to the sum in `residual`. Ends with a barrier.
  void layer(int rank, const Rows& given, const Layer& weights, int index) {
    attention(rank, given, weights, index);
    product(rank, attended.rows(), weights.output, index, &LoraLayer::output,
            [&](int row, int block, const Floats (&sum)[TILES]) { add_to_residual(row, block, sum, weights.output_bias); });
    pool.barrier();
    const Rows inputs = normalise(rank, normal, rounds_for_network(weights), [&](int row, Input* out) {
      rms_norm(residual + int64_t(row) * shape.hidden, weights.feed_forward_norm, shape.hidden, shape.eps, out);
    });
    const bool rounds = is_rounded(weights.down);
    product(rank, inputs, weights.gate_up, index, &LoraLayer::gate_up,
            [&](int row, int block, const Floats (&sum)[TILES]) { gated(inner, rounds, row, block, sum); });
    for (int i = 0; i < tokens.num_segments; ++i)
      if (const Packed* gate_up = tokens.segments[i].private_gate_up) {
        const Term term{inputs, gate_up};
        const bool private_rounds = is_rounded(*tokens.segments[i].private_down);
        const Range blocks = share(gate_up->n / BLOCK, rank, pool.size());
        for (int block = blocks.first; block < blocks.end; ++block)
          multiply<TILES>(&term, 1, tokens.segments[i].start, tokens.segments[i].end, block,
                          [&](int row, int at, const Floats (&sum)[TILES]) {
                            gated(private_inner, private_rounds, row, at, sum);
                          });
      }
    pool.barrier();
    const auto add = [&](int row, int block, const Floats (&sum)[TILES]) { add_to_residual(row, block, sum, nullptr); };
    product(rank, inner.rows(), weights.down, index, &LoraLayer::down, add);
    // Same blocks as above, so a thread adds to columns that it has finished itself.
    const Range blocks = share(weights.down.n / BLOCK, rank, pool.size());
    for (int i = 0; i < tokens.num_segments; ++i)
      if (const Packed* down = tokens.segments[i].private_down) {
        const Term term{private_inner.rows(), down};
        for (int block = blocks.first; block < blocks.end; ++block)
          multiply<TILES>(&term, 1, tokens.segments[i].start, tokens.segments[i].end, block, add);
      }
    pool.barrier();
  }

  bool rounds_for_network(const Layer& weights) const {
    bool found = is_rounded(weights.gate_up);
    for (int i = 0; i < tokens.num_segments; ++i)
      if (const Packed* gate_up = tokens.segments[i].private_gate_up) found |= is_rounded(*gate_up);
    return found;
  }
};

// [rows, outputs] float32 of the rows `start` to `end` of `given`; a phase without a barrier.
void head_product(Pool& pool, int rank, const Rows& given, int start, int end, const Packed& head, int outputs, float* out) {
  const Term term{given, &head};
  const Range blocks = share(head.n / BLOCK, rank, pool.size());
  for (int block = blocks.first; block < blocks.end; ++block)
    multiply<TILES>(&term, 1, start, end, block, [&](int row, int at, const Floats (&sum)[TILES]) {
      for (int t = 0; t < TILES; ++t) {
        const int column = at * BLOCK + 16 * t;
        if (column >= outputs) break;
        store_first(out + int64_t(row) * outputs + column, sum[t], outputs - column);
      }
    });
}

// Copies a row of hidden states to where the output head reads it.
void fill_head_input(const Inputs& inputs, int row, const bf16* hidden, bool rounds) {
  for (int i = 0; i < inputs.width; i += WIDTH) store_input(inputs.row(row) + i, load_bf16(hidden + i));
  if (rounds) inputs.round(row, 0, inputs.width);
}

// The first place of the largest of `count` values; -1 where that is not finite or one of them is NaN.
int likeliest(const float* values, int count) {
  const float found = largest(values, count);
  if (!std::isfinite(found)) return -1;
  const Floats top = splat(found);
  for (int first = 0; first < count; first += WIDTH)
    if (const uint32_t equal = bits(load_first(values + first, count - first, -INFINITY) == top))
      return first + __builtin_ctz(equal);
  return -1;
}

}  // namespace
