// Python bindings: plain integers in, because converting a tensor costs more than many of these calls. kernels/cpu.py checks
// the contract (dtype, shape, contiguity) before it comes here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <stdlib.h>
#include <string.h>

#include "advantage.h"
#include "dispatch.h"
#include "threads.h"

namespace nb = nanobind;
typedef uintptr_t ptr;

namespace {

const Table *table = best_table();

template <class T> T *at(ptr p) {
  return reinterpret_cast<T *>(p);
}

void linear(ptr x, ptr w, ptr b, ptr out, int64_t M, int64_t O, int64_t K, int dtype, int out_dtype) {
  LinearArgs a = {at<void>(x), at<void>(w), at<void>(b), at<void>(out), M, O, K, dtype, out_dtype};
  table->linear(&a, parallel_for, thread_count());
}

void matmul(ptr a, ptr b, ptr c, int64_t I, int64_t R, int64_t C, int64_t stride_i, int64_t stride_r, bool add) {
  MatmulArgs m = {at<float>(a), at<float>(b), at<float>(c), I, R, C, stride_i, stride_r, add};
  table->matmul(&m, parallel_for, thread_count());
}

void rms_norm(ptr x, ptr residual, ptr weight, ptr out, ptr total, int64_t rows, int64_t K, float eps, int dtype) {
  RowArgs a = {};
  a.x = at<void>(x), a.residual = at<void>(residual), a.weight = at<void>(weight), a.out = at<void>(out);
  a.total = at<void>(total), a.rows = rows, a.K = K, a.eps = eps, a.dtype = dtype;
  table->rms_norm(&a, parallel_for);
}

void rms_norm_backward(ptr x, ptr weight, ptr grad, ptr grad_total, ptr grad_x, ptr grad_weight, int64_t rows, int64_t K,
                       float eps, int dtype) {
  RowArgs a = {};
  a.x = at<void>(x), a.weight = at<void>(weight), a.grad = at<void>(grad), a.residual = at<void>(grad_total);
  a.grad_x = at<void>(grad_x), a.grad_weight = at<float>(grad_weight), a.rows = rows, a.K = K, a.eps = eps, a.dtype = dtype;
  table->rms_norm_backward(&a, parallel_for);
}

void silu_mul(ptr gate, ptr up, ptr out, int64_t rows, int64_t K, int dtype) {
  RowArgs a = {};
  a.x = at<void>(gate), a.weight = at<void>(up), a.out = at<void>(out), a.rows = rows, a.K = K, a.dtype = dtype;
  table->silu_mul(&a, parallel_for);
}

void silu_mul_backward(ptr gate, ptr up, ptr grad, ptr grad_gate, ptr grad_up, int64_t rows, int64_t K, int dtype) {
  RowArgs a = {};
  a.x = at<void>(gate), a.weight = at<void>(up), a.grad = at<void>(grad), a.grad_x = at<void>(grad_gate);
  a.out = at<void>(grad_up), a.rows = rows, a.K = K, a.dtype = dtype;
  table->silu_mul_backward(&a, parallel_for);
}

int64_t rope(ptr x, ptr out, ptr cos, ptr sin, ptr positions, int64_t T, int64_t H, int64_t D, int64_t max_position, float sign,
             int dtype) {
  RopeArgs a = {at<void>(x), at<void>(out), at<float>(cos), at<float>(sin), at<int64_t>(positions), T, H,
                D,           max_position,  sign,           dtype};
  return table->rope(&a, parallel_for);
}

int64_t write_kv(ptr k, ptr v, ptr k_pages, ptr v_pages, ptr slots, int64_t T, int64_t n_slots, int64_t row_bytes) {
  KvArgs a = {at<void>(k), at<void>(v), at<void>(k_pages), at<void>(v_pages), at<int64_t>(slots), T, n_slots, row_bytes};
  return table->write_kv(&a, parallel_for);
}

int64_t packed_attention(ptr q, ptr k, ptr v, ptr out, ptr stats, ptr cu_seqlens, int64_t T, int64_t S, int64_t Hq, int64_t Hk,
                         int64_t D, float scale, int dtype) {
  AttentionArgs a = {};
  a.q = at<void>(q), a.k = at<void>(k), a.v = at<void>(v), a.out = at<void>(out), a.stats = at<float>(stats);
  a.cu_seqlens = at<int32_t>(cu_seqlens), a.T = T, a.S = S, a.Hq = Hq, a.Hk = Hk, a.D = D, a.scale = scale, a.dtype = dtype;
  return table->attention(&a, parallel_for);
}

int64_t paged_attention(ptr q, ptr k_pages, ptr v_pages, ptr out, ptr block_table, ptr cu_seqlens, ptr context_lens, int64_t T,
                        int64_t S, int64_t Hq, int64_t Hk, int64_t D, int64_t page_size, int64_t max_pages, int64_t n_pages,
                        float scale, int dtype) {
  AttentionArgs a = {};
  a.q = at<void>(q), a.k = at<void>(k_pages), a.v = at<void>(v_pages), a.out = at<void>(out);
  a.block_table = at<int32_t>(block_table), a.cu_seqlens = at<int32_t>(cu_seqlens), a.context_lens = at<int32_t>(context_lens);
  a.T = T, a.S = S, a.Hq = Hq, a.Hk = Hk, a.D = D, a.page_size = page_size, a.max_pages = max_pages, a.n_pages = n_pages;
  a.scale = scale, a.dtype = dtype;
  return table->attention(&a, parallel_for);
}

void attention_backward(ptr q, ptr k, ptr v, ptr out, ptr stats, ptr grad_out, ptr grad_q, ptr grad_k, ptr grad_v,
                        ptr cu_seqlens, int64_t S, int64_t Hq, int64_t Hk, int64_t D, float scale, int dtype) {
  AttentionArgs a = {};
  a.q = at<void>(q), a.k = at<void>(k), a.v = at<void>(v), a.out = at<void>(out), a.stats = at<float>(stats);
  a.grad_out = at<void>(grad_out), a.grad_q = at<void>(grad_q), a.grad_k = at<void>(grad_k), a.grad_v = at<void>(grad_v);
  a.cu_seqlens = at<int32_t>(cu_seqlens), a.S = S, a.Hq = Hq, a.Hk = Hk, a.D = D, a.scale = scale, a.dtype = dtype;
  table->attention_backward(&a, parallel_for);
}

int64_t logprob(ptr logits, ptr targets, ptr temperature, float one_temperature, ptr logprob, ptr entropy, ptr stats, int64_t N,
                int64_t V, int dtype) {
  LogprobArgs a = {};
  a.logits = at<void>(logits), a.targets = at<int64_t>(targets), a.temperature = at<float>(temperature);
  a.one_temperature = one_temperature, a.logprob = at<float>(logprob), a.entropy = at<float>(entropy),
  a.stats = at<float>(stats);
  a.N = N, a.V = V, a.dtype = dtype;
  return table->logprob(&a, parallel_for);
}

void logprob_backward(ptr logits, ptr targets, ptr temperature, float one_temperature, ptr entropy, ptr stats, ptr grad_logprob,
                      ptr grad_entropy, ptr grad_logits, ptr source, int64_t N, int64_t V, int dtype) {
  LogprobArgs a = {};
  a.logits = at<void>(logits), a.targets = at<int64_t>(targets), a.temperature = at<float>(temperature);
  a.one_temperature = one_temperature, a.entropy = at<float>(entropy), a.stats = at<float>(stats);
  a.grad_logprob = at<float>(grad_logprob), a.grad_entropy = at<float>(grad_entropy), a.grad_logits = at<void>(grad_logits);
  a.source = at<int64_t>(source), a.N = N, a.V = V, a.dtype = dtype;
  table->logprob_backward(&a, parallel_for);
}

LogprobArgs sample_args(ptr temperature, ptr top_k, ptr top_p, ptr min_p, ptr seed, ptr position, ptr token, ptr logprob,
                        ptr entropy, ptr counts, ptr stash, int64_t N, int64_t V, int dtype) {
  LogprobArgs a = {};
  a.temperature = at<float>(temperature), a.top_k = at<int32_t>(top_k), a.top_p = at<float>(top_p), a.min_p = at<float>(min_p);
  a.seed = at<int64_t>(seed), a.position = at<int64_t>(position), a.token = at<int64_t>(token), a.logprob = at<float>(logprob);
  a.entropy = at<float>(entropy), a.counts = at<int64_t>(counts), a.stash = at<int32_t *>(stash), a.N = N, a.V = V,
  a.dtype = dtype;
  return a;
}

int64_t sample(ptr logits, ptr temperature, ptr top_k, ptr top_p, ptr min_p, ptr seed, ptr position, ptr token, ptr logprob,
               ptr entropy, ptr counts, ptr stash, int64_t N, int64_t V, int dtype) {
  LogprobArgs a =
      sample_args(temperature, top_k, top_p, min_p, seed, position, token, logprob, entropy, counts, stash, N, V, dtype);
  a.logits = at<void>(logits);
  return table->sample(&a, parallel_for);
}

// Moves the kept ids of N rows, one after the other, to `ids`.
void take_kept(ptr counts, ptr stash, ptr ids, int64_t N) {
  int32_t *out = at<int32_t>(ids);
  for (int64_t n = 0; n < N; ++n) {
    const int64_t count = at<int64_t>(counts)[n];
    if (count == 0) continue;
    int32_t *from = at<int32_t *>(stash)[n];
    memcpy(out, from, (size_t)count * sizeof(int32_t));
    free(from);
    out += count;
  }
}

HeadArgs head_args(ptr hidden, ptr weight, ptr bias, int64_t N, int64_t H, int64_t V, int dtype, float softcap) {
  HeadArgs a = {};
  a.hidden = at<void>(hidden), a.weight = at<void>(weight), a.bias = at<void>(bias), a.N = N, a.H = H, a.V = V, a.dtype = dtype;
  a.softcap = softcap;
  return a;
}

// What is wrong with the values, or nothing.
std::string refusal(const HeadArgs &a) {
  auto number = [](auto x) { return std::to_string(x); };
  const std::string size = number(a.n_kept), last = number(a.V - 1);
  if (a.kept_offsets[0] != 0) return "kept_offsets[0] = " + number(a.kept_offsets[0]) + ", accepted is 0";
  for (int64_t n = 0; n < a.N; ++n) {
    const int64_t begin = a.kept_offsets[n], end = a.kept_offsets[n + 1], target = a.targets[n];
    const std::string row = "[" + number(n) + "] = ";
    if (end < begin || end > a.n_kept || (n == a.N - 1 && end != a.n_kept))
      return "kept_offsets[" + number(n + 1) + "] = " + number(end) + ", accepted is rising from 0 to len(kept_ids) = " + size;
    for (int64_t j = begin; j < end; ++j)
      if (a.kept_ids[j] < 0 || a.kept_ids[j] >= a.V || (j > begin && a.kept_ids[j] <= a.kept_ids[j - 1]))
        return "kept_ids[" + number(j) + "] = " + number(a.kept_ids[j]) + ", accepted is 0 to " + last +
               ", rising within a row";
    if (target < 0 || target >= a.V) return "targets" + row + number(target) + ", accepted is 0 to " + last;
    if (begin < end && !std::binary_search(a.kept_ids + begin, a.kept_ids + end, (int32_t)target))
      return "targets" + row + number(target) + ", accepted is one of the kept ids of its row";
    if (!(a.temperature[n] > 0)) return "temperature" + row + number(a.temperature[n]) + ", accepted is above 0";
  }
  if (a.N == 0 && a.n_kept) return "kept_ids has " + size + " entries, accepted is none for no rows";
  return "";
}

std::string sparse_logprob(ptr hidden, ptr weight, ptr bias, ptr targets, ptr kept_ids, ptr kept_offsets, ptr temperature,
                           ptr logprob, ptr entropy, ptr logits, ptr stats, int64_t N, int64_t H, int64_t V, int64_t n_kept,
                           int dtype, float softcap) {
  HeadArgs a = head_args(hidden, weight, bias, N, H, V, dtype, softcap);
  a.targets = at<int64_t>(targets), a.kept_ids = at<int32_t>(kept_ids), a.kept_offsets = at<int64_t>(kept_offsets);
  a.temperature = at<float>(temperature), a.logprob = at<float>(logprob), a.entropy = at<float>(entropy);
  a.logits = at<float>(logits), a.stats = at<float>(stats), a.n_kept = n_kept;
  const std::string bad = refusal(a);
  if (bad.empty()) table->sparse_logprob(&a, parallel_for, thread_count());
  return bad;
}

void sparse_backward(ptr hidden, ptr weight, ptr bias, ptr targets, ptr kept_ids, ptr kept_offsets, ptr temperature,
                     ptr entropy, ptr logits, ptr stats, ptr grad_logprob, ptr grad_entropy, ptr grad_hidden, ptr grad_weight,
                     ptr grad_bias, int64_t N, int64_t H, int64_t V, int64_t n_kept, int dtype, float softcap) {
  HeadArgs a = head_args(hidden, weight, bias, N, H, V, dtype, softcap);
  a.targets = at<int64_t>(targets), a.kept_ids = at<int32_t>(kept_ids), a.kept_offsets = at<int64_t>(kept_offsets);
  a.temperature = at<float>(temperature), a.entropy = at<float>(entropy), a.logits = at<float>(logits);
  a.stats = at<float>(stats), a.n_kept = n_kept, a.grad_logprob = at<float>(grad_logprob);
  a.grad_entropy = at<float>(grad_entropy), a.grad_hidden = at<void>(grad_hidden), a.grad_weight = at<void>(grad_weight);
  a.grad_bias = at<void>(grad_bias);
  table->sparse_backward(&a, parallel_for, thread_count());
}

int64_t linear_sample(ptr hidden, ptr weight, ptr bias, ptr temperature, ptr top_k, ptr top_p, ptr min_p, ptr seed,
                      ptr position, ptr token, ptr logprob, ptr entropy, ptr counts, ptr stash, int64_t N, int64_t H, int64_t V,
                      int dtype, float softcap) {
  const HeadArgs a = head_args(hidden, weight, bias, N, H, V, dtype, softcap);
  const LogprobArgs s =
      sample_args(temperature, top_k, top_p, min_p, seed, position, token, logprob, entropy, counts, stash, N, V, F32);
  return table->linear_sample(&a, &s, parallel_for, thread_count());
}

// What is wrong with the values, or nothing.
std::string advantages(ptr rewards, ptr group_ids, ptr roles, ptr scored, ptr baseline, ptr value, ptr counts, ptr flat,
                       ptr new_baseline, int64_t N, int64_t S, int64_t R, int method, double decay, bool wide) {
  const AdvantageArgs a = {at<void>(rewards),
                           at<int64_t>(group_ids),
                           at<int64_t>(roles),
                           at<bool>(scored),
                           at<float>(value),
                           at<int64_t>(counts),
                           at<bool>(flat),
                           at<double>(baseline),
                           at<double>(new_baseline),
                           N,
                           S,
                           R,
                           method,
                           decay,
                           wide};
  for (int64_t n = 0; n < N; ++n) {
    const std::string row = "[" + std::to_string(n) + "] = ";
    if (a.group_ids[n] < 0 || a.group_ids[n] >= S)
      return "group_ids" + row + std::to_string(a.group_ids[n]) + ", accepted is 0 to " + std::to_string(S - 1);
    if (a.roles && (a.roles[n] < 0 || a.roles[n] >= R))
      return "roles" + row + std::to_string(a.roles[n]) + ", accepted is 0 to " + std::to_string(R - 1);
  }
  group_advantages(&a);
  return "";
}

void uniforms(ptr seed, ptr position, ptr out, int64_t N, int64_t V) {
  LogprobArgs a = {};
  a.seed = at<int64_t>(seed), a.position = at<int64_t>(position), a.logprob = at<float>(out), a.N = N, a.V = V;
  table->uniforms(&a);
}

// sizes: V, L, T, N, S, H, I, Hq, Hk, D, page_size, max_pages, n_pages, max_position
DecoderArgs decoder_args(ptr layers, ptr embedding, ptr final_norm, ptr out, ptr token_ids, ptr wanted, ptr cos, ptr sin,
                         ptr positions, ptr slots, ptr block_table, ptr cu_seqlens, ptr context_lens, ptr sizes, float eps,
                         float scale, int dtype) {
  const int64_t *n = at<int64_t>(sizes);
  return {at<LayerTensors>(layers),
          at<void>(embedding),
          at<void>(final_norm),
          at<void>(out),
          at<int64_t>(token_ids),
          at<int64_t>(wanted),
          at<float>(cos),
          at<float>(sin),
          at<int64_t>(positions),
          at<int64_t>(slots),
          at<int32_t>(block_table),
          at<int32_t>(cu_seqlens),
          at<int32_t>(context_lens),
          n[0],
          n[1],
          n[2],
          n[3],
          n[4],
          n[5],
          n[6],
          n[7],
          n[8],
          n[9],
          n[10],
          n[11],
          n[12],
          n[13],
          eps,
          scale,
          dtype};
}

int64_t decoder(ptr layers, ptr embedding, ptr final_norm, ptr out, ptr token_ids, ptr wanted, ptr cos, ptr sin, ptr positions,
                ptr slots, ptr block_table, ptr cu_seqlens, ptr context_lens, ptr sizes, float eps, float scale, int dtype) {
  const DecoderArgs a = decoder_args(layers, embedding, final_norm, out, token_ids, wanted, cos, sin, positions, slots,
                                     block_table, cu_seqlens, context_lens, sizes, eps, scale, dtype);
  return table->decoder(&a, parallel_for, thread_count());
}

// Up to `steps` tokens for each of N sequences of one token to compute each, as many calls of `decoder` and `linear_sample`.
// positions, slots, next and context_lens advance with it; the drawn [steps, N] and what belongs to them are written a step
// after the other. Ends after a step in which some sequence drew one of its stops (stop_ids[stop_offsets[n]] on). Returns the
// steps made, or -1 when something is out of range.
int64_t decode_steps(const DecoderArgs &a, const HeadArgs &head, LogprobArgs draw, int64_t *slots, int64_t *positions,
                     int64_t *next, int64_t *token_ids, int32_t *context_lens, const int64_t *stop_ids,
                     const int64_t *stop_offsets, int64_t steps) {
  const int64_t N = a.N, size = a.page_size;
  for (int64_t step = 0; step < steps; ++step) {
    for (int64_t n = 0; n < N; ++n) {
      const int64_t at = positions[n];
      if (at < 0 || at / size >= a.max_pages) return -1;
      slots[n] = a.block_table[n * a.max_pages + at / size] * size + at % size;
      context_lens[n] = (int32_t)(at + 1), next[n] = at + 1;
    }
    if (table->decoder(&a, parallel_for, thread_count()) || table->linear_sample(&head, &draw, parallel_for, thread_count()))
      return -1;
    bool stopped = false;
    for (int64_t n = 0; n < N; ++n) {
      token_ids[n] = draw.token[n], ++positions[n];
      stopped |=
          std::find(stop_ids + stop_offsets[n], stop_ids + stop_offsets[n + 1], token_ids[n]) != stop_ids + stop_offsets[n + 1];
    }
    if (stopped) return step + 1;
    draw.token += N, draw.logprob += N, draw.entropy += N, draw.counts += N, draw.stash += N;
  }
  return steps;
}

// What `decoder` and `linear_sample` take; `out` [N, H] and `slots` are for use in between.
int64_t decode(ptr layers, ptr embedding, ptr final_norm, ptr out, ptr token_ids, ptr wanted, ptr cos, ptr sin, ptr positions,
               ptr slots, ptr block_table, ptr cu_seqlens, ptr context_lens, ptr sizes, float eps, float scale, int dtype,
               ptr weight, ptr temperature, ptr top_k, ptr top_p, ptr min_p, ptr seed, ptr next, ptr token, ptr logprob,
               ptr entropy, ptr counts, ptr stash, ptr stop_ids, ptr stop_offsets, int64_t steps) {
  const DecoderArgs a = decoder_args(layers, embedding, final_norm, out, token_ids, wanted, cos, sin, positions, slots,
                                     block_table, cu_seqlens, context_lens, sizes, eps, scale, dtype);
  const LogprobArgs draw =
      sample_args(temperature, top_k, top_p, min_p, seed, next, token, logprob, entropy, counts, stash, a.N, a.V, F32);
  const int64_t made = decode_steps(a, head_args(out, weight, 0, a.N, a.H, a.V, dtype, 0.0f), draw, at<int64_t>(slots),
                                    at<int64_t>(positions), at<int64_t>(next), at<int64_t>(token_ids),
                                    at<int32_t>(context_lens), at<int64_t>(stop_ids), at<int64_t>(stop_offsets), steps);
  for (int64_t i = 0; made < 0 && i < a.N * steps; ++i) // counts are zero where no step came
    if (draw.counts[i]) free(draw.stash[i]), draw.counts[i] = 0;
  return made;
}

bool use(const std::string &name) {
  const Table *found = name.empty() ? best_table() : find_table(name.c_str());
  if (found) table = found;
  return found != nullptr;
}

} // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "CPU kernels; called through duologue.kernels.ops";
  nb::call_guard<nb::gil_scoped_release> no_gil;
  m.def("linear", &linear, no_gil);
  m.def("matmul", &matmul, no_gil);
  m.def("rms_norm", &rms_norm, no_gil);
  m.def("rms_norm_backward", &rms_norm_backward, no_gil);
  m.def("silu_mul", &silu_mul, no_gil);
  m.def("silu_mul_backward", &silu_mul_backward, no_gil);
  m.def("rope", &rope, no_gil);
  m.def("write_kv", &write_kv, no_gil);
  m.def("packed_attention", &packed_attention, no_gil);
  m.def("paged_attention", &paged_attention, no_gil);
  m.def("attention_backward", &attention_backward, no_gil);
  m.def("logprob", &logprob, no_gil);
  m.def("logprob_backward", &logprob_backward, no_gil);
  m.def("sample", &sample, no_gil);
  m.def("decoder", &decoder, no_gil);
  m.def("decode", &decode, no_gil);
  m.def("uniforms", &uniforms, no_gil);
  m.def("take_kept", &take_kept, no_gil);
  m.def("sparse_logprob", &sparse_logprob, no_gil);
  m.def("sparse_backward", &sparse_backward, no_gil);
  m.def("linear_sample", &linear_sample, no_gil);
  m.def("group_advantages", &advantages, no_gil);
  m.def("use", &use, "Choose an instruction set by name ('' = the best); False when it cannot run here.");
  m.def("name", [] { return std::string(table->name); });
  m.def("threads", &thread_count);
  m.def("set_threads", &set_thread_count);
}
