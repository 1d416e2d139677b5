// Sizes and offsets of what library.py mirrors, in its order, so that a difference is seen before it does harm.
#pragma once

#include <cstddef>

#include "draft.h"
#include "layer.h"
#include "verification.h"

namespace {

#define EDA_AT(field) int64_t(offsetof(Here, field))

inline std::vector<int64_t> mirrored() {
  std::vector<int64_t> all;
  const auto add = [&](std::initializer_list<int64_t> found) { all.insert(all.end(), found); };
  {
    using Here = Packed;
    add({sizeof(Here), EDA_AT(data), EDA_AT(n), EDA_AT(k), EDA_AT(tiles), EDA_AT(format), EDA_AT(scales), EDA_AT(minimums)});
  }
  {
    using Here = Layer;
    add({sizeof(Here), EDA_AT(qkv), EDA_AT(output), EDA_AT(gate_up), EDA_AT(down), EDA_AT(attention_norm),
         EDA_AT(feed_forward_norm), EDA_AT(qkv_bias), EDA_AT(output_bias), EDA_AT(query_norm), EDA_AT(key_norm)});
  }
  {
    using Here = Shape;
    add({sizeof(Here), EDA_AT(hidden), EDA_AT(heads), EDA_AT(key_heads), EDA_AT(head_size), EDA_AT(qkv_inputs),
         EDA_AT(intermediate), EDA_AT(eps), EDA_AT(attention_scale)});
  }
  {
    using Here = LowRank;
    add({sizeof(Here), EDA_AT(a), EDA_AT(b)});
  }
  {
    using Here = LoraLayer;
    add({sizeof(Here), EDA_AT(qkv), EDA_AT(output), EDA_AT(gate_up), EDA_AT(down)});
  }
  {
    using Here = Segment;
    add({sizeof(Here), EDA_AT(start), EDA_AT(end), EDA_AT(lora), EDA_AT(private_gate_up), EDA_AT(private_down)});
  }
  {
    using Here = Visible;
    add({sizeof(Here), EDA_AT(first_slot), EDA_AT(num_leading), EDA_AT(num_extra), EDA_AT(extra)});
  }
  {
    using Here = Tokens;
    add({sizeof(Here), EDA_AT(count), EDA_AT(num_segments), EDA_AT(segments), EDA_AT(cos), EDA_AT(sin), EDA_AT(slots),
         EDA_AT(visible), EDA_AT(keys), EDA_AT(values), EDA_AT(num_slots)});
  }
  {
    using Here = Draft;
    add({sizeof(Here), EDA_AT(layer), EDA_AT(fc), EDA_AT(tap_norms), EDA_AT(hidden_norm), EDA_AT(embedding_norm),
         EDA_AT(final_norm), EDA_AT(token_ids), EDA_AT(num_columns), EDA_AT(unused)});
  }
  {
    using Here = Sampling;
    add({sizeof(Here), EDA_AT(top_p), EDA_AT(temperature), EDA_AT(min_p), EDA_AT(top_k), EDA_AT(unused)});
  }
  {
    using Here = VerifiedRow;
    add({sizeof(Here), EDA_AT(sampling), EDA_AT(draft_probs), EDA_AT(draft_token_ids), EDA_AT(token_ids),
         EDA_AT(num_draft), EDA_AT(num_columns), EDA_AT(first_line), EDA_AT(first_uniform)});
  }
  {
    using Here = DraftRow;
    add({sizeof(Here), EDA_AT(first_slot), EDA_AT(length), EDA_AT(num_steps), EDA_AT(first_token), EDA_AT(num_tokens),
         EDA_AT(min_probability), EDA_AT(unused), EDA_AT(sampling), EDA_AT(head), EDA_AT(embedding), EDA_AT(lora),
         EDA_AT(private_gate_up), EDA_AT(private_down)});
  }
  all.push_back(LARGEST_HIDDEN);
  return all;
}

#undef EDA_AT

}  // namespace
