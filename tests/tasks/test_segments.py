"""Segments are those of plain loops over pixels, and those that one would draw by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from distributed.panoptic_ranks import CLASSES, PATCH, THINGS, a_config, a_scene, an_output
from distributed.task_ranks import IMAGES

from axialtrain.data.batch import Batch
from axialtrain.grid import Place
from axialtrain.mesh.mesh import Mesh
from axialtrain.tasks import merge
from axialtrain.tasks.instances import SEGMENTS
from axialtrain.tasks.merge import MergeConfig, find_centres, merged

GRID = (7, 5)
STUFF = 1 * SEGMENTS


def plain_segments(output: np.ndarray, here: np.ndarray, config: MergeConfig) -> np.ndarray:
    """[H, W] of one image, pixel by pixel, by the rules of the paper's code."""
    height, width = here.shape
    semantic = output[..., :CLASSES].argmax(-1)
    heat = np.where(here & (output[..., CLASSES] > config.threshold), output[..., CLASSES], -1)
    reach = config.nms // 2
    peaks = []
    heat = np.round(heat * 2**12)  # less is no difference; of equal ones the first is the centre
    heat = np.where(heat > 0, heat - np.arange(heat.size).reshape(heat.shape) / heat.size, 0)
    for row, col in np.argwhere(heat > 0):
        around = heat[max(0, row - reach) : row + reach + 1, max(0, col - reach) : col + reach + 1]
        if heat[row, col] == around.max():
            peaks.append((-heat[row, col], row, col))
    centres = [(row, col) for _, row, col in sorted(peaks)[: config.centres]]
    segments = np.full((height, width), -1)
    members: dict[int, list[tuple[int, int]]] = {}
    stuff: dict[int, list[tuple[int, int]]] = {}
    for row, col in np.argwhere(here):
        if semantic[row, col] not in THINGS:
            stuff.setdefault(semantic[row, col], []).append((row, col))
        elif centres:
            y, x = output[row, col, CLASSES + 1 :] + (row, col)
            distances = [(y - a) ** 2 + (x - b) ** 2 for a, b in centres]
            members.setdefault(distances.index(min(distances)), []).append((row, col))
    for number, pixels in members.items():
        votes = [semantic[pixel] for pixel in pixels]
        winner = max(THINGS, key=lambda c, votes=votes: (votes.count(c), -c))
        for pixel in pixels:
            segments[pixel] = winner * SEGMENTS + number + 1
    for kind, pixels in stuff.items():
        for pixel in pixels if len(pixels) >= config.stuff_area else ():
            segments[pixel] = kind * SEGMENTS
    return segments


@pytest.mark.parametrize("chunk", [7, 2**20])
def test_segments_are_those_of_a_plain_loop(chunk, monkeypatch):
    monkeypatch.setattr(merge, "CHUNK", chunk)
    scene = a_scene(GRID)
    scene.valid[0, :2] = False  # a tile that could not be read
    output = an_output(scene)
    config = a_config().merge
    got = merged(output, scene, THINGS, config, Mesh()).numpy()
    assert got.dtype == np.int64
    here = scene.present & scene.valid.repeat_interleave(PATCH, 1).repeat_interleave(PATCH, 2)
    for image in range(IMAGES):
        want = plain_segments(output[image].numpy(), here[image].numpy(), config)
        np.testing.assert_array_equal(got[image], want)
    void, *segments = np.unique(got[0])
    assert void == -1
    ids = np.array(segments) % SEGMENTS
    assert ids.max() == config.centres, "there are more, and the hottest are taken"
    assert ids.min() == 0


def by_hand(semantic: list[int], heats: dict[int, float], offsets: list[float], **options):
    """Segments of a line of pixels, all present: each of a class; class 0 is of things."""
    width = len(semantic)
    output = torch.zeros(1, 1, width, 2 + 3)
    output[0, 0, range(width), semantic] = 5
    for col, heat in heats.items():
        output[0, 0, col, 2] = heat
    output[0, 0, :, 4] = torch.tensor(offsets)
    batch = Batch(
        pixels=torch.zeros(1, 1, width, 3),
        labels=None,
        present=torch.ones(1, 1, width, dtype=torch.bool),
        valid=torch.ones(1, 1, width, dtype=torch.bool),
        weight=torch.ones(1),
        place=Place(1, width),
        ids=("line",),
        samples=torch.zeros(1, dtype=torch.int64),
    )
    config = MergeConfig(**{"nms": 3, "stuff_area": 2} | options)
    return merged(output, batch, [0], config, Mesh())[0, 0].tolist()


def test_two_instances_of_one_class():
    segments = by_hand([0, 0, 1, 1, 0, 0], {0: 0.5, 5: 0.9}, [0, -1, 0, 0, 1, 0])
    assert segments == [2, 2, STUFF, STUFF, 1, 1], "the hottest centre is the first"


def test_offsets_say_whose_a_pixel_is():
    assert by_hand([0] * 6, {0: 0.5, 5: 0.9}, [5, -1, 3, -3, -4, -5]) == [1, 2, 1, 2, 2, 2]


def test_a_pixel_between_two_centres_is_the_hotter_ones():
    assert by_hand([0] * 5, {0: 0.5, 4: 0.9}, [0] * 5) == [2, 2, 1, 1, 1]


def test_centres_of_equal_heat_come_in_the_order_of_lines():
    assert by_hand([0] * 5, {0: 0.9, 4: 0.9}, [0] * 5) == [1, 1, 1, 2, 2]
    assert by_hand([0] * 5, {0: 0.9, 4: 0.9}, [0] * 5, centres=1) == [1] * 5


def test_without_a_centre_things_are_void():
    assert by_hand([0, 0, 1, 1], {1: 0.1}, [0] * 4) == [-1, -1, STUFF, STUFF]
    assert by_hand([0, 0, 1, 1], {1: 0.11}, [0] * 4) == [1, 1, STUFF, STUFF]


def test_a_centre_is_the_hottest_around():
    assert by_hand([0] * 4, {0: 0.5, 1: 0.6}, [0] * 4) == [1] * 4
    assert by_hand([0] * 4, {0: 0.5, 1: 0.6}, [0] * 4, nms=1) == [2, 1, 1, 1]


def test_little_stuff_is_void():
    assert by_hand([1, 0, 0], {1: 0.5}, [0] * 3) == [-1, 1, 1]
    assert by_hand([1, 0, 0], {1: 0.5}, [0] * 3, stuff_area=1) == [STUFF, 1, 1]


def test_of_a_plateau_the_first_pixel_is_the_centre():
    """And of heats that differ by less than the rounding of a mesh may come to."""
    heat = torch.zeros(1, 20, 30, dtype=torch.float64)
    heat[0, 3:6, 4:9] = 0.5
    heat[0, 3:6, 20] = 0.5 + torch.tensor([0, 1e-9, -1e-9])
    heat[0, 15, 4:6] = torch.tensor([0.5, 0.501])
    (centres,) = find_centres(heat, Place(20, 30), MergeConfig(), Mesh())
    assert centres.tolist() == [[15, 5], [3, 4], [3, 20]]


def test_the_hottest_are_taken_then_the_first():
    heat = torch.zeros(1, 40, 50)
    heat[0, ::8, ::8] = 0.5
    heat[0, 16, 24] = 0.7
    for most in (10, 100):
        (centres,) = find_centres(heat, Place(40, 50), MergeConfig(centres=most), Mesh())
        others = [[y, x] for y in range(0, 40, 8) for x in range(0, 50, 8) if (y, x) != (16, 24)]
        assert centres.tolist() == [[16, 24], *others][:most]
