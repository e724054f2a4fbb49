"""Hidden tokens are the same on every mesh, and only their present pixels are targets."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from distributed.launcher import run_ranks
from distributed.task_ranks import (
    IMAGES,
    Case,
    per_pixel,
    plain_reconstruction,
    validated,
    whole_images,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from axialtrain.grid import Place
from axialtrain.mesh.mesh import MeshConfig
from axialtrain.tasks.reconstruction import Reconstruction, ReconstructionConfig, hidden_tokens

PATCH = 4
GRID = (3, 5)
TASK = Reconstruction(ReconstructionConfig(hidden=0.6), seed=3)

# --- Which tokens are hidden ----------------------------------------------------------------------

INDEX = st.integers(0, 2**40)


@settings(deadline=None)
@given(
    height=st.integers(1, 12),
    width=st.integers(1, 12),
    mesh=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    samples=st.lists(INDEX, min_size=1, max_size=3),
    seed=INDEX,
    share=st.floats(0.05, 0.95),
)
def test_what_ranks_hide_is_what_one_process_hides(height, width, mesh, samples, seed, share):
    mesh = (min(mesh[0], height), min(mesh[1], width))
    serial = hidden_tokens(Place(height, width), samples, share, seed)
    assert serial.shape == (len(samples), height, width)
    union = ~serial
    for at in np.ndindex(mesh):
        place = Place(height, width, shape=mesh, at=at)
        part = hidden_tokens(place, samples, share, seed)
        union[:, *place.rect.slices(Place(height, width).rect)] = part
    assert torch.equal(union, serial)
    # Nor does it matter what else is in the micro-batch, or how far its grid is padded.
    (alone,) = hidden_tokens(Place(height + 1, width + 1), samples[-1:], share, seed)
    assert torch.equal(alone[:height, :width], serial[-1])


def test_samples_seeds_and_rows_have_draws_of_their_own():
    place, size = Place(50, 60), 50 * 60
    draws = [hidden_tokens(place, [s], 0.5, seed) for s, seed in ((0, 0), (1, 0), (0, 1), (1, 1))]
    for i, first in enumerate(draws):
        for second in draws[:i]:
            assert abs(int((first == second).sum()) - size / 2) < 5 * (size / 4) ** 0.5
    (hidden,) = draws[0]
    for lag in range(1, 5):  # rows and columns do not tell of each other
        for here, there in ((hidden[lag:], hidden[:-lag]), (hidden[:, lag:], hidden[:, :-lag])):
            same, count = int((here == there).sum()), here.numel()
            assert abs(same - count / 2) < 5 * (count / 4) ** 0.5


@pytest.mark.parametrize("share", [0.1, 0.6, 0.9])
def test_the_share_is_right(share):
    hidden = hidden_tokens(Place(100, 100), range(10), share, seed=5).float()
    deviation = (share * (1 - share)) ** 0.5
    assert abs(float(hidden.mean()) - share) < 5 * deviation / hidden.numel() ** 0.5
    for dim in ((1, 2), (0, 2), (0, 1)):  # in each image, row and column
        means = hidden.mean(dim)
        assert (means - share).abs().max() < 5 * deviation / (hidden.numel() / len(means)) ** 0.5


@pytest.mark.parametrize("hidden", [0.0, 1.0, -0.5, float("nan")])
def test_what_is_not_allowed_is_named(hidden):
    with pytest.raises(ValueError, match=r"task\.hidden=.*allowed"):
        ReconstructionConfig(hidden=hidden)


# --- The loss -------------------------------------------------------------------------------------


def a_case(bands=3, patch=PATCH):
    """A batch, an output of the model, and which tokens are hidden."""
    batch = whole_images(GRID, patch, bands=bands, dtype=torch.float64)
    generator = torch.Generator().manual_seed(9)
    shape = (IMAGES, *GRID, patch * patch * bands)
    output = torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True)
    return batch, output, hidden_tokens(batch.place, batch.samples.tolist(), share=0.6, seed=3)


@pytest.mark.parametrize("bands", [1, 3, 4])
def test_loss_is_over_the_present_pixels_of_hidden_tokens(bands):
    batch, output, hidden = a_case(bands)
    tokens = batch.present.view(IMAGES, GRID[0], PATCH, GRID[1], PATCH).float().mean((2, 4))
    assert ((tokens > 0) & (tokens < 1) & hidden).any(), "a hidden token is partly missing"
    sums, targets = TASK.loss(output, batch)
    expected, count = plain_reconstruction(output, batch, hidden)
    assert targets.tolist() == count.tolist()
    assert targets.unique().numel() > 2
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(sums.sum(), output)
    (wanted,) = torch.autograd.grad(expected.sum(), output)
    torch.testing.assert_close(gradient, wanted, rtol=1e-12, atol=0)
    assert int(gradient.count_nonzero()) == int(targets.sum())


def test_missing_and_visible_pixels_are_no_targets():
    batch, output, hidden = a_case()
    target = (batch.present & per_pixel(hidden, PATCH))[..., None]
    assert target.any()
    assert (batch.present & ~target[..., 0]).any()
    others = replace(batch, pixels=batch.pixels.where(target, 77.0))
    for got, expected in zip(TASK.loss(output, others), TASK.loss(output, batch), strict=True):
        assert torch.equal(got, expected)
    changed = replace(batch, pixels=batch.pixels.where(~target, 77.0))
    assert not torch.equal(TASK.loss(output, changed)[0], TASK.loss(output, batch)[0])


@pytest.mark.parametrize("patch", [3, 6])
def test_a_perfect_output_has_no_loss_and_paints_the_image(patch):
    """The order of an output's values is that of a patch's pixels: bands, lines, columns."""
    batch, output, _ = a_case(patch=patch)
    height, width = GRID
    perfect = torch.empty_like(output)
    for y in range(height):
        for x in range(width):
            rows, cols = slice(y * patch, (y + 1) * patch), slice(x * patch, (x + 1) * patch)
            perfect[:, y, x] = batch.pixels[:, rows, cols].movedim(-1, 1).flatten(1)
    assert TASK.loss(perfect, batch)[0].tolist() == [0.0] * IMAGES
    image, _, painted = (p.pixels for p in TASK.panels(perfect, batch, mean=0.5, std=0.1))
    assert len(image) > height, "more than a pixel a token: their order can be seen"
    np.testing.assert_array_equal(painted, image)


def test_panels_show_image_what_the_model_saw_and_its_reconstruction():
    batch, output, hidden = a_case()
    panels = TASK.panels(output, batch, mean=0.4, std=0.1)
    assert [panel.title for panel in panels] == ["image", "seen", "reconstruction"]
    image, seen, painted = (panel.pixels for panel in panels)
    cells = image.shape[0] // GRID[0]
    assert image.shape == (GRID[0] * cells, GRID[1] * cells, 3)
    where = per_pixel(hidden[:1], cells)[0].numpy()
    assert (seen[where] == int(0.4 * 255)).all()  # the value that normalisation makes 0
    np.testing.assert_array_equal(seen[~where], image[~where])
    np.testing.assert_array_equal(painted[~where], image[~where])
    assert (painted[where] != image[where]).mean() > 0.5
    assert TASK.scores(output, batch) == TASK.summary({}) == {}


@pytest.mark.parametrize(
    "mesh",
    [MeshConfig(row=2, col=2), MeshConfig(data=2, row=2), MeshConfig(col=2, tensor=2)],
    ids=str,
)
def test_validation_and_picture_are_the_same_on_any_mesh(mesh):
    case = Case("reconstruction", (13, 10))
    (expected,) = run_ranks(validated, 1, case=case, mesh=MeshConfig())
    ranks = run_ranks(validated, 4, case=case, mesh=mesh)
    for got in ranks:
        assert got.metrics == pytest.approx(expected.metrics, rel=1e-10)
    for got, panel in zip(ranks[0].picture, expected.picture, strict=True):
        np.testing.assert_array_equal(got.pixels, panel.pixels)
