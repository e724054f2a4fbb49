"""Counted FLOP are those of the formulas: of the functions, a layer, backward and a prefix."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from axialtrain.attention.area import attend_all, attend_windows
from axialtrain.attention.axis import attend
from axialtrain.attention.config import AxialConfig, Pass
from axialtrain.attention.merge import attend_everywhere
from axialtrain.grid import Place, Rect
from axialtrain.mesh.exchange import Exchange
from axialtrain.models.layer import Layer

H, W, N, K = 8, 12, 2, 4
D = N * K
GRID = Rect(0, H, 0, W)
WINDOW = 4  # divides H and W

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
ATTENTIONS: dict[str, tuple[Attention, int]] = {
    "row": (lambda q, k, v: attend(q, k, v, 2), 4 * H * W * W * D),
    "col": (lambda q, k, v: attend(q, k, v, 1), 4 * H * W * H * D),
    "row and col": (
        lambda q, k, v: attend(q, k, v, 2) + attend(q, k, v, 1),
        4 * H * W * (H + W) * D,
    ),
    "window": (
        lambda q, k, v: attend_windows(q, k, v, GRID, GRID, WINDOW, 0),
        4 * H * W * WINDOW**2 * D,
    ),
    "global": (lambda q, k, v: attend_all(q, k, v, GRID), 4 * (H * W) ** 2 * D),
}


def counted(run: Callable[[], object]) -> int:
    """On a CPU the fused kernels count as 0."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def triple() -> list[Tensor]:
    return [torch.randn(1, H, W, N, K, requires_grad=True) for _ in range(3)]


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_the_cost_of_attention(kind):
    attention, expected = ATTENTIONS[kind]
    q, k, v = triple()
    assert counted(lambda: attention(q, k, v)) == expected


@pytest.mark.parametrize("kind", ATTENTIONS)
def test_backward_costs_twice_as_much(kind):
    attention, forward = ATTENTIONS[kind]
    with sdpa_kernel(SDPBackend.MATH):
        out = attention(*triple())
    assert counted(out.sum().backward) == 2 * forward


@pytest.mark.parametrize("chunk", [100, 2**22], ids=["many chunks", "one"])
@pytest.mark.parametrize("dim", [1, 2], ids=["columns", "rows"])
def test_a_bias_costs_no_product_and_its_logits_twice(monkeypatch, dim, chunk):
    """Backward computes the logits of a chunk again, and not what came after them."""
    monkeypatch.setattr("axialtrain.attention.lines.CHUNK", chunk)
    table = torch.zeros(N, 2 * max(H, W) - 1, requires_grad=True)
    run = partial(attend, *triple(), dim, bias=table)
    forward = 4 * H * W * (H, W)[dim - 1] * D
    assert counted(run) == forward
    assert counted(run().sum().backward) == 2.5 * forward


def test_queries_that_see_all_cost_in_proportion_to_the_image():
    n, (_, k, v) = 3, triple()
    prefix = torch.randn(2, 1, n, N, K)
    queries = torch.randn(1, n, N, K)
    own = (prefix[0], prefix[1])
    got = counted(lambda: attend_everywhere(queries, k, v, Exchange(), prefix=own))
    assert got == 4 * n * (H * W + n) * D


LENGTHS = {Pass.ROW: W, Pass.COL: H, Pass.WINDOW: WINDOW**2, Pass.GLOBAL: H * W}  # keys of a query
PATTERNS = ["row", "col", "row+col", "window", "global", "window+col+global"]


def cost(pattern: str, prefix: int = 0) -> int:
    """Each pass: 8 T D^2 of projections and 4 T (L + n) D of attention; the MLP: 16 T D^2."""
    tokens, total = H * W + prefix, 16 * (H * W + prefix) * D**2
    for one in pattern.split("+"):
        total += 8 * tokens * D**2
        total += 4 * H * W * (LENGTHS[Pass(one)] + prefix) * D
        total += 4 * prefix * tokens * D
    return total


@pytest.mark.parametrize("fusion", ["sequential", "sum"])
@pytest.mark.parametrize("share", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_cost_of_a_layer(pattern, share, fusion):
    """Sharing projections saves parameters, not work."""
    config = AxialConfig(
        [pattern], fusion=fusion, share_projections=share, positions="none", window=WINDOW
    )
    layer = Layer(D, N, 4 * D, config)
    x = torch.randn(1, H, W, D)
    assert counted(lambda: layer(x, x.new_zeros(1, 0, D), Place(H, W))) == cost(pattern)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rotary_positions_cost_no_product(pattern):
    layer = Layer(D, N, 4 * D, AxialConfig([pattern], window=WINDOW))
    x = torch.randn(1, H, W, D)
    assert counted(lambda: layer(x, x.new_zeros(1, 0, D), Place(H, W))) == cost(pattern)


@pytest.mark.parametrize("prefix", [2, 5])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_prefix_costs_in_proportion_to_the_image(pattern, prefix):
    layer = Layer(D, N, 4 * D, AxialConfig([pattern], window=WINDOW))
    x, tokens = torch.randn(1, H, W, D), torch.randn(1, prefix, D)
    assert counted(lambda: layer(x, tokens, Place(H, W))) == cost(pattern, prefix)


def test_backward_of_a_layer_costs_twice_as_much():
    layer = Layer(D, N, 4 * D, AxialConfig(["row+col"]))
    x = torch.randn(1, H, W, D, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        out, _ = layer(x, x.new_zeros(1, 0, D), Place(H, W))
    assert counted(out.sum().backward) == 2 * cost("row+col")
