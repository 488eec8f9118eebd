#include "table.h"

#include <stdlib.h>

#include "vec.inc"

#include "native.inc"

#include "linear.inc"
#include "matmul.inc"
#include "rows.inc"

#include "attention.inc"
#include "softmax.inc"
#include "sparse.inc"

#include "decoder.inc"

extern const Table table_generic;
const Table table_generic = {
    "generic", linear,         matmul,          rms_norm,           rms_norm_backward, silu_mul,         silu_mul_backward,
    rope,      write_kv,       attention,       attention_backward, logprob,           logprob_backward, sample,
    uniforms,  sparse_logprob, sparse_backward, linear_sample,      decoder,
};
