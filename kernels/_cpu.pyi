"""Types of the C++ library; pointers are integers (tensor.data_ptr()). Called by duologue.kernels.ops."""

def linear(x: int, w: int, b: int, out: int, M: int, O: int, K: int, dtype: int, out_dtype: int) -> None: ...
def matmul(
    a: int, b: int, c: int, I: int, R: int, C: int, stride_i: int, stride_r: int, add: bool
) -> None: ...
def matmul_bf16(
    a: int,
    b: int,
    c: int,
    I: int,
    R: int,
    C: int,
    stride_i: int,
    stride_r: int,
    add: bool,
    a_dtype: int,
    c_dtype: int,
) -> None: ...
def tile_products(a: int, b: int, c: int, n: int) -> None: ...
def rms_norm(
    x: int, residual: int, weight: int, out: int, total: int, rows: int, K: int, eps: float, dtype: int
) -> None: ...
def rms_norm_backward(
    x: int,
    weight: int,
    grad: int,
    grad_total: int,
    grad_x: int,
    grad_weight: int,
    rows: int,
    K: int,
    eps: float,
    dtype: int,
) -> None: ...
def silu_mul(gate: int, up: int, out: int, rows: int, K: int, dtype: int) -> None: ...
def silu_mul_backward(
    gate: int, up: int, grad: int, grad_gate: int, grad_up: int, rows: int, K: int, dtype: int
) -> None: ...
def rope(
    x: int,
    out: int,
    cos: int,
    sin: int,
    positions: int,
    T: int,
    H: int,
    D: int,
    max_position: int,
    sign: float,
    dtype: int,
) -> int: ...
def write_kv(
    k: int, v: int, k_pages: int, v_pages: int, slots: int, T: int, n_slots: int, row_bytes: int
) -> int: ...
def packed_attention(
    q: int,
    k: int,
    v: int,
    out: int,
    stats: int,
    cu_seqlens: int,
    T: int,
    S: int,
    Hq: int,
    Hk: int,
    D: int,
    scale: float,
    dtype: int,
) -> int: ...
def paged_attention(
    q: int,
    k_pages: int,
    v_pages: int,
    out: int,
    block_table: int,
    cu_seqlens: int,
    context_lens: int,
    T: int,
    S: int,
    Hq: int,
    Hk: int,
    D: int,
    page_size: int,
    max_pages: int,
    n_pages: int,
    scale: float,
    dtype: int,
) -> int: ...
def attention_backward(
    q: int,
    k: int,
    v: int,
    out: int,
    stats: int,
    grad_out: int,
    grad_q: int,
    grad_k: int,
    grad_v: int,
    cu_seqlens: int,
    S: int,
    Hq: int,
    Hk: int,
    D: int,
    scale: float,
    dtype: int,
) -> None: ...
def logprob(
    logits: int,
    targets: int,
    temperature: int,
    one_temperature: float,
    logprob: int,
    entropy: int,
    stats: int,
    N: int,
    V: int,
    dtype: int,
) -> int: ...
def logprob_backward(
    logits: int,
    targets: int,
    temperature: int,
    one_temperature: float,
    entropy: int,
    stats: int,
    grad_logprob: int,
    grad_entropy: int,
    grad_logits: int,
    source: int,
    N: int,
    V: int,
    dtype: int,
) -> None: ...
def sample(
    logits: int,
    temperature: int,
    top_k: int,
    top_p: int,
    min_p: int,
    seed: int,
    position: int,
    token: int,
    logprob: int,
    entropy: int,
    counts: int,
    stash: int,
    N: int,
    V: int,
    dtype: int,
) -> int: ...
def take_kept(counts: int, stash: int, ids: int, N: int) -> None: ...
def sparse_logprob(*pointers_sizes_dtype_softcap: float) -> str: ...
def sparse_backward(*pointers_sizes_dtype_softcap: float) -> None: ...
def linear_sample(*pointers_sizes_dtype_softcap: float) -> int: ...
def group_advantages(*pointers_sizes_method_decay_wide: float) -> str: ...
def decoder(*pointers_eps_scale_dtype: float) -> int: ...
def decode(*pointers_eps_scale_dtype_pointers_steps: float) -> int: ...
def uniforms(seed: int, position: int, out: int, N: int, V: int) -> None: ...
def use(name: str) -> bool: ...
def name() -> str: ...
def multiplies_bf16() -> bool: ...
def refused() -> str: ...
def threads() -> int: ...
def set_threads(n: int) -> None: ...
