"""One prediction for an image: what it is read off, and that padding has no part in it."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

import torchvision_ops  # noqa: F401  # isort: skip
from test_masks import LARGEST, SIZES, assert_same, enlarged, upper_left
from test_passes_mix import assert_close, holes
from test_transformer import (
    DIM,
    GRID,
    PLACE,
    backbone,
    config,
    gradients,
    per_pixel,
    pixels,
    random_weights,
)
from timm.layers import AttentionPoolLatent
from torch import Tensor, nn

from axialtrain.grid import Place
from axialtrain.models.heads import POOLS, AttentionPool, Classifier
from axialtrain.models.transformer import AxialTransformer

CLASSES = 5
EVERY_POOL = pytest.mark.parametrize("pool", POOLS)


def classifier(pool: str) -> Classifier:
    return random_weights(Classifier(AxialTransformer(config(prefix_tokens=2)), CLASSES, pool))


def tokens(images: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(images, *GRID, DIM, generator=generator, dtype=torch.float64)


def plain_pool(pool: AttentionPool, x: Tensor, valid: Tensor) -> Tensor:
    """One image, one head at a time, over its valid tokens alone."""
    out = []
    width = DIM // pool.heads
    for some in (one[which] for one, which in zip(x, valid, strict=True)):
        q = F.linear(pool.latent[0, 0], pool.q.weight, pool.q.bias)
        k, v = F.linear(some, pool.kv.weight, pool.kv.bias).chunk(2, -1)
        parts = []
        for n in range(pool.heads):
            head = slice(n * width, (n + 1) * width)
            weights = (k[:, head] @ q[head] / width**0.5).softmax(0)
            parts.append(weights @ v[:, head])
        y = F.linear(torch.cat(parts), pool.proj.weight, pool.proj.bias)
        z = F.layer_norm(y, (DIM,), pool.norm.weight, pool.norm.bias, eps=1e-6)
        z = F.gelu(F.linear(z, pool.mlp.fc1.weight, pool.mlp.fc1.bias))
        out.append(y + F.linear(z, pool.mlp.fc2.weight, pool.mlp.fc2.bias))
    return torch.stack(out)


@EVERY_POOL
def test_classes_are_read_off_what_the_pool_names(pool):
    model, valid, image = classifier(pool), holes()[:2], pixels()
    out, prefix = model.backbone(image, valid, PLACE)
    pooled = {
        "mean": lambda: torch.stack(
            [one[some].mean(0) for one, some in zip(out, valid, strict=True)]
        ),
        "prefix": lambda: prefix[:, 0],
        "attention": lambda: plain_pool(model.attn_pool, out, valid),
    }[pool]()
    assert_close(model(image, valid, PLACE), model.head(pooled))


def test_an_attention_pool_is_timms():
    ours = random_weights(AttentionPool(DIM, 4, 2 * DIM))
    norm = functools.partial(nn.LayerNorm, eps=1e-6)
    timms = AttentionPoolLatent(DIM, num_heads=4, mlp_ratio=2.0, norm_layer=norm).double()
    timms.load_state_dict(ours.state_dict())
    for dtype in (torch.float64, torch.float32):
        x = tokens().to(dtype)
        got, want = ours.to(dtype)(x), timms.to(dtype)(x.flatten(1, 2))
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_an_attention_pool_looks_at_valid_tokens_alone():
    pool, valid = random_weights(AttentionPool(DIM, 4, 2 * DIM)), holes()
    x = tokens(3)
    want = pool(x, valid)
    assert_close(want[:2], plain_pool(pool, x[:2], valid[:2]))
    assert want.isfinite().all()
    assert torch.equal(pool(x.masked_fill(~valid[..., None], 50.0), valid), want)


@EVERY_POOL
def test_what_stands_in_missing_tokens_changes_no_prediction(pool):
    model, valid = classifier(pool), holes()
    zeroed = torch.where(per_pixel(valid), pixels(images=3), 0.0)
    want = model(zeroed, valid, PLACE)
    expected = gradients(model, want.square().sum())
    for filling in (50.0, float("nan"), float("inf")):
        image = torch.where(per_pixel(valid), pixels(images=3), filling).requires_grad_()
        got = model(image, valid, PLACE)
        assert torch.equal(got, want)
        got.square().sum().backward(retain_graph=True)
        assert not image.grad[~per_pixel(valid).expand_as(image)].any()
        assert_same(gradients(model, got.square().sum()), expected)


@EVERY_POOL
@pytest.mark.parametrize("positions", ["rope", "relative"])
def test_every_parameter_has_a_gradient(positions, pool):
    """Zeros where the pool does not look, not None: partitioned parameters stay in step."""
    options = config(attention={"positions": positions}, grid=list(GRID), prefix_tokens=2)
    model = random_weights(Classifier(AxialTransformer(options), CLASSES, pool))
    model(pixels(), None, PLACE).square().sum().backward()
    assert [name for name, one in model.named_parameters() if one.grad is None] == []


@EVERY_POOL
def test_each_image_of_a_batch_is_predicted_as_alone(pool):
    model = classifier(pool)
    images = [pixels(size, seed=i, images=1) for i, size in enumerate(SIZES)]
    batch = torch.cat([enlarged(image, LARGEST, torch.nan) for image in images])
    got = model(batch, upper_left(SIZES, LARGEST), Place(*LARGEST))
    alone = [model(image, None, Place(*size)) for image, size in zip(images, SIZES, strict=True)]
    assert_close(got, torch.cat(alone))


@EVERY_POOL
def test_no_mask_is_a_mask_of_all_for_a_classifier(pool):
    model = classifier(pool)
    everything = torch.ones(2, *GRID, dtype=torch.bool)
    assert_close(model(pixels(), None, PLACE), model(pixels(), everything, PLACE))


@EVERY_POOL
def test_an_image_without_a_token_has_a_prediction_and_gradients(pool):
    model = classifier(pool)
    image = torch.full_like(pixels(), torch.nan).requires_grad_()
    logits = model(image, torch.zeros(2, *GRID, dtype=torch.bool), PLACE)
    assert logits.isfinite().all()
    if pool == "mean":
        assert_close(logits, model.head.bias.expand(2, -1))
    values = [image, *model.parameters()]
    found = torch.autograd.grad(logits.square().sum(), values, allow_unused=True)
    assert all(gradient is None or gradient.isfinite().all() for gradient in found)
    assert not found[0].any()


def test_the_prefix_pool_reads_the_first_prefix_token():
    model = classifier("prefix")
    want = model(pixels(), None, PLACE)
    names = [name for name, _ in model.named_parameters()]
    assert not any("attn_pool" in name for name in names)
    assert want.shape == (2, CLASSES)
    with torch.no_grad():
        model.backbone.norm.weight.zero_()
    # A norm that gives its bias, whatever the token: so do the classes.
    assert_close(model(pixels(), None, PLACE), model.head(model.backbone.norm.bias).expand(2, -1))


def test_an_unknown_pool_is_refused():
    with pytest.raises(
        ValueError, match=r"pool='max': allowed are \['mean', 'prefix', 'attention'\]"
    ):
        Classifier(backbone(), CLASSES, "max")


def test_the_prefix_pool_needs_a_prefix_token():
    message = r"reads 1 prefix token\(s\), and model\.prefix_tokens=0: allowed are numbers from 1"
    with pytest.raises(ValueError, match=message + r", or task\.pool=mean, which reads none$"):
        Classifier(backbone(), CLASSES, "prefix")
    with pytest.raises(ValueError, match=r"allowed are numbers from 2$"):
        Classifier(backbone(), CLASSES, "prefix", distilled=True)


def test_an_attention_pool_has_whole_heads():
    with pytest.raises(ValueError, match=r"heads=3 does not divide dim=16"):
        AttentionPool(16, 3, 32)


def test_a_distilled_classifier_reads_two_tokens_and_means_their_classes():
    """DeiT's second head (arXiv 2012.12877, section 4): both in training, the mean afterwards."""
    backbone = AxialTransformer(config(prefix_tokens=2))
    model = random_weights(Classifier(backbone, CLASSES, "prefix", distilled=True))
    _, prefix = model.backbone(pixels(), None, PLACE)
    want = torch.stack((model.head(prefix[:, 0]), model.head_dist(prefix[:, 1])), 1)
    assert_close(model(pixels(), None, PLACE), want)
    assert_close(model.eval()(pixels(), None, PLACE), want.mean(1))


def test_a_distilled_classifier_needs_two_prefix_tokens_and_their_pool():
    model = AxialTransformer(config(prefix_tokens=1))
    message = r"reads 2 prefix token\(s\), and model\.prefix_tokens=1: allowed .* from 2"
    with pytest.raises(ValueError, match=message):
        Classifier(model, CLASSES, "prefix", distilled=True)
    with pytest.raises(ValueError, match=r"pool='mean': allowed beside .* is 'prefix'"):
        Classifier(model, CLASSES, "mean", distilled=True)
