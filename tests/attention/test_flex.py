"""FlexAttention with a learned bias, against products in chunks.

On a CPU it has no kernel and no backward, but computes all logits at once by the same functions;
what it refuses there is allowed here. Its kernels are tested in tests/gpu.
"""

from __future__ import annotations

import pytest
import torch
from formulas import assert_agree, some, tokens, triple
from torch import Tensor
from torch.nn.attention import flex_attention

from axialtrain.attention import kernels
from axialtrain.attention.area import attend_all, attend_windows
from axialtrain.attention.axis import attend
from axialtrain.attention.bias import Bias, area_bias, bias_at, line_bias
from axialtrain.attention.kernels import LIMITS, Limits, kernel_for, lines_at_a_time
from axialtrain.attention.masks import LineMasks
from axialtrain.grid import Rect, windows_of

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

SHAPE = (2, 4, 6, 2, 16)  # B, H, W, N, K
GRID = Rect(0, 4, 0, 6)
DIMS = pytest.mark.parametrize("dim", [pytest.param(2, id="rows"), pytest.param(1, id="columns")])


@pytest.fixture
def on_a_cpu(monkeypatch):
    monkeypatch.setitem(kernels.FLEX, "cpu", (torch.float64, torch.float32))
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *given: None)


def prefix_of() -> tuple[Tensor, Tensor]:
    return tokens(2, 3, 2, 16, seed=7), tokens(2, 3, 2, 16, seed=8)


TABLES = {
    "line": line_bias(tokens(2, 11), (0, 6), (0, 6)),
    "part of a line": line_bias(tokens(2, 11), (2, 5), (0, 6)),
    "far": line_bias(tokens(2, 3), (1, 6), (0, 7)),
    "span of 1": line_bias(tokens(2, 1), (0, 3), (0, 3)),
    "image": area_bias((tokens(2, 7), tokens(2, 11, seed=1)), GRID, GRID),
    "far, of a part": area_bias(
        (tokens(2, 3), tokens(2, 5, seed=1)), Rect(1, 3, 2, 6), Rect(0, 5, 1, 7)
    ),
}


@pytest.mark.parametrize("bias", TABLES.values(), ids=TABLES)
def test_the_bias_of_a_pair_is_that_of_the_tensor_and_so_is_its_gradient(bias: Bias):
    shares = bias.shares(bias.tables)
    queries, keys = (len(x) for x in shares[0][1:])
    want = bias.of(bias.tables, 0, queries)
    numbers = (torch.arange(size) for size in (len(bias.tables[0]), queries, keys))
    got = bias_at(shares, *torch.meshgrid(*numbers, indexing="ij"))
    assert got.shape == (2, queries, keys)
    assert_agree(got, want, *bias.tables)


@pytest.mark.usefixtures("on_a_cpu")
@DIMS
@pytest.mark.slow
@pytest.mark.parametrize(("masked", "with_prefix", "span"), [(False, False, 9), (True, True, 2)])
def test_values_and_gradients_along_a_line(monkeypatch, masked, with_prefix, span, dim):
    """Of a part of the queries; in one call, and cut as kernels' limits ask."""
    q, k, v = triple(*SHAPE)
    part, table = q.narrow(dim, 1, 2), tokens(2, 2 * span - 1, seed=5)
    mask = some(*SHAPE[:3]) if masked else None
    if mask is not None:
        mask[(1, 2) if dim == 2 else (1, slice(None), 2)] = False  # a line without a key
    prefix = prefix_of() if with_prefix else None
    options = {"key_mask": mask, "bias": table, "offset": 1, "prefix": prefix, "scale": 0.3}
    for limits in (None, Limits(batch=6, heads=1, elements=10**9)):
        if limits is not None:
            monkeypatch.setitem(LIMITS, "cpu", limits)
        got, want = (attend(part, k, v, dim, kernel=one, **options) for one in ("flex", "chunks"))
        assert got.stride() == want.stride()
        assert_agree(got, want, q, k, v, table, *(prefix or ()))


@pytest.mark.slow
@pytest.mark.usefixtures("on_a_cpu")
def test_values_and_gradients_within_windows_and_images():
    q, k, v = triple(*SHAPE)
    tables, prefix = (tokens(2, 5), tokens(2, 3, seed=1)), prefix_of()
    part, mask = Rect(1, 4, 2, 6), some(*SHAPE[:3])
    queries = q[:, *part.slices(GRID)]
    every = {"bias": tables, "prefix": prefix}

    def windows(kernel: str) -> Tensor:
        there = windows_of(part, 3, 1).intersect(GRID)
        near = [x[:, *there.slices(GRID)] for x in (k, v, mask)]
        return attend_windows(
            queries, *near[:2], part, there, 3, 1, key_mask=near[2], kernel=kernel, **every
        )

    def image(kernel: str) -> Tensor:
        masks = LineMasks.of_images(mask)
        return attend_all(queries, k, v, part, masks=masks, kernel=kernel, **every)

    for attention in (windows, image):
        assert_agree(attention("flex"), attention("chunks"), q, k, v, *tables, *prefix)


def test_what_it_takes_in_one_call(monkeypatch):
    monkeypatch.setitem(LIMITS, "meta", LIMITS["cuda"])
    many = torch.empty(3, 20_000, 16, 8, 64, device="meta")
    assert lines_at_a_time(many, many, False, "flex") == (1, 8191)  # times 8 heads: 65,528
    assert lines_at_a_time(many, many, True, "flex") == (1, 8191)
    few = torch.empty(3, 1000, 16, 8, 64, device="meta")
    assert lines_at_a_time(few, few, False, "flex") == (3, 1000)
    assert lines_at_a_time(few, few, True, "flex") == (1, 1000)  # image by image: a view


def test_which_kernel_takes_a_bias(monkeypatch):
    q = torch.empty(1, 2, 3, 1, 16)
    assert kernel_for(q, q, biased=True) == "chunks"
    with pytest.raises(ValueError, match=r"'flex' for torch.float32 on cpu, heads of 16 channels"):
        kernel_for(q, q, "flex", biased=True)
    with pytest.raises(ValueError, match=r"'fused': allowed are \['auto', 'flex', 'chunks'\] with"):
        kernel_for(q, q, "fused", biased=True)
    with pytest.raises(ValueError, match=r"'flex': allowed are \['auto', 'fused', 'chunks'\] with"):
        kernel_for(q, q, "flex")
    # As on a GPU:
    monkeypatch.setitem(kernels.FLEX, "cpu", kernels.FLEX["cuda"])
    assert kernel_for(q, q, biased=True) == "flex"
    assert kernel_for(q, q, "chunks", biased=True) == "chunks"
    for other in (q.double(), q[..., :8]):
        assert kernel_for(other, other, biased=True) == "chunks"
        with pytest.raises(ValueError, match=r"allowed are .*16 channels at least, or kernel='ch"):
            kernel_for(other, other, "flex", biased=True)
    try:
        torch.use_deterministic_algorithms(True)
        assert kernel_for(q, q, biased=True) == "chunks"
    finally:
        torch.use_deterministic_algorithms(False)
