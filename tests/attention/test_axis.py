"""`attend` against its formula: masks, prefix keys, parts of lines, empty parts, and no copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from formulas import assert_agree, formula, line, triple
from torch import Tensor

from axialtrain.attention.axis import attend

SHAPE = (2, 3, 5, 2, 4)  # B, H, W, N, K
DIMS = [pytest.param(2, id="rows"), pytest.param(1, id="columns")]


def tokens(shape=SHAPE) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = (x.detach() for x in triple(*shape))
    return q, k, v


def some_keys(shape=SHAPE) -> Tensor:
    """About half of the tokens, and in each line of either axis one at least."""
    mask = torch.rand(shape[:3], generator=torch.Generator().manual_seed(3)) < 0.4
    for i in range(max(shape[1:3])):
        mask[:, i % shape[1], i % shape[2]] = True
    return mask


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [SHAPE, (2, 5, 3, 2, 4), (1, 1, 4, 1, 2), (3, 4, 1, 3, 2)])
def test_the_formula_and_its_gradients(shape, masked, dim):
    q, k, v = triple(*shape)
    mask = some_keys(shape) if masked else None
    got, want = attend(q, k, v, dim, key_mask=mask), formula(q, k, v, line(dim), mask=mask)
    assert_agree(got, want, q, k, v)


@pytest.mark.parametrize("dim", DIMS)
def test_scale(dim):
    q, k, v = triple(*SHAPE)
    want = formula(q, k, v, line(dim), scale=0.3)
    assert_agree(attend(q, k, v, dim, scale=0.3), want, q, k, v)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_gradcheck(masked, dim):
    q, k, v = (x.requires_grad_() for x in tokens((1, 2, 3, 2, 2)))
    mask = torch.tensor([[[True, False, True], [False, False, False]]]) if masked else None
    assert torch.autograd.gradcheck(lambda *x: attend(*x, dim, key_mask=mask), (q, k, v))


@pytest.mark.parametrize("dim", DIMS)
def test_a_line_without_keys_gives_zeros_and_zero_gradients(dim):
    q, k, v = (x.requires_grad_() for x in tokens())
    mask = torch.ones(SHAPE[:3], dtype=torch.bool)
    row, column = (1, 2), (1, slice(None), 2)
    mask[row] = mask[column] = False  # of these two, only the attended one gives zeros
    mine, across = (row, column) if dim == 2 else (column, row)
    out = attend(q, k, v, dim, key_mask=mask)
    torch.testing.assert_close(out, formula(q, k, v, line(dim), mask=mask))
    assert not out[mine].any()
    assert out[across].any()
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert not x.grad[mine].any()


@pytest.mark.parametrize("worth", [0.0, 1.0], ids=["masked in place", "compacted"])
@pytest.mark.parametrize("dim", DIMS)
def test_no_kernel_is_given_a_line_without_keys(monkeypatch, dim, worth):
    """What a softmax over nothing gives is up to the kernel: NaN or zero, here and in backward."""
    monkeypatch.setattr("axialtrain.attention.compact.WORTH", worth)
    monkeypatch.setattr("axialtrain.attention.masks.LEAST", 0)
    mask = some_keys()
    mask[0, 1] = mask[1, :, 2] = False
    seen = []
    sdpa = F.scaled_dot_product_attention

    def spy(q, k, v, *, attn_mask, **options):
        seen.append(torch.ones(k.shape[-2], dtype=torch.bool) if attn_mask is None else attn_mask)
        return sdpa(q, k, v, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attend(*tokens(), dim, key_mask=mask)
    assert seen
    assert all(one.any(-1).all() for one in seen)


@pytest.mark.parametrize("dim", DIMS)
def test_a_masked_token_is_no_key_but_still_asks(dim):
    q, k, v = tokens()
    mask = some_keys()
    poked = [torch.where(mask[..., None, None], x, x + 7.0) for x in (k, v)]
    out = attend(q, k, v, dim, key_mask=mask)
    assert torch.equal(attend(q, *poked, dim, key_mask=mask), out)
    assert out[~mask].abs().amin() > 0


@pytest.mark.parametrize("dim", DIMS)
def test_a_line_sees_itself_alone(dim):
    q, k, v = tokens()
    before = attend(q, k, v, dim)
    for x in (k, v):
        x[1, 2, 3] += 1.0
    changed = (attend(q, k, v, dim) != before).any(-1).any(-1)
    expected = torch.zeros(SHAPE[:3], dtype=torch.bool)
    expected[(1, 2) if dim == 2 else (1, slice(None), 3)] = True
    assert torch.equal(changed, expected)


@pytest.mark.parametrize("dim", DIMS)
def test_the_transposed_image_with_the_other_dim_is_the_transposed_result(dim):
    q, k, v = tokens()
    mask = some_keys()
    mask[0, :, 1] = mask[1, 2] = False  # lines without keys, along either axis
    flipped = attend(
        *(x.transpose(1, 2) for x in (q, k, v)), 3 - dim, key_mask=mask.transpose(1, 2)
    )
    want = attend(q, k, v, dim, key_mask=mask)
    torch.testing.assert_close(flipped.transpose(1, 2), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [(2, 0, 5, 2, 4), (2, 3, 0, 2, 4), (2, 0, 0, 2, 4)])
def test_an_empty_part_passes_forward_and_backward(shape, masked, dim):
    q, k, v = (torch.zeros(shape, requires_grad=True) for _ in range(3))
    mask = torch.ones(shape[:3], dtype=torch.bool) if masked else None
    out = attend(q, k, v, dim, key_mask=mask)
    assert out.shape == shape
    out.sum().backward()
    assert all(x.grad is not None and x.grad.shape == shape for x in (q, k, v))


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("packed", [False, True], ids=["contiguous", "slices of a fused QKV"])
def test_the_folds_are_views(monkeypatch, packed, dim):
    """What reaches SDPA is the caller's memory: H folds into the batch, or W into the heads."""
    images, height, width, heads, channels = SHAPE
    if packed:
        fused = torch.randn(*SHAPE[:4], 3, channels)
        given = fused.unbind(4)
    else:
        given = tuple(x.float() for x in tokens())
    seen = []
    sdpa = F.scaled_dot_product_attention

    def spy(q, k, v, **options):
        seen.extend((q, k, v))
        return sdpa(q, k, v, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attend(*given, dim)
    assert len(seen) == 3
    for inner, outer in zip(seen, given, strict=True):
        assert inner.data_ptr() == outer.data_ptr()
        if dim == 2:
            assert inner.shape == (images * height, heads, width, channels)
        else:
            assert inner.shape == (images, width * heads, height, channels)
        assert inner.stride(-1) == 1


def test_only_the_two_axes_of_the_image_are_dims():
    with pytest.raises(ValueError, match=r"dim=3: allowed are 1 \(columns\) and 2 \(rows\)"):
        attend(*tokens(), 3)


def prefix_of(shape=SHAPE, length=3) -> tuple[Tensor, Tensor]:
    images, _, _, heads, channels = shape
    _, k, v = triple(images, length, heads, channels, seed=1)
    return k, v


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_a_prefix_joins_every_line(masked, dim):
    q, k, v = triple(*SHAPE)
    prefix = prefix_of()
    mask = some_keys() if masked else None
    got = attend(q, k, v, dim, key_mask=mask, prefix=prefix)
    want = formula(q, k, v, line(dim), mask=mask, prefix=prefix)
    assert_agree(got, want, q, k, v, *prefix)


@pytest.mark.parametrize("dim", DIMS)
def test_a_line_without_keys_attends_to_the_prefix_alone(dim):
    q, k, v = triple(*SHAPE)
    prefix = prefix_of()
    mask = torch.zeros(SHAPE[:3], dtype=torch.bool)
    got = attend(q, k, v, dim, key_mask=mask, prefix=prefix)
    assert_agree(got, formula(q, k, v, line(dim), mask=mask, prefix=prefix), q, k, v, *prefix)
    assert got.abs().amin() > 0


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_queries_that_are_a_part_of_the_line_get_their_part_of_the_whole(masked, dim):
    q, k, v = triple(*SHAPE)
    prefix = prefix_of()
    mask = some_keys() if masked else None
    part = attend(q.narrow(dim, 1, 2), k, v, dim, key_mask=mask, offset=1, prefix=prefix)
    whole = attend(q, k, v, dim, key_mask=mask, prefix=prefix)
    assert_agree(part, whole.narrow(dim, 1, 2), q, k, v, *prefix)


@pytest.mark.parametrize("shape", [(2, 0, 5, 2, 4), (2, 3, 0, 2, 4)], ids=str)
@pytest.mark.parametrize("dim", DIMS)
def test_an_empty_part_gives_the_prefix_a_gradient_of_zero(shape, dim):
    q, k, v = triple(*shape)
    prefix = prefix_of()
    out = attend(q, k, v, dim, prefix=prefix)
    assert out.shape == shape
    for x, grad in zip(prefix, torch.autograd.grad(out.sum(), prefix), strict=True):
        assert grad.shape == x.shape
        assert not grad.any()


def test_tied_row_attention_is_attention_with_the_rows_folded_into_the_head_width():
    """MSA Transformer, section 3: logits summed over the R rows, scaled by (K R)^-1/2."""
    images, rows, length, heads, channels = SHAPE
    q, k, v = triple(*SHAPE)

    def folded(x: Tensor) -> Tensor:  # [B, R, L, N, K] -> [B, 1, L, N, R K]
        return rearrange(x, "B R L N K -> B 1 L N (R K)")

    got = rearrange(
        attend(folded(q), folded(k), folded(v), 2), "B 1 L N (R K) -> B R L N K", R=rows
    )
    logits = torch.zeros(images, heads, length, length, dtype=q.dtype)
    for row in range(rows):
        logits = logits + torch.einsum("bink, bjnk -> bnij", q[:, row], k[:, row])
    weights = (logits / (channels * rows) ** 0.5).softmax(-1)
    want = torch.stack(
        [torch.einsum("bnij, bjnk -> bink", weights, v[:, row]) for row in range(rows)], 1
    )
    assert_agree(got, want, q, k, v)
