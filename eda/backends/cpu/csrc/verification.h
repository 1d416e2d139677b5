// Verification of drawn chains by rejection sampling (Leviathan, Kalman, Matias 2023; Chen et al. 2023).
//
// Mirrors the rule of eda/speculation/rejection.py for chains: a drafted token is accepted with probability min(1, target / draft), the
// first rejected one is replaced by a draw from the positive part of target - draft, and a draw from the target follows
// where all are accepted. Without a draft that draw is plain decoding.
#pragma once

#include "layer.h"
#include "sampling.h"

namespace {

struct VerifiedRow {
  Sampling sampling;
  const float* draft_probs;        // [num_draft, num_columns]: what each token was drawn from
  const int64_t* draft_token_ids;  // target id of each column; null when the vocabularies are the same
  const int64_t* token_ids;        // the drafted tokens
  int32_t num_draft, num_columns;
  int32_t first_line, first_uniform;  // of its `1 + num_draft` lines of logits; of a uniform for each drafted token
};

// Probability that the draft drew the target's token `token_id` with; 0 for one that it cannot draw.
inline float draft_probability(const VerifiedRow& row, const float* probabilities, int64_t token_id) {
  const int count = row.num_columns;
  if (!row.draft_token_ids) return token_id >= 0 && token_id < count ? probabilities[token_id] : 0.0f;
  // Whole blocks are searched without a branch for each column.
  constexpr int BLOCK_OF_IDS = 32;
  for (int first = 0; first < count; first += BLOCK_OF_IDS) {
    const int64_t* ids = row.draft_token_ids + first;
    const int size = std::min(BLOCK_OF_IDS, count - first);
    int found = -1;
    for (int i = 0; i < size; ++i) found = ids[i] == token_id ? i : found;
    if (found >= 0) return probabilities[first + found];
  }
  return 0.0f;
}

// Turns the target's `weights` into the residual, not normalised; returns its sum. NaN stays, for the caller to see.
double subtract_draft(const VerifiedRow& row, const float* probabilities, double total, int count, float* weights) {
  multiply_by(float(1.0 / total), weights, count);
  for (int column = 0; column < row.num_columns; ++column)
    weights[row.draft_token_ids ? row.draft_token_ids[column] : column] -= probabilities[column];
  for (int first = 0; first < count; first += WIDTH) {
    const Floats part = load_first(weights + first, count - first);
    store_first(weights + first, cleared(zeros() > part, part), count - first);
  }
  return sum_of(weights, count);
}

// Verifies one row: how many drafted tokens are accepted, and in `token` the one that follows them; -1 where a
// line of logits is not finite. A line behind the first rejected token is never looked at. `weights` has room for a line.
int verify_row(const VerifiedRow& row, const float* logits, int count, const double* uniforms, double last_uniform,
               float* weights, int64_t* token) {
  logits += int64_t(row.first_line) * count;
  for (int accepted = 0;; ++accepted, logits += count) {
    double total = weigh(logits, count, row.sampling, weights);
    if (std::isnan(total)) {
      *token = -1;
      return accepted;
    }
    if (accepted < row.num_draft) {
      const float* probabilities = row.draft_probs + int64_t(accepted) * row.num_columns;
      const int64_t drafted = row.token_ids[accepted];
      const double draft = draft_probability(row, probabilities, drafted), target = weights[drafted] / total;
      // A token that its distribution cannot give comes from a broken draft, and is never accepted.
      if (draft > 0.0 && uniforms[row.first_uniform + accepted] * draft < target) continue;
      const double residual = subtract_draft(row, probabilities, total, count, weights);
      // None is left only when rounding rejected what exact arithmetic accepts with certainty; NaN is a broken draft's.
      total = residual > 0.0 ? residual : weigh(logits, count, row.sampling, weights);
    }
    *token = draw_by(weights, count, total, last_uniform);
    return accepted;
  }
}

}  // namespace
