// Whole passes and the verification, as the modules of this folder call them. One runs at a time.

#include "draft.h"
#include "layer.h"
#include "mirror.h"
#include "verification.h"

namespace {

Buffer<float> head_scratch, weight_scratch;
InputBuffer head_input;

}  // namespace

extern "C" {

// All layers over `embedded [count, hidden]`. Writes the normalised last hidden states to `hidden` and, where
// `features` is not null, the states behind the layers `taps[3]` to `features [count, 3 * hidden]`. For the tokens in
// `wanted`, `logits [num_wanted, num_outputs]` are written where not null, and the likeliest tokens to `best` likewise (-1 where logits are not
// finite).
void eda_run_target(int num_threads, const Shape* shape, const Layer* layers, int num_layers, const float* final_norm,
                    const Packed* head, const Tokens* tokens, const bf16* embedded, bf16* hidden, bf16* features,
                    const int32_t* taps, const int32_t* wanted, int num_wanted, int num_outputs, float* logits,
                    int64_t* best) {
  std::lock_guard<std::mutex> lock(pool_lock());
  Pool& pool = pool_of(num_threads);
  Run run(pool, *shape, *tokens, num_layers);
  const int size = shape->hidden;
  const Inputs chosen = head_input.of(num_wanted, size);
  if (!logits && num_wanted) logits = head_scratch.of(int64_t(num_wanted) * num_outputs);
  pool.run([&](int rank) {
    const Range rows = share(tokens->count, rank, pool.size());
    for (int64_t i = int64_t(rows.first) * size; i < int64_t(rows.end) * size; i += 16)
      store(run.residual + i, load_bf16(embedded + i));
    pool.barrier();
    for (int index = 0; index < num_layers; ++index) {
      const bool rounds = is_rounded(layers[index].qkv);
      const Rows inputs = run.normalise(rank, run.input, rounds, [&](int row, Input* out) {
        rms_norm(run.residual + int64_t(row) * size, layers[index].attention_norm, size, shape->eps, out);
      });
      run.layer(rank, inputs, layers[index], index);
      if (features)
        for (int tap = 0; tap < 3; ++tap)
          if (taps[tap] == index)
            for (int row = rows.first; row < rows.end; ++row)
              for (int i = 0; i < size; i += 16)
                store_bf16(features + (int64_t(row) * 3 + tap) * size + i,
                           load(run.residual + int64_t(row) * size + i));
    }
    for (int row = rows.first; row < rows.end; ++row) {
      float* last = run.residual + int64_t(row) * size;
      rms_norm(last, final_norm, size, shape->eps, nullptr, last);
      for (int i = 0; i < size; i += WIDTH) store_bf16(hidden + int64_t(row) * size + i, load(last + i));
    }
    if (!num_wanted) return;
    pool.barrier();
    const Range mine = share(num_wanted, rank, pool.size());
    for (int i = mine.first; i < mine.end; ++i)
      fill_head_input(chosen, i, hidden + int64_t(wanted[i]) * size, is_rounded(*head));
    pool.barrier();
    head_product(pool, rank, chosen.rows(), 0, num_wanted, *head, num_outputs, logits);
    if (!best) return;
    pool.barrier();
    for (int i = mine.first; i < mine.end; ++i) best[i] = likeliest(logits + int64_t(i) * num_outputs, num_outputs);
  });
}

// Verifies the drawn chains of `rows` by `logits [lines, count]`: how many drafted tokens of each are accepted, and the
// token that follows them. `uniforms` holds what the rows point to, `last_uniforms [num_rows]` the ones for these tokens.
void eda_verify(int num_threads, const VerifiedRow* rows, int num_rows, const float* logits, int count,
                const double* uniforms, const double* last_uniforms, int32_t* num_accepted, int64_t* tokens) {
  std::lock_guard<std::mutex> lock(pool_lock());
  // A lone row takes a few microseconds, about what waking the others does.
  Pool& pool = num_rows == 1 ? exact_pool(1) : pool_of(num_threads);
  const int64_t stride = (int64_t(count) + 15) & ~15;
  float* weights = weight_scratch.of(stride * pool.size());
  pool.run([&](int rank) {
    const Range mine = share(num_rows, rank, pool.size());
    for (int b = mine.first; b < mine.end; ++b)
      num_accepted[b] = verify_row(rows[b], logits, count, uniforms, last_uniforms[b], weights + rank * stride, tokens + b);
  });
}

// Float32 logits `out [rows, outputs]` of `hidden [rows, inputs]`.
void eda_run_head(int num_threads, const Packed* head, const bf16* hidden, int rows, int inputs, int outputs, float* out) {
  std::lock_guard<std::mutex> lock(pool_lock());
  Pool& pool = pool_of(num_threads);
  const Inputs given = head_input.of(rows, inputs);
  pool.run([&](int rank) {
    const Range mine = share(rows, rank, pool.size());
    for (int i = mine.first; i < mine.end; ++i) fill_head_input(given, i, hidden + int64_t(i) * inputs, is_rounded(*head));
    pool.barrier();
    head_product(pool, rank, given.rows(), 0, rows, *head, outputs, out);
  });
}

// One round of the draft: features of the target `[count, 3 * hidden]` and the ids of the tokens behind them go through
// `fc` and the layer (the tokens of `rows[b]` are `first_token` on, `num_tokens` of them); then each row drafts a chain of
// `num_steps` tokens, see `draft_chains`. `fused` holds the same tokens with the low-rank corrections of `fc` as `lora`
// `qkv`. `hidden [num_rows, hidden]` takes the output of each row's last token.
void eda_draft_round(int num_threads, const Draft* draft, const Shape* shape, const Tokens* tokens, const Tokens* fused,
                     const bf16* features, const int64_t* token_ids, const float* cos_table, const float* sin_table,
                     const DraftRow* rows, int num_rows, int max_steps, const double* uniforms,
                     float* probabilities, float* hidden, int64_t* out, int32_t* num_out) {
  std::lock_guard<std::mutex> lock(pool_lock());
  Pool& pool = pool_of(num_threads);
  const int size = shape->hidden;
  float* inputs = draft_scratch.inputs.of(int64_t(tokens->count) * size);
  fuse_features(pool, *draft, *shape, *fused, features, inputs);
  std::vector<const bf16*> embeddings(tokens->count);
  for (int b = 0; b < num_rows; ++b)
    for (int i = rows[b].first_token; i < rows[b].first_token + rows[b].num_tokens; ++i)
      embeddings[i] = rows[b].embedding + token_ids[i] * size;
  draft_layer(pool, *draft, *shape, *tokens, inputs, embeddings.data());
  for (int b = 0; b < num_rows; ++b)
    std::memcpy(hidden + int64_t(b) * size, inputs + int64_t(rows[b].first_token + rows[b].num_tokens - 1) * size,
                sizeof(float) * size);
  if (max_steps)
    draft_chains(pool, *draft, *shape, *tokens, cos_table, sin_table, std::vector<DraftRow>(rows, rows + num_rows),
                 hidden, max_steps, uniforms, probabilities, out, num_out);
}

// The draft's layer over `hidden [count, hidden]`, in place; `embeddings [count, hidden]`.
void eda_run_draft(int num_threads, const Draft* draft, const Shape* shape, const Tokens* tokens,
                   const bf16* embeddings, float* hidden) {
  std::lock_guard<std::mutex> lock(pool_lock());
  std::vector<const bf16*> rows(tokens->count);
  for (int row = 0; row < tokens->count; ++row) rows[row] = embeddings + int64_t(row) * shape->hidden;
  draft_layer(pool_of(num_threads), *draft, *shape, *tokens, hidden, rows.data());
}

// See `draft_tree`.
int eda_draft_tree(int num_threads, const Draft* draft, const Shape* shape, const Tokens* tokens,
                   const float* cos_table, const float* sin_table, const DraftRow* row, const float* hidden, int top_k,
                   int num_nodes, int64_t* out_tokens, int32_t* out_parents) {
  std::lock_guard<std::mutex> lock(pool_lock());
  return draft_tree(pool_of(num_threads), *draft, *shape, *tokens, cos_table, sin_table, *row, hidden, top_k, num_nodes,
                    out_tokens, out_parents);
}

// What the passes were compiled for.
const char* eda_isa() {
#if EDA_BF16_PRODUCTS && EDA_BYTE_PRODUCTS
  return "avx512-bf16+vnni";
#elif EDA_BF16_PRODUCTS
  return "avx512-bf16";
#elif EDA_AVX512 && EDA_BYTE_PRODUCTS
  return "avx512+vnni";
#elif defined(__AVXVNNI__) && !defined(EDA_SCALAR)
  return "avx2+vnni";
#elif defined(__ARM_FEATURE_DOTPROD) && !defined(EDA_SCALAR)
  return "neon+dotprod";
#else
  return Machine::NAME;
#endif
}

// Fills `out` (where not null) with what library.py compares its structures with; returns how many numbers that are.
int64_t eda_sizes(int64_t* out) {
  const std::vector<int64_t> found = mirrored();
  if (out) std::copy(found.begin(), found.end(), out);
  return int64_t(found.size());
}

// For tests: a governor of its own, told what passes have lost, and the threads that it grants.
Governor* eda_governor_new(int full) { return new Governor(full); }
void eda_governor_delete(Governor* governor) { delete governor; }
int eda_governor_next(Governor* governor, int64_t now, int64_t lost) { return governor->next(now, lost); }

// Threads of the next pass that may have `num_threads`, as if each had slept for `lost` nanoseconds in the last one.
int eda_threads_after(int num_threads, int64_t lost) {
  std::lock_guard<std::mutex> lock(pool_lock());
  if (lost) exact_pool(num_threads).lose(lost * (num_threads - 1));
  return pool_of(num_threads).size();
}

}  // extern "C"
