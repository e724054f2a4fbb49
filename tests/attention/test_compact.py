"""Lines without their masked tokens: the formula, its gradients, and what is not read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from formulas import assert_agree, formula, line, some, tokens, triple
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from axialtrain.attention.axis import attend
from axialtrain.attention.compact import plan
from axialtrain.attention.masks import LineMasks

SHAPE = (2, 6, 9, 2, 4)  # B, H, W, N, K
DIMS = pytest.mark.parametrize("dim", [2, 1], ids=["rows", "columns"])
WORTH = pytest.mark.parametrize("worth", [0.0, 1.0], ids=["masked in place", "compacted"])


@pytest.fixture(autouse=True)
def buckets(monkeypatch, request):
    """Several of them in short lines, and compacting as the test says."""
    monkeypatch.setattr("axialtrain.attention.compact.STEP", 2)
    monkeypatch.setattr("axialtrain.attention.masks.LEAST", 0)
    if "worth" in request.fixturenames:
        monkeypatch.setattr("axialtrain.attention.compact.WORTH", request.getfixturevalue("worth"))


def holes() -> Tensor:
    """Lines of many lengths along either axis, and some without a token."""
    mask = some(*SHAPE[:3], share=0.5)
    mask[0, 1] = mask[1, :, 2] = False
    mask[1, 4] = mask[0, 2:, 7] = True
    return mask


def prefix_of() -> tuple[Tensor, Tensor]:
    return tokens(2, 3, 2, 4, seed=7), tokens(2, 3, 2, 4, seed=8)


@WORTH
@DIMS
@pytest.mark.parametrize("asking", ["all", "keys", "others"])
@pytest.mark.parametrize("with_prefix", [False, True], ids=["no prefix", "prefix"])
@pytest.mark.parametrize("kernel", ["fused", "chunks"])
def test_the_formula_and_its_gradients(worth, kernel, with_prefix, asking, dim):
    q, k, v = triple(*SHAPE)
    mask = holes()
    queries = {"all": None, "keys": mask, "others": some(*SHAPE[:3], seed=4)}[asking]
    prefix = prefix_of() if with_prefix else None
    got = attend(q, k, v, dim, key_mask=mask, query_mask=queries, prefix=prefix, kernel=kernel)
    want = formula(q, k, v, line(dim), mask=mask, prefix=prefix)
    if queries is not None:
        want = want * queries[..., None, None]
    assert_agree(got, want, q, k, v, *(prefix or ()))


@WORTH
@DIMS
def test_queries_that_are_a_part_of_the_line(worth, dim):
    q, k, v = triple(*SHAPE)
    mask, prefix = holes(), prefix_of()
    asking = mask.narrow(dim, 1, 3)
    got = attend(
        q.narrow(dim, 1, 3), k, v, dim, key_mask=mask, query_mask=asking, offset=1, prefix=prefix
    )
    want = formula(q, k, v, line(dim), mask=mask, prefix=prefix).narrow(dim, 1, 3)
    assert_agree(got, want * asking[..., None, None], q, k, v, *prefix)


@DIMS
def test_with_a_bias_the_others_get_zeros_too(dim):
    q, k, v = triple(*SHAPE)
    mask, table = holes(), tokens(2, 11, seed=5)
    options = {"key_mask": mask, "bias": table}
    want = attend(q, k, v, dim, **options) * mask[..., None, None]
    assert_agree(
        attend(q, k, v, dim, query_mask=mask, **options), want, q, k, v, table, tolerance=1e-13
    )


@DIMS
def test_no_key_mask_and_some_that_ask(dim):
    q, k, v = triple(*SHAPE)
    asking = holes()
    want = attend(q, k, v, dim) * asking[..., None, None]
    assert_agree(attend(q, k, v, dim, query_mask=asking), want, q, k, v, tolerance=1e-13)


@DIMS
def test_gradcheck(dim):
    q, k, v = triple(1, 2, 4, 1, 2)
    mask = torch.tensor([[[True, False, True, False], [False, True, False, False]]])
    assert plan(mask, mask, across=False, alone=True) is not None
    assert torch.autograd.gradcheck(
        lambda *x: attend(*x, dim, key_mask=mask, query_mask=mask), (q, k, v)
    )


@DIMS
@pytest.mark.parametrize("with_prefix", [False, True], ids=["no prefix", "prefix"])
def test_an_image_without_a_token_gives_zeros_and_zero_gradients(with_prefix, dim):
    q, k, v = triple(*SHAPE)
    prefix = prefix_of() if with_prefix else ()
    mask = torch.zeros(SHAPE[:3], dtype=torch.bool)
    out = attend(q, k, v, dim, key_mask=mask, query_mask=mask, prefix=prefix or None)
    assert out.shape == SHAPE
    assert not out.any()
    for grad in torch.autograd.grad(out.sum(), (q, k, v, *prefix)):
        assert not grad.any()


@DIMS
@pytest.mark.parametrize("packed", [False, True], ids=["contiguous", "slices of a fused QKV"])
def test_what_masked_tokens_hold_is_not_read(packed, dim):
    """NaN among them reaches neither values nor gradients."""
    mask = some(*SHAPE[:3], share=0.3)
    shape = (*SHAPE[:4], 3, SHAPE[4])
    clean = tokens(*shape).detach() if packed else tokens(3, *SHAPE).detach()
    place = mask[..., None, None, None] if packed else mask[..., None, None]
    results = []
    for fill in (0.0, torch.nan):
        given = torch.where(place, clean, fill).requires_grad_()
        q, k, v = given.unbind(4 if packed else 0)
        out = attend(q, k, v, dim, key_mask=mask, query_mask=mask)
        (grad,) = torch.autograd.grad(out.square().sum(), given)
        results.append((out, grad))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
        assert one.isfinite().all()


@DIMS
def test_masked_tokens_are_in_no_product(monkeypatch, dim):
    """Of 70% masked lines, what is attended is little more than the pairs that are not masked."""
    mask = some(1, 32, 32, share=0.3)
    q, k, v = (x.detach() for x in triple(1, 32, 32, 1, 2))
    calls = []
    sdpa = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        calls.append(q.shape[0] * q.shape[2] * k.shape[2])
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attend(q, k, v, dim, key_mask=mask, query_mask=mask)
    pairs = int(mask.sum(dim).square().sum())
    assert pairs <= sum(calls) <= 1.5 * pairs < 0.2 * 32**3


class Waits(TorchDispatchMode):
    """Counts the operations whose result, or its size, the host must wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += func in (
            aten._local_scalar_dense.default,
            aten.nonzero.default,
            aten.masked_select.default,
        )
        if func is aten.index.Tensor:
            self.count += any(x is not None and x.dtype is torch.bool for x in args[1])
        return func(*args, **(kwargs or {}))


@DIMS
@pytest.mark.parametrize("asking", ["keys", "others"])
def test_the_host_waits_for_the_numbers_of_tokens_alone(asking, dim):
    """On a GPU each wait stops the stream. What `plan` reads, by `numpy()`, is not seen here."""
    mask, prefix = holes(), prefix_of()
    masks = LineMasks.along(dim, mask, mask if asking == "keys" else some(*SHAPE[:3], seed=4))
    q, k, v = triple(*SHAPE)
    with Waits() as waits:
        out = attend(q, k, v, dim, masks=masks, prefix=prefix)
        torch.autograd.grad(out.sum(), (q, k, v))
        assert masks.plan(SHAPE[dim], across=dim == 1, alone=False) is not None
        assert not waits.count
        int(mask.sum())
        mask.nonzero()
        assert waits.count == 2  # they are seen


def test_masks_are_given_one_way():
    q, k, v = triple(*SHAPE)
    mask = holes()
    with pytest.raises(ValueError, match="masks= and key_mask="):
        attend(q, k, v, 2, masks=LineMasks(mask), key_mask=mask)


def test_few_masked_tokens_are_masked_where_they_are():
    mask = some(1, 8, 8, share=0.95)
    assert plan(mask, mask, across=False, alone=True) is None
