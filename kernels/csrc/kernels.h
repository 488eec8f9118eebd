// The entry points of one instruction set and what they take. Plain types: each isa_*.cpp fills one
// `Kernels`, and nothing else is shared.
#pragma once
#include <stdint.h>

enum Dtype { F32 = 0, BF16 = 1 };

typedef void (*ParallelFor)(int64_t n, void (*fn)(void *ctx, int64_t i), void *ctx);

struct LinearArgs {
  const void *x, *weight, *bias; // [M, K], [O, K], [O] or null
  void *out;                     // [M, O]
  int64_t M, O, K;
  int dtype, out_dtype;
  const void *next; // what is read after the weights, `next_bytes` of it: worth fetching meanwhile
  int64_t next_bytes;
};

// C[i, c] (+)= sum_r A(i, r) * B[r, c] with A(i, r) = a[i * stride_i + r * stride_r], one stride 1; r runs in
// order, in blocks. All in fp32; of `matmul_bf16` b is in bf16, `a` in bf16 or in fp32 (rounded), and c in
// fp32 or, unless it is added to, in bf16.
struct MatmulArgs {
  const void *a, *b; // b [R, C]
  void *c;           // [I, C]
  int64_t I, R, C, stride_i, stride_r;
  bool add; // to what C holds
  int a_dtype, c_dtype;
};

struct RowArgs { // rms_norm and silu_mul, forward and backward; unused fields are null
  const void *x, *residual, *weight, *grad;
  void *out, *total, *grad_x;
  float *grad_weight; // [blocks, K] partial sums
  int64_t rows, K;
  float eps;
  int dtype;
};

struct RopeArgs {
  const void *x;          // [T, H, D]
  void *out;              // [T, H, D]
  const float *cos, *sin; // [max_position, D / 2]
  const int64_t *positions;
  int64_t T, H, D, max_position;
  float sign; // -1 rotates back
  int dtype;
};

struct KvArgs {
  const void *k, *v;
  void *k_pages, *v_pages;
  const int64_t *slots;
  int64_t T, n_slots, row_bytes;
};

struct AttentionArgs {
  const void *q, *k, *v; // k, v: [T, Hk, D], or pages [P, B, Hk, D] when block_table is set
  void *out;
  float *stats;                // [T, Hq, 2]: row max (base 2) and 1 / sum, for the backward; or null
  const int32_t *block_table;  // [S, max_pages] or null
  const int32_t *cu_seqlens;   // [S + 1]
  const int32_t *context_lens; // [S] or null
  int64_t T, S, Hq, Hk, D, page_size, max_pages, n_pages;
  float scale;
  int dtype;
  // backward only
  const void *grad_out;
  void *grad_q, *grad_k, *grad_v;
};

struct LogprobArgs {
  const void *logits; // [N, V]
  const int64_t *targets;
  const float *temperature; // [N], or null: one_temperature
  float one_temperature;
  float *logprob, *entropy; // [N]
  float *stats;             // [N, 2]: largest logit, log of the sum, for the backward; or null
  int64_t N, V;
  int dtype;
  // backward only
  const float *grad_logprob, *grad_entropy; // the latter may be null
  void *grad_logits;
  const int64_t
      *source; // [N]: the row of everything above that a row of grad_logits belongs to; or null: its own
  // sampling only
  const int32_t *top_k;
  const float *top_p, *min_p;
  const int64_t *seed, *position;
  int64_t *token;
  int64_t *counts; // [N] sizes of the supports that truncation left, 0: all tokens
  int32_t **stash; // [N] where counts is not 0: their ids, to be freed by who takes them
};

struct HeadArgs { // log-probs and draws from hidden states: logits = softcap * tanh((hidden weight^T + bias)
                  // / softcap)
  const void *hidden, *weight, *bias; // [N, H], [V, H], [V] or null
  int64_t N, H, V;
  int dtype;
  float softcap;            // 0: none
  const float *temperature; // [N], or null: one_temperature
  float one_temperature;
  float *logprob, *entropy; // [N]
  // The support of row n is kept_ids[kept_offsets[n]] and on, ascending; a row without one has all tokens.
  const int64_t *targets;
  const int32_t *kept_ids;
  const int64_t *kept_offsets;
  int64_t n_kept;
  float *logits, *stats; // of the supports; [N, 2] as in LogprobArgs
  const float *grad_logprob, *grad_entropy;
  void *grad_hidden, *grad_weight, *grad_bias; // the last two: zeros, or null when not wanted
};

struct LayerTensors { // pointers; biases, q_norm and k_norm may be null. In the order of
                      // kernels/paged_decoder.py
  const void *input_norm, *q, *q_bias, *k, *k_bias, *v, *v_bias, *q_norm, *k_norm, *o, *o_bias;
  const void *post_norm, *gate, *gate_bias, *up, *up_bias, *down, *down_bias;
  void *k_pages, *v_pages; // [n_pages, page_size, Hk, D]
};

struct DecoderSizes {
  int64_t V, L, T, N, S, H, I, Hq, Hk, D, page_size, max_pages, n_pages, max_position;
};

struct DecoderArgs : DecoderSizes {
  const LayerTensors *layers;         // [L]
  const void *embedding, *final_norm; // [V, H], [H]
  void *out;                          // [N, H]
  const int64_t *token_ids, *wanted;  // [T], and the N rows that the caller wants
  const float *cos, *sin;
  const int64_t *positions, *slots;         // [T]
  const int32_t *block_table;               // [S, max_pages]
  const int32_t *cu_seqlens, *context_lens; // [S + 1], [S]
  float eps, scale;
  int dtype;
};

struct DecodeArgs {    // several steps for N = T = S sequences of one token to compute each
  DecoderArgs decoder; // of a step
  HeadArgs head;
  LogprobArgs draw; // of the first step; what the others draw is written behind it, N entries each
  // What `decoder` and `draw` read ([N]; `next` is draw.position), advanced by each step; slots and
  // context_lens are for use in between.
  int64_t *token_ids, *positions, *slots, *next;
  int32_t *context_lens;
  const int64_t *stop_ids,
      *stop_offsets; // the stops of sequence n are stop_ids[stop_offsets[n]] and on; [N + 1]
  int64_t steps;
};

// Functions return 0, or the 1-based index of the row whose input (target, position, slot, page, sampling
// parameter) is out of range.
struct Kernels {
  const char *name;
  void (*linear)(const LinearArgs *, ParallelFor, int threads);
  void (*matmul)(const MatmulArgs *, ParallelFor, int threads);
  void (*rms_norm)(const RowArgs *, ParallelFor);
  void (*rms_norm_backward)(const RowArgs *, ParallelFor);
  void (*silu_mul)(const RowArgs *, ParallelFor);
  void (*silu_mul_backward)(const RowArgs *, ParallelFor);
  int64_t (*rope)(const RopeArgs *, ParallelFor);
  int64_t (*write_kv)(const KvArgs *, ParallelFor);
  int64_t (*attention)(const AttentionArgs *, ParallelFor);
  void (*attention_backward)(const AttentionArgs *, ParallelFor);
  int64_t (*logprob)(const LogprobArgs *, ParallelFor);
  void (*logprob_backward)(const LogprobArgs *, ParallelFor);
  int64_t (*sample)(const LogprobArgs *, ParallelFor);
  void (*uniforms)(const LogprobArgs *);
  void (*sparse_logprob)(const HeadArgs *, ParallelFor, int threads);
  void (*sparse_backward)(const HeadArgs *, ParallelFor, int threads);
  int64_t (*linear_sample)(const HeadArgs *, const LogprobArgs *, ParallelFor, int threads);
  int64_t (*decoder)(const DecoderArgs *, ParallelFor, int threads);
  int64_t (*decode)(const DecodeArgs *, ParallelFor, int threads);
  void (*matmul_bf16)(const MatmulArgs *, ParallelFor,
                      int threads); // null where no instruction multiplies bf16
  // One product of each of n tiles, for tests; null where there are none.
  void (*tile_products)(const void *a, const void *b, float *c, int64_t n);
};
