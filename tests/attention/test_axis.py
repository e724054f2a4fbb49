"""`attend` against its formula; a line sees itself alone; masks, empty parts, and no copies."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from axialtrain.attention.axis import attend

SHAPE = (2, 3, 5, 2, 4)  # B, H, W, N, K
DIMS = [pytest.param(2, id="rows"), pytest.param(1, id="columns")]


def tokens(shape=SHAPE, seed=0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q, k, v = torch.randn(3, *shape, generator=generator, dtype=torch.float64)
    return q, k, v


def some_keys(shape=SHAPE) -> Tensor:
    """About half of the tokens, and in each line of either axis one at least."""
    mask = torch.rand(shape[:3], generator=torch.Generator().manual_seed(3)) < 0.4
    for i in range(max(shape[1:3])):
        mask[:, i % shape[1], i % shape[2]] = True
    return mask


def formula(
    q: Tensor, k: Tensor, v: Tensor, dim: int, mask: Tensor | None = None, scale=None
) -> Tensor:
    """softmax(q k^T scale) v, one line and one head at a time."""
    if dim == 1:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        mask = None if mask is None else mask.transpose(1, 2)
    images, lines, length, heads, width = q.shape
    out = torch.zeros_like(q)
    for b in range(images):
        for line in range(lines):
            keys = torch.arange(length) if mask is None else mask[b, line].nonzero()[:, 0]
            for n in range(heads):
                if len(keys):
                    scores = q[b, line, :, n] @ k[b, line, keys, n].T
                    weights = (scores * (scale or width**-0.5)).exp()
                    weights = weights / weights.sum(1, keepdim=True)
                    out[b, line, :, n] = weights @ v[b, line, keys, n]
    return out.transpose(1, 2) if dim == 1 else out


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("shape", [SHAPE, (2, 5, 3, 2, 4), (1, 1, 4, 1, 2), (3, 4, 1, 3, 2)])
def test_the_formula_and_its_gradients(shape, masked, dim):
    q, k, v = (x.requires_grad_() for x in tokens(shape))
    mask = some_keys(shape) if masked else None
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=q.dtype)
    got, want = attend(q, k, v, dim, key_mask=mask), formula(q, k, v, dim, mask)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    found = torch.autograd.grad((got * weight).sum(), (q, k, v))
    expected = torch.autograd.grad((want * weight).sum(), (q, k, v))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dim", DIMS)
def test_scale(dim):
    q, k, v = tokens()
    torch.testing.assert_close(attend(q, k, v, dim, scale=0.3), formula(q, k, v, dim, scale=0.3))


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
    line, across = (row, column) if dim == 2 else (column, row)
    out = attend(q, k, v, dim, key_mask=mask)
    torch.testing.assert_close(out, formula(q, k, v, dim, mask))
    assert not out[line].any()
    assert out[across].any()
    out.square().sum().backward()
    for x in (q, k, v):
        assert x.grad.isfinite().all()
        assert not x.grad[line].any()


@pytest.mark.parametrize("dim", DIMS)
def test_no_kernel_is_given_a_line_without_keys(monkeypatch, dim):
    """What a softmax over nothing gives is up to the kernel: NaN or zero, here and in backward."""
    mask = some_keys()
    mask[0, 1] = mask[1, :, 2] = False
    seen = []
    sdpa = F.scaled_dot_product_attention

    def spy(*args, attn_mask, **options):
        seen.append(attn_mask)
        return sdpa(*args, attn_mask=attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", spy)
    attend(*tokens(), dim, key_mask=mask)
    assert seen[0].any(-1).all()


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
