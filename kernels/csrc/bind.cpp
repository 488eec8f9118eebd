// Python bindings, without logic of their own: plain integers in, because converting a tensor costs more than
// many of these calls. The contract (dtype, shape, contiguity) is checked in Python before it comes here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include "advantage.h"
#include "dispatch.h"
#include "support.h"
#include "threads.h"

namespace nb = nanobind;
typedef uintptr_t ptr;

namespace {

const Kernels *kernels = best_kernels();

template <class T> T *at(ptr p) {
  return reinterpret_cast<T *>(p);
}

void linear(ptr x, ptr w, ptr b, ptr out, int64_t M, int64_t O, int64_t K, int dtype, int out_dtype) {
  LinearArgs a = {at<void>(x), at<void>(w), at<void>(b), at<void>(out), M, O, K, dtype, out_dtype};
  kernels->linear(&a, parallel_for, thread_count());
}

void matmul(ptr a, ptr b, ptr c, int64_t I, int64_t R, int64_t C, int64_t stride_i, int64_t stride_r,
            bool add) {
  MatmulArgs m = {at<void>(a), at<void>(b), at<void>(c), I, R, C, stride_i, stride_r, add, F32, F32};
  kernels->matmul(&m, parallel_for, thread_count());
}

void matmul_bf16(ptr a, ptr b, ptr c, int64_t I, int64_t R, int64_t C, int64_t stride_i, int64_t stride_r,
                 bool add, int a_dtype, int c_dtype) {
  MatmulArgs m = {at<void>(a), at<void>(b), at<void>(c), I, R, C, stride_i, stride_r, add, a_dtype, c_dtype};
  kernels->matmul_bf16(&m, parallel_for, thread_count());
}

void tile_products(ptr a, ptr b, ptr c, int64_t n) {
  kernels->tile_products(at<void>(a), at<void>(b), at<float>(c), n);
}

void rms_norm(ptr x, ptr residual, ptr weight, ptr out, ptr total, int64_t rows, int64_t K, float eps,
              int dtype) {
  RowArgs a = {};
  a.x = at<void>(x), a.residual = at<void>(residual), a.weight = at<void>(weight), a.out = at<void>(out);
  a.total = at<void>(total), a.rows = rows, a.K = K, a.eps = eps, a.dtype = dtype;
  kernels->rms_norm(&a, parallel_for);
}

void rms_norm_backward(ptr x, ptr weight, ptr grad, ptr grad_total, ptr grad_x, ptr grad_weight, int64_t rows,
                       int64_t K, float eps, int dtype) {
  RowArgs a = {};
  a.x = at<void>(x), a.weight = at<void>(weight), a.grad = at<void>(grad), a.residual = at<void>(grad_total);
  a.grad_x = at<void>(grad_x), a.grad_weight = at<float>(grad_weight), a.rows = rows, a.K = K, a.eps = eps,
  a.dtype = dtype;
  kernels->rms_norm_backward(&a, parallel_for);
}

void silu_mul(ptr gate, ptr up, ptr out, int64_t rows, int64_t K, int dtype) {
  RowArgs a = {};
  a.x = at<void>(gate), a.weight = at<void>(up), a.out = at<void>(out), a.rows = rows, a.K = K,
  a.dtype = dtype;
  kernels->silu_mul(&a, parallel_for);
}

void silu_mul_backward(ptr gate, ptr up, ptr grad, ptr grad_gate, ptr grad_up, int64_t rows, int64_t K,
                       int dtype) {
  RowArgs a = {};
  a.x = at<void>(gate), a.weight = at<void>(up), a.grad = at<void>(grad), a.grad_x = at<void>(grad_gate);
  a.out = at<void>(grad_up), a.rows = rows, a.K = K, a.dtype = dtype;
  kernels->silu_mul_backward(&a, parallel_for);
}

int64_t rope(ptr x, ptr out, ptr cos, ptr sin, ptr positions, int64_t T, int64_t H, int64_t D,
             int64_t max_position, float sign, int dtype) {
  RopeArgs a = {at<void>(x), at<void>(out), at<float>(cos), at<float>(sin), at<int64_t>(positions), T, H,
                D,           max_position,  sign,           dtype};
  return kernels->rope(&a, parallel_for);
}

int64_t write_kv(ptr k, ptr v, ptr k_pages, ptr v_pages, ptr slots, int64_t T, int64_t n_slots,
                 int64_t row_bytes) {
  KvArgs a = {at<void>(k),        at<void>(v), at<void>(k_pages), at<void>(v_pages),
              at<int64_t>(slots), T,           n_slots,           row_bytes};
  return kernels->write_kv(&a, parallel_for);
}

int64_t packed_attention(ptr q, ptr k, ptr v, ptr out, ptr stats, ptr cu_seqlens, int64_t T, int64_t S,
                         int64_t Hq, int64_t Hk, int64_t D, float scale, int dtype) {
  AttentionArgs a = {};
  a.q = at<void>(q), a.k = at<void>(k), a.v = at<void>(v), a.out = at<void>(out), a.stats = at<float>(stats);
  a.cu_seqlens = at<int32_t>(cu_seqlens), a.T = T, a.S = S, a.Hq = Hq, a.Hk = Hk, a.D = D, a.scale = scale,
  a.dtype = dtype;
  return kernels->attention(&a, parallel_for);
}

int64_t paged_attention(ptr q, ptr k_pages, ptr v_pages, ptr out, ptr block_table, ptr cu_seqlens,
                        ptr context_lens, int64_t T, int64_t S, int64_t Hq, int64_t Hk, int64_t D,
                        int64_t page_size, int64_t max_pages, int64_t n_pages, float scale, int dtype) {
  AttentionArgs a = {};
  a.q = at<void>(q), a.k = at<void>(k_pages), a.v = at<void>(v_pages), a.out = at<void>(out);
  a.block_table = at<int32_t>(block_table), a.cu_seqlens = at<int32_t>(cu_seqlens),
  a.context_lens = at<int32_t>(context_lens);
  a.T = T, a.S = S, a.Hq = Hq, a.Hk = Hk, a.D = D, a.page_size = page_size, a.max_pages = max_pages,
  a.n_pages = n_pages;
  a.scale = scale, a.dtype = dtype;
  return kernels->attention(&a, parallel_for);
}

void attention_backward(ptr q, ptr k, ptr v, ptr out, ptr stats, ptr grad_out, ptr grad_q, ptr grad_k,
                        ptr grad_v, ptr cu_seqlens, int64_t S, int64_t Hq, int64_t Hk, int64_t D, float scale,
                        int dtype) {
  AttentionArgs a = {};
  a.q = at<void>(q), a.k = at<void>(k), a.v = at<void>(v), a.out = at<void>(out), a.stats = at<float>(stats);
  a.grad_out = at<void>(grad_out), a.grad_q = at<void>(grad_q), a.grad_k = at<void>(grad_k),
  a.grad_v = at<void>(grad_v);
  a.cu_seqlens = at<int32_t>(cu_seqlens), a.S = S, a.Hq = Hq, a.Hk = Hk, a.D = D, a.scale = scale,
  a.dtype = dtype;
  kernels->attention_backward(&a, parallel_for);
}

int64_t logprob(ptr logits, ptr targets, ptr temperature, float one_temperature, ptr logprob, ptr entropy,
                ptr stats, int64_t N, int64_t V, int dtype) {
  LogprobArgs a = {};
  a.logits = at<void>(logits), a.targets = at<int64_t>(targets), a.temperature = at<float>(temperature);
  a.one_temperature = one_temperature, a.logprob = at<float>(logprob), a.entropy = at<float>(entropy),
  a.stats = at<float>(stats);
  a.N = N, a.V = V, a.dtype = dtype;
  return kernels->logprob(&a, parallel_for);
}

void logprob_backward(ptr logits, ptr targets, ptr temperature, float one_temperature, ptr entropy, ptr stats,
                      ptr grad_logprob, ptr grad_entropy, ptr grad_logits, ptr source, int64_t N, int64_t V,
                      int dtype) {
  LogprobArgs a = {};
  a.logits = at<void>(logits), a.targets = at<int64_t>(targets), a.temperature = at<float>(temperature);
  a.one_temperature = one_temperature, a.entropy = at<float>(entropy), a.stats = at<float>(stats);
  a.grad_logprob = at<float>(grad_logprob), a.grad_entropy = at<float>(grad_entropy),
  a.grad_logits = at<void>(grad_logits);
  a.source = at<int64_t>(source), a.N = N, a.V = V, a.dtype = dtype;
  kernels->logprob_backward(&a, parallel_for);
}

LogprobArgs sample_args(ptr temperature, ptr top_k, ptr top_p, ptr min_p, ptr seed, ptr position, ptr token,
                        ptr logprob, ptr entropy, ptr counts, ptr stash, int64_t N, int64_t V, int dtype) {
  LogprobArgs a = {};
  a.temperature = at<float>(temperature), a.top_k = at<int32_t>(top_k), a.top_p = at<float>(top_p),
  a.min_p = at<float>(min_p);
  a.seed = at<int64_t>(seed), a.position = at<int64_t>(position), a.token = at<int64_t>(token),
  a.logprob = at<float>(logprob);
  a.entropy = at<float>(entropy), a.counts = at<int64_t>(counts), a.stash = at<int32_t *>(stash), a.N = N,
  a.V = V, a.dtype = dtype;
  return a;
}

int64_t sample(ptr logits, ptr temperature, ptr top_k, ptr top_p, ptr min_p, ptr seed, ptr position,
               ptr token, ptr logprob, ptr entropy, ptr counts, ptr stash, int64_t N, int64_t V, int dtype) {
  LogprobArgs a = sample_args(temperature, top_k, top_p, min_p, seed, position, token, logprob, entropy,
                              counts, stash, N, V, dtype);
  a.logits = at<void>(logits);
  return kernels->sample(&a, parallel_for);
}

void take_kept(ptr counts, ptr stash, ptr ids, int64_t N) {
  take_supports(at<int64_t>(counts), at<int32_t *>(stash), N, at<int32_t>(ids));
}

HeadArgs head_args(ptr hidden, ptr weight, ptr bias, int64_t N, int64_t H, int64_t V, int dtype,
                   float softcap) {
  HeadArgs a = {};
  a.hidden = at<void>(hidden), a.weight = at<void>(weight), a.bias = at<void>(bias), a.N = N, a.H = H,
  a.V = V, a.dtype = dtype;
  a.softcap = softcap;
  return a;
}

std::string sparse_logprob(ptr hidden, ptr weight, ptr bias, ptr targets, ptr kept_ids, ptr kept_offsets,
                           ptr temperature, ptr logprob, ptr entropy, ptr logits, ptr stats, int64_t N,
                           int64_t H, int64_t V, int64_t n_kept, int dtype, float softcap) {
  HeadArgs a = head_args(hidden, weight, bias, N, H, V, dtype, softcap);
  a.targets = at<int64_t>(targets), a.kept_ids = at<int32_t>(kept_ids),
  a.kept_offsets = at<int64_t>(kept_offsets);
  a.temperature = at<float>(temperature), a.logprob = at<float>(logprob), a.entropy = at<float>(entropy);
  a.logits = at<float>(logits), a.stats = at<float>(stats), a.n_kept = n_kept;
  const std::string error = check_supports(&a);
  if (error.empty()) kernels->sparse_logprob(&a, parallel_for, thread_count());
  return error;
}

void sparse_backward(ptr hidden, ptr weight, ptr bias, ptr targets, ptr kept_ids, ptr kept_offsets,
                     ptr temperature, ptr entropy, ptr logits, ptr stats, ptr grad_logprob, ptr grad_entropy,
                     ptr grad_hidden, ptr grad_weight, ptr grad_bias, int64_t N, int64_t H, int64_t V,
                     int64_t n_kept, int dtype, float softcap) {
  HeadArgs a = head_args(hidden, weight, bias, N, H, V, dtype, softcap);
  a.targets = at<int64_t>(targets), a.kept_ids = at<int32_t>(kept_ids),
  a.kept_offsets = at<int64_t>(kept_offsets);
  a.temperature = at<float>(temperature), a.entropy = at<float>(entropy), a.logits = at<float>(logits);
  a.stats = at<float>(stats), a.n_kept = n_kept, a.grad_logprob = at<float>(grad_logprob);
  a.grad_entropy = at<float>(grad_entropy), a.grad_hidden = at<void>(grad_hidden),
  a.grad_weight = at<void>(grad_weight);
  a.grad_bias = at<void>(grad_bias);
  kernels->sparse_backward(&a, parallel_for, thread_count());
}

int64_t linear_sample(ptr hidden, ptr weight, ptr bias, ptr temperature, ptr top_k, ptr top_p, ptr min_p,
                      ptr seed, ptr position, ptr token, ptr logprob, ptr entropy, ptr counts, ptr stash,
                      int64_t N, int64_t H, int64_t V, int dtype, float softcap) {
  const HeadArgs a = head_args(hidden, weight, bias, N, H, V, dtype, softcap);
  const LogprobArgs s = sample_args(temperature, top_k, top_p, min_p, seed, position, token, logprob, entropy,
                                    counts, stash, N, V, F32);
  return kernels->linear_sample(&a, &s, parallel_for, thread_count());
}

std::string advantages(ptr rewards, ptr group_ids, ptr roles, ptr scored, ptr baseline, ptr value, ptr counts,
                       ptr flat, ptr new_baseline, int64_t N, int64_t S, int64_t R, int method, double decay,
                       bool wide) {
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
  return group_advantages(&a);
}

void uniforms(ptr seed, ptr position, ptr out, int64_t N, int64_t V) {
  LogprobArgs a = {};
  a.seed = at<int64_t>(seed), a.position = at<int64_t>(position), a.logprob = at<float>(out), a.N = N,
  a.V = V;
  kernels->uniforms(&a);
}

// sizes: a DecoderSizes
DecoderArgs decoder_args(ptr layers, ptr embedding, ptr final_norm, ptr out, ptr token_ids, ptr wanted,
                         ptr cos, ptr sin, ptr positions, ptr slots, ptr block_table, ptr cu_seqlens,
                         ptr context_lens, ptr sizes, float eps, float scale, int dtype) {
  return {*at<DecoderSizes>(sizes),
          at<LayerTensors>(layers),
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
          eps,
          scale,
          dtype};
}

int64_t decoder(ptr layers, ptr embedding, ptr final_norm, ptr out, ptr token_ids, ptr wanted, ptr cos,
                ptr sin, ptr positions, ptr slots, ptr block_table, ptr cu_seqlens, ptr context_lens,
                ptr sizes, float eps, float scale, int dtype) {
  const DecoderArgs a =
      decoder_args(layers, embedding, final_norm, out, token_ids, wanted, cos, sin, positions, slots,
                   block_table, cu_seqlens, context_lens, sizes, eps, scale, dtype);
  return kernels->decoder(&a, parallel_for, thread_count());
}

// What `decoder` and `linear_sample` take; `out` [N, H] and `slots` are for use in between.
int64_t decode(ptr layers, ptr embedding, ptr final_norm, ptr out, ptr token_ids, ptr wanted, ptr cos,
               ptr sin, ptr positions, ptr slots, ptr block_table, ptr cu_seqlens, ptr context_lens,
               ptr sizes, float eps, float scale, int dtype, ptr weight, ptr temperature, ptr top_k,
               ptr top_p, ptr min_p, ptr seed, ptr next, ptr token, ptr logprob, ptr entropy, ptr counts,
               ptr stash, ptr stop_ids, ptr stop_offsets, int64_t steps) {
  const DecoderArgs a =
      decoder_args(layers, embedding, final_norm, out, token_ids, wanted, cos, sin, positions, slots,
                   block_table, cu_seqlens, context_lens, sizes, eps, scale, dtype);
  const DecodeArgs d = {a,
                        head_args(out, weight, 0, a.N, a.H, a.V, dtype, 0.0f),
                        sample_args(temperature, top_k, top_p, min_p, seed, next, token, logprob, entropy,
                                    counts, stash, a.N, a.V, F32),
                        at<int64_t>(token_ids),
                        at<int64_t>(positions),
                        at<int64_t>(slots),
                        at<int64_t>(next),
                        at<int32_t>(context_lens),
                        at<int64_t>(stop_ids),
                        at<int64_t>(stop_offsets),
                        steps};
  return kernels->decode(&d, parallel_for, thread_count());
}

bool use(const std::string &name) {
  const Kernels *chosen = name.empty() ? best_kernels() : find_kernels(name.c_str());
  if (chosen) kernels = chosen;
  return chosen != nullptr;
}

} // namespace

NB_MODULE(_cpu, m) {
  m.doc() = "CPU kernels; called through duologue.kernels.ops";
  nb::call_guard<nb::gil_scoped_release> no_gil;
  m.def("linear", &linear, no_gil);
  m.def("matmul", &matmul, no_gil);
  m.def("matmul_bf16", &matmul_bf16, no_gil);
  m.def("tile_products", &tile_products, no_gil);
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
  m.def("name", [] { return std::string(kernels->name); });
  m.def("multiplies_bf16", [] { return kernels->matmul_bf16 != nullptr; });
  m.def("refused", [] { return std::string(refused_tiles()); });
  m.def("threads", &thread_count);
  m.def("set_threads", &set_thread_count);
}
