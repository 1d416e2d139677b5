// Whole passes, as eda/kernels/target.py and draft.py call them. One runs at a time.

#include "draft.h"
#include "layer.h"

extern "C" {

// All layers over `embedded [count, hidden]`. Writes the normalised last hidden states to `hidden` and, where
// `features` is not null, the states behind the layers `taps[3]` to `features [count, 3 * hidden]`.
void eda_run_target(int num_threads, const Shape* shape, const Layer* layers, int num_layers, const float* final_norm,
                    const Tokens* tokens, const bf16* embedded, bf16* hidden, bf16* features, const int32_t* taps) {
  std::lock_guard<std::mutex> lock(pool_lock());
  Pool& pool = pool_of(num_threads);
  Run run(pool, *shape, *tokens);
  const int size = shape->hidden;
  pool.run([&](int rank) {
    const Range rows = share(tokens->count, rank, pool.size());
    for (int64_t i = int64_t(rows.first) * size; i < int64_t(rows.end) * size; i += 16)
      _mm512_storeu_ps(run.residual + i, load_bf16(embedded + i));
    for (int index = 0; index < num_layers; ++index) {
      for (int row = rows.first; row < rows.end; ++row)
        rms_norm(run.residual + int64_t(row) * size, layers[index].attention_norm, size, shape->eps,
                 run.input + int64_t(row) * size);
      pool.barrier();
      run.layer(rank, layers[index], index);
      if (features)
        for (int tap = 0; tap < 3; ++tap)
          if (taps[tap] == index)
            for (int row = rows.first; row < rows.end; ++row)
              for (int i = 0; i < size; i += 16)
                store_bf16(features + (int64_t(row) * 3 + tap) * size + i,
                           _mm512_loadu_ps(run.residual + int64_t(row) * size + i));
    }
    for (int row = rows.first; row < rows.end; ++row)
      rms_norm(run.residual + int64_t(row) * size, final_norm, size, shape->eps, hidden + int64_t(row) * size);
  });
}

// Float32 logits `out [rows, outputs]` of `hidden [rows, inputs]`.
void eda_run_head(int num_threads, const Packed* head, const bf16* hidden, int rows, int inputs, int outputs, float* out) {
  std::lock_guard<std::mutex> lock(pool_lock());
  Pool& pool = pool_of(num_threads);
  pool.run([&](int rank) { head_product(pool, rank, hidden, inputs, 0, rows, *head, outputs, out); });
}

// Features of the target `[count, 3 * hidden]` to draft inputs `out [count, hidden]`; low-rank corrections stand in the
// segments' `lora` as their `qkv`.
void eda_fuse_features(int num_threads, const Draft* draft, const Shape* shape, const Tokens* tokens,
                       const bf16* features, float* out) {
  std::lock_guard<std::mutex> lock(pool_lock());
  Pool& pool = pool_of(num_threads);
  Run run(pool, *shape, *tokens);
  const int size = shape->hidden;
  bf16* normal = draft_scratch.normal.of(int64_t(tokens->count) * 3 * size);
  pool.run([&](int rank) {
    const Range rows = share(tokens->count, rank, pool.size());
    alignas(64) float plain[8192];
    for (int row = rows.first; row < rows.end; ++row)
      for (int tap = 0; tap < 3; ++tap) {
        const int64_t at = (int64_t(row) * 3 + tap) * size;
        for (int i = 0; i < size; i += 16) _mm512_store_ps(plain + i, load_bf16(features + at + i));
        rms_norm(plain, draft->tap_norms[tap], size, shape->eps, normal + at);
      }
    pool.barrier();
    run.product(rank, normal, 3 * size, draft->fc, 0, &LoraLayer::qkv,
                [&](int row, int block, const __m512 (&sum)[TILES]) {
                  for (int t = 0; t < TILES; ++t) {
                    const int column = block * 16 * TILES + 16 * t;
                    if (column < size) _mm512_storeu_ps(out + int64_t(row) * size + column, sum[t]);
                  }
                });
  });
}

// The draft's layer over `hidden [count, hidden]`, in place; `embeddings [count, hidden]`.
void eda_run_draft(int num_threads, const Draft* draft, const Shape* shape, const Tokens* tokens,
                   const bf16* embeddings, float* hidden) {
  std::lock_guard<std::mutex> lock(pool_lock());
  std::vector<const bf16*> rows(tokens->count);
  for (int row = 0; row < tokens->count; ++row) rows[row] = embeddings + int64_t(row) * shape->hidden;
  draft_layer(pool_of(num_threads), *draft, *shape, *tokens, hidden, rows.data());
}

// See `draft_chains`. `hidden [num_rows, hidden]`; only the cache of `tokens` is read.
void eda_draft_chains(int num_threads, const Draft* draft, const Shape* shape, const Tokens* tokens,
                      const float* cos_table, const float* sin_table, const DraftRow* rows, int num_rows,
                      const float* hidden, int max_steps, float min_probability, int64_t* out, int32_t* num_out) {
  std::lock_guard<std::mutex> lock(pool_lock());
  draft_chains(pool_of(num_threads), *draft, *shape, *tokens, cos_table, sin_table,
               std::vector<DraftRow>(rows, rows + num_rows), hidden, max_steps, min_probability, out, num_out);
}

// See `draft_tree`.
int eda_draft_tree(int num_threads, const Draft* draft, const Shape* shape, const Tokens* tokens,
                   const float* cos_table, const float* sin_table, const DraftRow* row, const float* hidden, int top_k,
                   int num_nodes, int64_t* out_tokens, int32_t* out_parents) {
  std::lock_guard<std::mutex> lock(pool_lock());
  return draft_tree(pool_of(num_threads), *draft, *shape, *tokens, cos_table, sin_table, *row, hidden, top_k, num_nodes,
                    out_tokens, out_parents);
}

}  // extern "C"
