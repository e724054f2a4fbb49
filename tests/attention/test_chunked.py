"""Attention in chunks, and fused calls cut by kernels' limits: the same as whole, and no copies."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from formulas import assert_agree, formula, line, line_bias, some, tokens, triple
from peak import Peak
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from axialtrain.attention import chunked
from axialtrain.attention.axis import attend
from axialtrain.attention.chunked import attend_in_chunks, products_dtype
from axialtrain.attention.kernels import LIMITS, Limits, kernel_for, lines_at_a_time

SHAPE = (2, 3, 5, 2, 4)  # B, H, W, N, K
DIMS = pytest.mark.parametrize("dim", [2, 1], ids=["rows", "columns"])
CHUNK = "axialtrain.attention.lines.CHUNK"
WORTH = "axialtrain.attention.compact.WORTH"  # 0: masks never compact lines


def prefix_of(shape: tuple[int, ...] = SHAPE) -> tuple[Tensor, Tensor]:
    return tokens(shape[0], 3, *shape[3:], seed=7), tokens(shape[0], 3, *shape[3:], seed=8)


@pytest.mark.parametrize("chunk", [1, 35, 170, 2**22], ids=["a query", "queries", "lines", "all"])
@DIMS
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("with_prefix", [False, True], ids=["no prefix", "prefix"])
def test_chunks_are_the_formula_and_its_gradients(monkeypatch, with_prefix, masked, dim, chunk):
    monkeypatch.setattr(CHUNK, chunk)
    monkeypatch.setattr(WORTH, 0.0)
    q, k, v = triple(*SHAPE)
    mask = some(*SHAPE[:3]) if masked else None
    prefix = prefix_of() if with_prefix else None
    part = q.narrow(dim, 1, 2)  # queries that are a part of the line
    got = attend(part, k, v, dim, key_mask=mask, prefix=prefix, scale=0.3, kernel="chunks")
    at = (0, 1) if dim == 2 else (1, 0)
    want = formula(part, k, v, line(dim), at=at, mask=mask, prefix=prefix, scale=0.3)
    assert_agree(got, want, q, k, v, *(prefix or ()))


@DIMS
@pytest.mark.parametrize("chunk", [1, 2**22], ids=["a query", "all"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
def test_gradcheck(monkeypatch, biased, chunk, dim):
    monkeypatch.setattr(CHUNK, chunk)
    q, k, v = triple(1, 2, 3, 2, 2)
    table = tokens(2, 3, seed=5)  # shorter than a line
    mask = torch.tensor([[[True, False, True], [False, False, False]]])

    def run(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        bias = table if biased else None
        return attend(q, k, v, dim, key_mask=mask, bias=bias, kernel="chunks")

    given = (q, k, v, table if biased else table.detach())
    assert torch.autograd.gradcheck(run, given)


@pytest.fixture
def no_bf16(monkeypatch):
    """A CPU without arithmetic in bf16."""
    monkeypatch.setattr(chunked, "CPU", {})


@pytest.fixture
def bf16(monkeypatch):
    """One that says it has it: products are in bf16 on every machine, only slower on some."""
    monkeypatch.setattr(chunked, "CPU", {"avx512_bf16": True})


@DIMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_16_bits_are_rounded_once(masked, dtype, dim, no_bf16):
    """Computed in fp32: nothing but the results is rounded."""
    given = [x.detach().to(dtype).requires_grad_() for x in triple(*SHAPE)]
    mask = some(*SHAPE[:3]) if masked else None
    out = attend(*given, dim, key_mask=mask)
    weight = torch.ones_like(out)
    grads = torch.autograd.grad(out, given, weight)
    exact = [x.detach().double().requires_grad_() for x in given]
    want = formula(*exact, line(dim), mask=mask)
    wanted = torch.autograd.grad(want, exact, weight.double())
    eps = torch.finfo(dtype).eps
    for one, other in zip((out, *grads), (want, *wanted), strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one.double(), other, rtol=eps, atol=1e-6 + 0.01 * eps)


@DIMS
@pytest.mark.parametrize("shape", [SHAPE, (1, 24, 40, 2, 64)], ids=["small", "large"])
@pytest.mark.parametrize("lines", [0.4, 2.0, 100.0], ids=["queries", "lines", "all"])
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_in_bf16_weights_are_rounded_before_their_products_and_nothing_else(
    masked, lines, shape, dim, bf16, monkeypatch
):
    """Bounds to which rounding to the nearest keeps, entry by entry, whatever the numbers are.

    With logits in bf16, as the plain formula has them, results are outside of them. Large products
    are those that torch gives to oneDNN.
    """
    monkeypatch.setattr(CHUNK, int(lines * shape[3] * shape[dim] ** 2))
    monkeypatch.setattr(WORTH, 0.0)
    # A scale that makes logits large; half of bf16's last digit.
    scale, half = 6.0 * shape[4] ** -0.5, 2.0**-8
    given = [x.detach().bfloat16().requires_grad_() for x in triple(*shape)]
    mask = some(*shape[:3]) if masked else None
    weight = tokens(*shape, seed=9).detach().bfloat16()
    out = attend(*given, dim, key_mask=mask, scale=scale, kernel="chunks")
    found = (out, *torch.autograd.grad(out, given, weight))

    exact = [x.detach().double().requires_grad_() for x in given]
    # [B, X, N, L, K] each: lines along memory. The formula of other tests is slow for many tokens.
    q, k, v, g = (
        (x if dim == 2 else x.transpose(1, 2)).transpose(2, 3) for x in (*exact, weight.double())
    )
    logits = scale * q @ k.transpose(-1, -2)
    if mask is not None:
        keys = (mask if dim == 2 else mask.transpose(1, 2))[:, :, None, None]
        logits = logits.masked_fill(~keys, -torch.inf)
        logits = logits.masked_fill(~keys.any(-1, keepdim=True), 0.0)
    weights = logits.softmax(-1)
    if mask is not None:  # a line without a key gives zeros
        weights = weights * keys.any(-1, keepdim=True)
    want = (weights @ v).transpose(2, 3)
    want = want if dim == 2 else want.transpose(1, 2)
    wanted = (want, *torch.autograd.grad(want, exact, weight.double(), retain_graph=True))
    if shape is SHAPE:
        assert_agree(want, formula(*exact, line(dim), mask=mask, scale=scale), *exact)
    slopes = g @ v.transpose(-1, -2)
    slopes = (weights * (slopes - (weights * slopes).sum(-1, keepdim=True))).abs()
    sums = (
        weights @ v.abs(),
        scale * slopes @ k.abs(),
        scale * slopes.transpose(-1, -2) @ q.abs(),
        weights.transpose(-1, -2) @ g.abs(),
    )
    # Of keys and values, what each chunk of queries gives is rounded before it is added up.
    partial = lines < 1
    for i, (one, other, rounded) in enumerate(zip(found, wanted, sums, strict=True)):
        bound = rounded.transpose(2, 3)
        bound = bound if dim == 2 else bound.transpose(1, 2)
        bound = half * bound * (2.0 if partial and i > 1 else 1.0)
        bound = bound + half * (other.abs() + bound) + 1e-5
        assert one.dtype is torch.bfloat16
        assert ((one.double() - other).abs() <= bound).all()


class Products(TorchDispatchMode):
    """Counts batched products by the dtype of what they multiply."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[torch.dtype] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (torch.ops.aten.bmm, torch.ops.aten.baddbmm):
            *_, one, other = args
            assert one.dtype is other.dtype
            self.counts[one.dtype] += 1
        return func(*args, **(kwargs or {}))


@DIMS
@pytest.mark.parametrize(("able", "narrow"), [("bf16", 4), ("no_bf16", 0)], ids=["bf16", "no bf16"])
def test_four_of_seven_products_are_in_bf16(able, narrow, dim, request):
    request.getfixturevalue(able)
    given = [x.detach().bfloat16().requires_grad_() for x in triple(*SHAPE)]
    with Products() as seen:
        torch.autograd.grad(attend(*given, dim).sum(), given)
    assert seen.counts == Counter({torch.bfloat16: narrow, torch.float32: 7 - narrow})


@DIMS
@pytest.mark.parametrize("dtypes", ["bf16 fp32 fp32", "bf16 fp32 bf16", "bf16 bf16 fp32", "prefix"])
def test_where_dtypes_differ_nothing_but_results_is_rounded(dtypes, dim, bf16):
    """Forward and backward take the same numbers, whatever the CPU calculates in."""
    names = {"bf16": torch.bfloat16, "fp32": torch.float32}
    prefix = (
        [x.detach().float().requires_grad_() for x in prefix_of()] if dtypes == "prefix" else []
    )
    kinds = ["bf16"] * 3 if prefix else dtypes.split()
    given = [
        (4 * x.detach()).to(names[kind]).requires_grad_()
        for x, kind in zip(triple(*SHAPE), kinds, strict=True)
    ]
    weight = tokens(*SHAPE, seed=9).detach().bfloat16()
    out = attend(*given, dim, prefix=tuple(prefix) or None, kernel="chunks")
    found = (out, *torch.autograd.grad(out, (*given, *prefix), weight))
    exact = [x.detach().double().requires_grad_() for x in (*given, *prefix)]
    want = formula(*exact[:3], line(dim), prefix=tuple(exact[3:]) or None)
    wanted = (want, *torch.autograd.grad(want, exact, weight.double()))
    for one, other in zip(found, wanted, strict=True):
        close = {torch.bfloat16: 2.0**-8, torch.float32: 1e-5}[one.dtype]
        torch.testing.assert_close(one.double(), other, rtol=close, atol=2e-5)


def test_what_chunks_of_queries_give_is_added_up_in_fp32(bf16):
    """600 halves: in bf16 they would stay at 128, to which a half adds nothing."""
    q = torch.zeros(1, 1, 600, 1, 2, dtype=torch.bfloat16)
    k = torch.zeros(1, 1, 2, 1, 2, dtype=torch.bfloat16)
    v = k.clone().requires_grad_()
    out = attend_in_chunks(q, k, v, mask=None, bias=None, scale=1.0, chunk=2)
    (got,) = torch.autograd.grad(out.sum(), v)
    assert torch.equal(got, torch.full_like(got, 300.0))


def test_compiled_products_in_bf16_are_one_graph_with_the_same_bits(bf16):
    given = [x.detach().bfloat16().requires_grad_() for x in triple(*SHAPE)]
    weight = tokens(*SHAPE, seed=9).detach().bfloat16()

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, 2, kernel="chunks")

    torch.compiler.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for one, other in zip(
        *(
            (out, *torch.autograd.grad(out, given, weight))
            for out in (compiled(*given), run(*given))
        ),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_products_are_in_bf16_where_the_cpu_says_so(monkeypatch):
    narrow, wide = torch.bfloat16, torch.float32
    one = torch.empty(1)
    for able, dtype in (({}, wide), ({"avx512_bf16": True}, narrow), ({"amx_bf16": True}, narrow)):
        monkeypatch.setattr(chunked, "CPU", able)
        assert products_dtype(one.bfloat16()) is dtype
        assert products_dtype(one.half()) is wide
        assert products_dtype(one) is wide
        assert products_dtype(one.double()) is torch.float64
        assert products_dtype(one.bfloat16().to("meta")) is wide


@DIMS
@pytest.mark.parametrize("kind", ["bf16", "bias", "masked"])
def test_a_second_run_is_bit_equal(kind, dim):
    dtype = torch.bfloat16 if kind == "bf16" else torch.float32
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in triple(2, 33, 40, 2, 8))
    table = tokens(2, 79, seed=5).detach().to(dtype).requires_grad_()
    mask = some(2, 33, 40, share=0.3) if kind == "masked" else None
    given = (q, k, v, table) if kind == "bias" else (q, k, v)
    bias = table if kind == "bias" else None

    def run() -> tuple[Tensor, ...]:
        out = attend(q, k, v, dim, key_mask=mask, query_mask=mask, bias=bias)
        return out, *torch.autograd.grad(out.float().square().sum(), given)

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


LOW = [
    pytest.param(Limits(batch=2, heads=10**6, elements=10**9), id="batch"),
    pytest.param(Limits(batch=10**6, heads=5, elements=10**9), id="heads"),
    pytest.param(Limits(batch=10**6, heads=10**6, elements=100), id="elements"),
    pytest.param(Limits(batch=1, heads=1, elements=1), id="all"),
]


@pytest.mark.parametrize("limits", LOW)
@DIMS
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("with_prefix", [False, True], ids=["no prefix", "prefix"])
def test_limits_of_kernels_change_nothing(monkeypatch, with_prefix, masked, dim, limits):
    monkeypatch.setattr(WORTH, 0.0)
    q, k, v = triple(*SHAPE)
    mask = some(*SHAPE[:3]) if masked else None
    prefix = prefix_of() if with_prefix else None
    whole = attend(q, k, v, dim, key_mask=mask, prefix=prefix)
    monkeypatch.setitem(LIMITS, "cpu", limits)
    calls = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, **options):
        calls.append(k.shape)
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    got = attend(q, k, v, dim, key_mask=mask, prefix=prefix)
    assert_agree(got, whole, q, k, v, *(prefix or ()), tolerance=1e-13)
    for batch, heads, length, width in calls:  # within the limits, or a single line
        assert batch <= limits.batch
        assert heads <= max(limits.heads, SHAPE[3])
        assert batch * heads * length * width <= max(limits.elements, SHAPE[3] * length * width)


def test_what_a_gpu_takes_in_one_call():
    """A 2048 x 2048 grid with N = 8, K = 64 stands just above the limit of flash's backward."""
    q = torch.empty(1, 2048, 2048, 8, 64, device="meta")
    LIMITS["meta"] = LIMITS["cuda"]
    try:
        assert lines_at_a_time(q, q, across=False) == (1, 2047)
        assert lines_at_a_time(q, q, across=True) == (1, 2047)
        many = torch.empty(2, 20_000, 16, 8, 64, device="meta")
        assert lines_at_a_time(many, many, across=True) == (2, 8191)  # 65,528 heads
        many = torch.empty(2, 40_000, 16, 8, 64, device="meta")
        assert lines_at_a_time(many, many, across=False) == (1, 40_000)  # of 65,535 in the batch
    finally:
        del LIMITS["meta"]


def test_the_kernel_of_each_dtype_and_device(no_bf16):
    wide, narrow = torch.empty(1, 2, 3, 1, 4), torch.empty(1, 2, 3, 1, 4, dtype=torch.bfloat16)
    assert kernel_for(wide, wide) == "fused"
    assert kernel_for(narrow, narrow) == "chunks"
    for keys, kernel in ((2**14, "chunks"), (2**14 + 1, "fused")):
        long = narrow[:, :1, :1].expand(1, 1, keys, 2, 4)
        assert kernel_for(narrow, long) == kernel
    assert kernel_for(narrow.to("meta"), narrow.to("meta")) == "fused"
    assert kernel_for(narrow, narrow, "fused") == "fused"
    assert kernel_for(wide, wide, "chunks") == "chunks"
    with pytest.raises(
        ValueError, match=r"kernel='flash': allowed are \['auto', 'fused', 'chunks'"
    ):
        kernel_for(wide, wide, "flash")


def test_the_kernel_where_a_cpu_calculates_in_bf16(bf16):
    for dtype, most in ((torch.bfloat16, 512), (torch.float16, 2**14)):
        q = torch.empty(1, 2, 3, 2, 4, dtype=dtype)
        for keys, kernel in ((1, "chunks"), (most, "chunks"), (most + 1, "fused")):
            assert kernel_for(q, q[:, :1, :1].expand(1, 1, keys, 2, 4)) == kernel
    many = torch.empty(1, 1, 256, 16, 4, dtype=torch.bfloat16)
    assert kernel_for(many, many) == "chunks"  # whatever the number of heads


COPIES = ("aten::copy_", "aten::clone", "aten::contiguous", "aten::cat", "aten::index_select")


@DIMS
@pytest.mark.parametrize("packed", [False, True], ids=["contiguous", "slices of a fused QKV"])
def test_no_copy_of_the_size_of_q_is_in_the_profile(packed, dim):
    shape = (1, 24, 32, 2, 16)
    fused = torch.randn(*shape[:4], 3, shape[4])
    given = fused.unbind(4) if packed else torch.randn(3, *shape).unbind(0)
    q, k, v = (x.detach().requires_grad_() for x in given)
    weight = torch.randn(shape)
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        torch.autograd.grad(attend(q, k, v, dim), (q, k, v), weight)
    names = {event.name for event in seen.events()}
    assert any("scaled_dot_product" in name for name in names)
    for event in seen.events():
        sizes = [torch.Size(one).numel() for one in event.input_shapes if one]
        assert event.name not in COPIES or max(sizes, default=0) < q.numel(), event.name


@DIMS
@pytest.mark.parametrize("able", ["bf16", "no_bf16"])
def test_in_16_bits_nothing_but_chunks_is_held_beside_what_must_be(able, dim, monkeypatch, request):
    """The result, the gradients and, in a chunk, two buffers of logits, with products in bf16 a
    third of half their size: none of all of them."""
    request.getfixturevalue(able)
    lines, length = 32, 128
    shape = (1, lines, length, 2, 2) if dim == 2 else (1, length, lines, 2, 2)
    monkeypatch.setattr(CHUNK, 2 * length * length)  # one line
    q, k, v = (x.detach().bfloat16().requires_grad_() for x in triple(*shape))
    with Peak() as peak:
        out = attend(q, k, v, dim)
        torch.autograd.grad(out.sum(), (q, k, v))
    chunk, tensor = 4 * 2 * length * length, 2 * q.numel()
    assert peak.bytes <= 3 * chunk + 6 * tensor < 4 * 2 * length * length * lines / 4


@DIMS
def test_a_bias_keeps_its_gradient_where_lines_are_in_several_chunks(dim, monkeypatch):
    """Sums over chunks of lines, the last one short, and of one image each."""
    monkeypatch.setattr(CHUNK, 2 * 2 * SHAPE[dim] ** 2)  # two lines
    q, k, v = triple(*SHAPE)
    table = tokens(2, 2 * SHAPE[dim] - 1, seed=5)
    got = attend(q, k, v, dim, bias=table)
    assert_agree(got, formula(q, k, v, line(dim), bias=line_bias(table, dim)), q, k, v, table)
