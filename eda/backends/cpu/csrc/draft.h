// The draft: its layer over target features or its own outputs, and greedy chains and trees of draft tokens.
//
// Mirrors eda/models/draft.py (EAGLE-3, arXiv 2503.01840) and the proposals of eda/backends/eager/proposer.py (trees: EAGLE-2, arXiv 2406.16858).
#pragma once

#include "layer.h"
#include "sampling.h"

namespace {

struct Draft {
  Layer layer;
  Packed fc;
  const float *tap_norms[3], *hidden_norm, *embedding_norm, *final_norm;
  const int64_t* token_ids;  // target id of each draft column
  int32_t num_columns, unused;
};

// A sequence that drafts. Its draft cache holds `length` tokens, those of an extension in the same call included.
struct DraftRow {
  int64_t first_slot;
  int32_t length, num_steps;
  int32_t first_token, num_tokens;  // its part of the extension
  float min_probability;            // a chain ends behind a token that makes its joint probability fall below this
  int32_t unused;
  Sampling sampling;                // at temperature 0 the likeliest token is taken
  const Packed* head;
  const bf16* embedding;  // [vocabulary, hidden]
  const LoraLayer* lora;  // low-rank corrections of attention
  const Packed *private_gate_up, *private_down;
};

constexpr int LARGEST_HIDDEN = 8192;  // of a draft, whose rows are normalised on the stack

struct DraftScratch {
  Buffer<float> inputs, hidden, logits;
  InputBuffer normal;
};
DraftScratch draft_scratch;

// Target features `[count, 3 * hidden]` to draft inputs `out [count, hidden]`.
void fuse_features(Pool& pool, const Draft& draft, const Shape& shape, const Tokens& tokens, const bf16* features,
                   float* out) {
  Run run(pool, shape, tokens);
  const int size = shape.hidden;
  const Inputs normal = draft_scratch.normal.of(tokens.count, 3 * size);
  pool.run([&](int rank) {
    const Range rows = share(tokens.count, rank, pool.size());
    alignas(64) float plain[LARGEST_HIDDEN];
    for (int row = rows.first; row < rows.end; ++row) {
      for (int tap = 0; tap < 3; ++tap) {
        const bf16* given = features + (int64_t(row) * 3 + tap) * size;
        for (int i = 0; i < size; i += WIDTH) store(plain + i, load_bf16(given + i));
        rms_norm(plain, draft.tap_norms[tap], size, shape.eps, normal.row(row) + tap * size);
      }
      if (is_rounded(draft.fc)) normal.round(row, 0, normal.width);
    }
    pool.barrier();
    run.product(rank, normal.rows(), draft.fc, 0, &LoraLayer::qkv,
                [&](int row, int block, const Floats (&sum)[TILES]) {
                  for (int t = 0; t < TILES; ++t) {
                    const int column = block * BLOCK + 16 * t;
                    if (column < size) store(out + int64_t(row) * size + column, sum[t]);
                  }
                });
  });
}

// The layer over `tokens.count` tokens: `hidden [count, H]` and an embedding row for each; results replace `hidden`.
void draft_layer(Pool& pool, const Draft& draft, const Shape& shape, const Tokens& tokens, float* hidden,
                 const bf16* const* embeddings) {
  Run run(pool, shape, tokens);
  const int size = shape.hidden;
  pool.run([&](int rank) {
    const Range rows = share(tokens.count, rank, pool.size());
    alignas(64) float plain[LARGEST_HIDDEN];
    const Rows inputs = run.normalise(rank, run.input, is_rounded(draft.layer.qkv), [&](int row, Input* input) {
      for (int i = 0; i < size; i += WIDTH) store(plain + i, load_bf16(embeddings[row] + i));
      rms_norm(plain, draft.embedding_norm, size, shape.eps, input);
      const bool mine = rows.first <= row && row < rows.end;  // of the residual there is one, whatever the copies
      rms_norm(hidden + int64_t(row) * size, draft.hidden_norm, size, shape.eps, input + size,
               mine ? run.residual + int64_t(row) * size : nullptr);
    });
    run.layer(rank, inputs, draft.layer, 0);
    std::memcpy(hidden + int64_t(rows.first) * size, run.residual + int64_t(rows.first) * size,
                sizeof(float) * size * (rows.end - rows.first));
  });
}

// Draft logits `[count, num_columns]` of `hidden [count, H]`; token `i` belongs to `rows[owner[i]]`.
void draft_logits(Pool& pool, const Draft& draft, const Shape& shape, const std::vector<DraftRow>& rows,
                  const std::vector<int>& owner, const float* hidden, float* logits) {
  const int size = shape.hidden, count = int(owner.size());
  const Inputs normal = draft_scratch.normal.of(count, size);
  pool.run([&](int rank) {
    const Range mine = share(count, rank, pool.size());
    alignas(64) float plain[LARGEST_HIDDEN];
    bf16 narrow[LARGEST_HIDDEN];  // heads read bfloat16 on every processor, also where they are called alone
    for (int i = mine.first; i < mine.end; ++i) {
      rms_norm(hidden + int64_t(i) * size, draft.final_norm, size, shape.eps, nullptr, plain);
      for (int at = 0; at < size; at += WIDTH) store_bf16(narrow + at, load(plain + at));
      fill_head_input(normal, i, narrow, is_rounded(*rows[owner[i]].head));
    }
    pool.barrier();
    for (int start = 0, end; start < count; start = end) {  // runs of tokens under one head
      const Packed* head = rows[owner[start]].head;
      for (end = start + 1; end < count && rows[owner[end]].head == head;) ++end;
      head_product(pool, rank, normal.rows(), start, end, *head, draft.num_columns, logits);
    }
  });
}

// The `count` best columns of a row with their log-probabilities, best first; the lowest column wins ties.
void best_columns(const float* logits, int num_columns, int count, int* columns, float* scores) {
  float top = -INFINITY;
  for (int i = 0; i < count; ++i) scores[i] = -INFINITY, columns[i] = 0;
  Floats threshold = splat(-INFINITY);
  for (int first = 0; first < num_columns; first += WIDTH) {
    uint32_t candidates = bits(load_first(logits + first, num_columns - first, -INFINITY) > threshold);
    for (; candidates; candidates &= candidates - 1) {
      const int column = first + __builtin_ctz(candidates);
      const float value = logits[column];
      if (!(value > scores[count - 1])) continue;
      int place = count - 1;
      for (; place > 0 && value > scores[place - 1]; --place) {
        scores[place] = scores[place - 1];
        columns[place] = columns[place - 1];
      }
      scores[place] = value;
      columns[place] = column;
      threshold = splat(scores[count - 1]);
    }
  }
  top = scores[0];
  Floats total = zeros();
  for (int first = 0; first < num_columns; first += WIDTH)
    total = total + exp(load_first(logits + first, num_columns - first, -INFINITY) - splat(top));
  const float log_total = top + std::log(sum(total));
  for (int i = 0; i < count; ++i) scores[i] -= log_total;
}

// Draws a column by `uniform` from [0, 1); the distribution is written to `probabilities`.
int draw_column(const float* logits, int num_columns, const Sampling& sampling, double uniform, float* probabilities) {
  multiply_by(float(1.0 / weigh(logits, num_columns, sampling, probabilities)), probabilities, num_columns);
  // What is drawn from is what was rounded.
  return draw_by(probabilities, num_columns, sum_of(probabilities, num_columns), uniform);
}

// What one pass of draft steps needs, filled anew for each: tokens grouped by the row that they belong to.
struct DraftTokens {
  Tokens tokens{};
  std::vector<Segment> segments;
  std::vector<Visible> visible;
  std::vector<int64_t> slots;
  std::vector<float> cos, sin;
  std::vector<const bf16*> embeddings;

  explicit DraftTokens(const Tokens& cache) : tokens(cache) { tokens.count = 0; }

  // `angles` are the tables [positions, head_size] of `cos` and `sin`.
  void add(const Shape& shape, const DraftRow& row, int offset, int position, const Visible& seen, int64_t token_id,
           const float* cos_table, const float* sin_table) {
    const int at = int(slots.size());
    if (segments.empty() || segments.back().private_down != row.private_down || segments.back().lora != row.lora)
      segments.push_back({at, at, row.lora, row.private_gate_up, row.private_down});
    segments.back().end = at + 1;
    visible.push_back(seen);
    slots.push_back(row.first_slot + offset);
    const int64_t first = int64_t(position) * shape.head_size;
    cos.insert(cos.end(), cos_table + first, cos_table + first + shape.head_size);
    sin.insert(sin.end(), sin_table + first, sin_table + first + shape.head_size);
    embeddings.push_back(row.embedding + token_id * shape.hidden);
  }

  const Tokens& done() {
    tokens.count = int(slots.size());
    tokens.num_segments = int(segments.size());
    tokens.segments = segments.data();
    tokens.visible = visible.data();
    tokens.slots = slots.data();
    tokens.cos = cos.data();
    tokens.sin = sin.data();
    return tokens;
  }
};

// Chains from `hidden [num_rows, H]`. Writes each row's tokens to `out [num_rows, max_steps]`. Rows that draw their tokens
// take them from `uniforms [num_rows, max_steps]` and leave the distributions in `probabilities [num_rows, max_steps,
// num_columns]`.
void draft_chains(Pool& pool, const Draft& draft, const Shape& shape, const Tokens& cache, const float* cos_table,
                  const float* sin_table, std::vector<DraftRow> rows, const float* start, int max_steps,
                  const double* uniforms, float* probabilities, int64_t* out, int32_t* num_out) {
  const int size = shape.hidden;
  float* hidden = draft_scratch.hidden.of(int64_t(rows.size()) * size);
  float* logits = draft_scratch.logits.of(int64_t(rows.size()) * draft.num_columns);
  std::memcpy(hidden, start, sizeof(float) * rows.size() * size);
  std::vector<int> active;  // rows that still draft, in order
  std::vector<float> joint(rows.size(), 0.0f);
  for (int b = 0; b < int(rows.size()); ++b) {
    num_out[b] = 0;
    if (rows[b].num_steps) active.push_back(b);
  }
  for (int i = 0; i < int(active.size()); ++i)
    if (active[i] != i) std::memmove(hidden + int64_t(i) * size, hidden + int64_t(active[i]) * size, sizeof(float) * size);
  while (!active.empty()) {
    draft_logits(pool, draft, shape, rows, active, hidden, logits);
    DraftTokens step(cache);
    std::vector<int> going;
    for (int i = 0; i < int(active.size()); ++i) {
      const int b = active[i];
      DraftRow& row = rows[b];
      int column;
      float score;
      const float* line = logits + int64_t(i) * draft.num_columns;
      if (row.sampling.temperature > 0) {
        const int64_t place = int64_t(b) * max_steps + num_out[b];
        float* own = probabilities + place * draft.num_columns;
        column = draw_column(line, draft.num_columns, row.sampling, uniforms[place], own);
        score = std::log(own[column]);
      } else {
        best_columns(line, draft.num_columns, 1, &column, &score);
      }
      const int64_t token = draft.token_ids[column];
      out[int64_t(b) * max_steps + num_out[b]++] = token;
      joint[b] += score;
      if (num_out[b] >= row.num_steps || joint[b] < std::log(row.min_probability)) continue;
      const int at = row.length + num_out[b] - 1;
      step.add(shape, row, at, at, {row.first_slot, at + 1, 0, nullptr}, token, cos_table, sin_table);
      if (int(going.size()) != i)
        std::memmove(hidden + int64_t(going.size()) * size, hidden + int64_t(i) * size, sizeof(float) * size);
      going.push_back(b);
    }
    active = going;
    if (!active.empty()) draft_layer(pool, draft, shape, step.done(), hidden, step.embeddings.data());
  }
}

// One dynamic tree from `start [H]`: each level expands the `top_k` likeliest nodes into `top_k` children, and the
// `num_nodes` likeliest of all are kept, parents before children. Returns their number.
int draft_tree(Pool& pool, const Draft& draft, const Shape& shape, const Tokens& cache, const float* cos_table,
               const float* sin_table, const DraftRow& row, const float* start, int top_k, int num_nodes,
               int64_t* out_tokens, int32_t* out_parents) {
  struct Node {
    int64_t token;
    int parent;  // -1: the root
    float joint;
    int slot;    // offset behind the cached tokens, -1 before it is expanded
  };
  const int size = shape.hidden;
  std::vector<Node> nodes;
  float* hidden = draft_scratch.hidden.of(int64_t(top_k) * size);
  float* logits = draft_scratch.logits.of(int64_t(top_k) * draft.num_columns);
  std::memcpy(hidden, start, sizeof(float) * size);
  const std::vector<DraftRow> rows{row};
  std::vector<int> frontier{-1}, columns(top_k);
  std::vector<float> scores(top_k);
  int used = 0;  // slots behind the cached tokens
  for (int level = 0; level < row.num_steps; ++level) {
    draft_logits(pool, draft, shape, rows, std::vector<int>(frontier.size(), 0), hidden, logits);
    std::vector<int> children;
    for (int i = 0; i < int(frontier.size()); ++i) {
      best_columns(logits + int64_t(i) * draft.num_columns, draft.num_columns, top_k, columns.data(), scores.data());
      const float above = frontier[i] < 0 ? 0.0f : nodes[frontier[i]].joint;
      for (int k = 0; k < top_k; ++k) {
        children.push_back(int(nodes.size()));
        nodes.push_back({draft.token_ids[columns[k]], frontier[i], above + scores[k], -1});
      }
    }
    if (level + 1 == row.num_steps) break;
    std::stable_sort(children.begin(), children.end(), [&](int a, int b) { return nodes[a].joint > nodes[b].joint; });
    children.resize(std::min<int>(children.size(), top_k));
    DraftTokens step(cache);
    std::vector<std::vector<int32_t>> extras(children.size());
    std::vector<float> inputs;
    for (int i = 0; i < int(children.size()); ++i) {
      Node& node = nodes[children[i]];
      node.slot = used++;
      for (int at = children[i]; at >= 0; at = nodes[at].parent) extras[i].push_back(row.length + nodes[at].slot);
      std::reverse(extras[i].begin(), extras[i].end());
      const int from = int(std::find(frontier.begin(), frontier.end(), node.parent) - frontier.begin());
      inputs.insert(inputs.end(), hidden + int64_t(from) * size, hidden + int64_t(from + 1) * size);
      step.add(shape, row, row.length + node.slot, row.length + level,
               {row.first_slot, row.length, int32_t(extras[i].size()), extras[i].data()}, node.token, cos_table, sin_table);
    }
    std::memcpy(hidden, inputs.data(), sizeof(float) * inputs.size());
    draft_layer(pool, draft, shape, step.done(), hidden, step.embeddings.data());
    frontier = children;
  }
  std::vector<int> order(nodes.size()), place(nodes.size(), 0);
  for (int i = 0; i < int(order.size()); ++i) order[i] = i;
  // Stable: a parent stands before its child also where both are equally likely.
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return nodes[a].joint > nodes[b].joint; });
  order.resize(std::min<int>(order.size(), num_nodes));
  std::sort(order.begin(), order.end());
  for (int i = 0; i < int(order.size()); ++i) {
    const Node& node = nodes[order[i]];
    place[order[i]] = i + 1;
    out_tokens[i] = node.token;
    out_parents[i] = node.parent < 0 ? 0 : place[node.parent];
  }
  return int(order.size());
}

}  // namespace
