"""model.patch=features: each vector of a feature grid is a token."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest
import torch
from torch import Tensor

from axialtrain.grid import Place
from axialtrain.models.heads import Classifier, MaskedReconstructor, Segmenter
from axialtrain.models.own_weights import described, from_timm_names, to_timm
from axialtrain.models.transformer import FEATURES, AxialTransformer, AxialTransformerConfig
from axialtrain.train.compose import compose_run

D = 40
GRID = (5, 7)


def config(patch: int | str = FEATURES, bands: int = D) -> AxialTransformerConfig:
    return AxialTransformerConfig(patch=patch, bands=bands, dim=16, depth=2, heads=4)


def vectors() -> tuple[Tensor, Tensor]:
    """Two grids, and which of their cells have a vector."""
    generator = torch.Generator().manual_seed(0)
    there = torch.rand(2, *GRID, generator=generator) > 0.3
    return torch.randn(2, *GRID, D, generator=generator), there


def test_a_vector_is_a_token_by_one_projection() -> None:
    torch.manual_seed(0)
    model = AxialTransformer(config())
    pixels, there = vectors()
    assert config().patch_px == 1
    assert model.patch_embed.proj.weight.shape == (16, D)
    tokens, prefix = model(pixels, there, Place(*GRID))
    assert (tokens.shape, prefix.shape) == ((2, *GRID, 16), (2, 0, 16))
    assert not tokens[~there].any()
    assert tokens[there].abs().amin(-1).gt(0).all()
    torch.testing.assert_close(model(pixels, there)[0], tokens)  # the place follows from the size
    expected = model.patch_embed.proj(pixels).where(there[..., None], model.patch_embed.proj.bias)
    torch.testing.assert_close(model.patch_embed(pixels, there), expected)


def test_cells_without_a_vector_say_nothing() -> None:
    torch.manual_seed(0)
    model = Classifier(AxialTransformer(config()), 3, "mean")
    pixels, there = vectors()
    other = torch.where(there[..., None], pixels, torch.nan)
    torch.testing.assert_close(model(other, there), model(pixels, there))


def test_it_is_the_model_of_patches_of_one_px() -> None:
    torch.manual_seed(0)
    model, same = AxialTransformer(config()), AxialTransformer(config(patch=1))
    same.load_state_dict(model.state_dict())
    pixels, there = vectors()
    assert torch.equal(model(pixels, there)[0], same(pixels, there)[0])


def test_heads_are_of_one_cell() -> None:
    assert Segmenter(AxialTransformer(config()), classes=3, cells=1).head.out_features == 3
    assert MaskedReconstructor(AxialTransformer(config())).head.out_features == D
    with pytest.raises(ValueError, match=r"task\.cells=2 does not divide"):
        Segmenter(AxialTransformer(config()), classes=3, cells=2)


@pytest.mark.parametrize("patch", ["feature", "1", "", 0, -1, 1.0, True, None])
def test_another_patch_is_refused(patch: object) -> None:
    with pytest.raises(ValueError, match=r"model\.patch=.*: allowed are .* from 1, and features"):
        config(patch=patch)  # type: ignore[arg-type]


def test_a_file_of_weights_says_that_it_is_of_features() -> None:
    state = AxialTransformer(config()).state_dict()
    own = described(json.loads(json.dumps(asdict(config()))), "w")
    assert isinstance(own, AxialTransformerConfig)
    assert (own.patch, own.patch_px, own.bands) == (FEATURES, 1, D)
    timm, kept = to_timm({f"backbone.{name}": value for name, value in state.items()}, own, "w")
    assert (kept, timm["patch_embed.proj.weight"].shape) == ([], (16, D, 1, 1))
    back = from_timm_names(timm, own, "w")
    for name, value in state.items():
        assert torch.equal(back[f"backbone.{name}"], value), name


def test_command_line_takes_a_number_or_features() -> None:
    for override, patch, px in (("model.patch=8", 8, 8), ("model.patch=features", FEATURES, 1)):
        run, _, text = compose_run([override, "model.bands=1536", "data.shards=x"])
        assert (run.model.patch, run.model.patch_px, run.model.bands) == (patch, px, 1536)
        assert f"patch: {patch}" in text
    for wrong in ("model.patch=pixels", "model.patch=1.5", "model.patch=null", "model.patch=[8]"):
        with pytest.raises(ValueError, match=r"patch"):
            compose_run([wrong, "data.shards=x"])
