"""mIoU and PQ are torchmetrics' and the paper's, from counts that ranks send each other."""

import os
import subprocess
import sys
from fractions import Fraction

import pytest

import torchvision_ops  # isort: skip  # noqa: F401 (before torchmetrics, which is an oracle here)
import torch
from torchmetrics.classification import MulticlassJaccardIndex
from torchmetrics.detection import PanopticQuality

from axialtrain.mesh.mesh import Mesh
from axialtrain.tasks.instances import SEGMENTS, VOID
from axialtrain.tasks.metrics import (
    STATES,
    confusion_of,
    mean_iou,
    panoptic_quality,
    segment_matches,
)

CLASSES = 4


def matches(predicted, truth, weight=(1,)):
    predicted, truth = torch.as_tensor(predicted), torch.as_tensor(truth)
    return segment_matches(predicted, truth, torch.tensor(weight), CLASSES, Mesh())


def random_segments(seed, size=(3, 24, 30)):
    """Blocks of classes and instances, some void."""
    generator = torch.Generator().manual_seed(seed)
    count = size[0], size[1] // 6, size[2] // 6
    classes = torch.randint(CLASSES, count, generator=generator)
    ids = torch.randint(3, count, generator=generator) + 1
    segments = (classes * SEGMENTS + ids).where(torch.rand(count, generator=generator) < 0.8, VOID)
    return segments.repeat_interleave(6, 1).repeat_interleave(6, 2)


def pairs_of(segments, void):
    """As torchmetrics takes them: [..., 2], class and instance."""
    return torch.stack(
        [segments.div(SEGMENTS, rounding_mode="floor"), segments % SEGMENTS], -1
    ).where(segments[..., None] != VOID, torch.tensor([void, 0]))


def test_matches_are_those_of_torchmetrics():
    """What is void in the prediction is, for the paper's code, of a class that never occurs."""
    truth = random_segments(0)
    predicted = random_segments(0).roll((1, 2), (1, 2))
    predicted[:, :9] = random_segments(1)[:, :9]
    nothing = CLASSES
    oracle = PanopticQuality(set(range(CLASSES)), {nothing})
    oracle.update(pairs_of(predicted, nothing), pairs_of(truth, CLASSES + 1))
    states = matches(predicted, truth, (1, 1, 1))
    assert states.keys() == set(STATES)
    for name, got in states.items():
        expected = getattr(oracle, name)[:CLASSES].double()
        assert expected.any(), name
        # IoUs are fp32 there.
        torch.testing.assert_close(got, expected, rtol=1e-6 if name == STATES[0] else 0, atol=0)

    figures = panoptic_quality(states)
    oracle.return_sq_and_rq, oracle.false_positives[CLASSES] = True, 0  # nobody asks for that class
    assert list(figures) == ["pq", "sq", "rq"]
    assert list(figures.values()) == pytest.approx(oracle.compute().tolist(), rel=1e-6)


def test_an_image_that_does_not_count_does_not():
    truth, predicted = random_segments(0), random_segments(0).roll(1, 1)
    states = matches(predicted, truth, (1, 0, 1))
    some = matches(predicted[[0, 2]], truth[[0, 2]], (1, 1))
    everything = matches(predicted, truth, (1, 1, 1))
    for name in STATES:
        assert torch.equal(states[name], some[name])
    assert not torch.equal(states["iou_sum"], everything["iou_sum"])


A, B = 2 * SEGMENTS + 1, 2 * SEGMENTS + 2  # two instances of one class
OTHER = 1 * SEGMENTS


@pytest.mark.parametrize(
    ("predicted", "truth", "expected"),  # of class 2: sum of IoUs, TP, FP, FN
    [
        ([A, A, B, B], [B, B, A, A], (2, 2, 0, 0)),  # numbers say nothing
        ([A, A, A, A], [A, A, A, B], (Fraction(3, 4), 1, 0, 1)),  # one swallows the other
        ([A, A, B, B], [A, A, A, A], (0, 0, 2, 1)),  # halves are no match
        ([A, A, B, B], [A, A, VOID, B], (2, 2, 0, 0)),  # unlabelled: the union is without it
        ([A, A, B, B], [A, A, VOID, VOID], (1, 1, 0, 0)),  # nor is what lies there wrong
        ([A, A, A, B], [VOID, VOID, OTHER, OTHER], (0, 0, 1, 0)),  # unless less than half does
        ([A, A, OTHER, OTHER], [VOID, OTHER, OTHER, OTHER], (0, 0, 1, 0)),  # or just half
        ([A, A, VOID, VOID], [A, A, B, B], (1, 1, 0, 1)),  # no answer is a miss
        ([A, A, VOID, VOID], [A, A, A, B], (Fraction(2, 3), 1, 0, 1)),  # and costs IoU
        ([OTHER] * 4, [A, A, B, B], (0, 0, 0, 2)),
        ([VOID] * 4, [VOID] * 4, (0, 0, 0, 0)),
    ],
)
def test_matches_by_hand(predicted, truth, expected):
    states = matches([[predicted]], [[truth]])
    assert [states[name][2].item() for name in STATES] == pytest.approx(
        [float(value) for value in expected], rel=1e-15
    )


def test_figures_are_means_over_the_classes_that_occur():
    states = {name: torch.zeros(CLASSES, dtype=torch.float64) for name in STATES}
    assert panoptic_quality(states) == {"pq": 0, "sq": 0, "rq": 0}
    states["iou_sum"][0], states["true_positives"][0] = 1.5, 2
    states["false_positives"][0] = 2
    states["false_negatives"][3] = 1
    rq = 2 / 3
    assert panoptic_quality(states) == pytest.approx(
        {"pq": 0.75 * rq / 2, "sq": 0.375, "rq": rq / 2}
    )


def test_miou_is_that_of_torchmetrics():
    generator = torch.Generator().manual_seed(0)
    truth = torch.randint(CLASSES - 1, (500,), generator=generator)  # the last class does not occur
    predicted = truth.where(torch.rand(500, generator=generator) < 0.7, truth.roll(1))
    confusion = confusion_of(truth, predicted, CLASSES)
    assert confusion[0, 2] == ((truth == 0) & (predicted == 2)).sum()
    assert not torch.equal(confusion, confusion.T)
    expected = MulticlassJaccardIndex(CLASSES)(predicted, truth)
    assert mean_iou(confusion) == pytest.approx(expected.item(), rel=1e-6)
    assert mean_iou(torch.zeros(CLASSES, CLASSES)) == 0


PLAIN = """
import sys
import axialtrain.cli
from axialtrain.train.compose import compose_run
config, *_ = compose_run(["task=panoptic", "data.shards=x"])
print([name for name in ("torchmetrics", "torchvision") if name in sys.modules])
import torch
from axialtrain.tasks.metrics import mean_iou, panoptic_quality
one = torch.ones(2, dtype=torch.float64)
states = ("iou_sum", "true_positives", "false_positives", "false_negatives")
print(mean_iou(torch.eye(2)), panoptic_quality(dict.fromkeys(states, one))["pq"])
print([name for name in ("torchmetrics", "torchvision") if name in sys.modules])
"""


@pytest.mark.slow
@pytest.mark.parametrize("installed", [True, False], ids=["torchvision", "no torchvision"])
def test_it_needs_no_torchvision_and_only_figures_need_torchmetrics(installed, tmp_path):
    """Beside a torchvision that was built for another torch, which cannot be imported, or none."""
    code = PLAIN if installed else HIDDEN + PLAIN
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["[]", "1.0 0.5", "['torchmetrics']"], done.stderr


HIDDEN = """
import importlib.metadata, sys
found = importlib.metadata.distribution
class Hide:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torchvision":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hide())
def distribution(name):
    if name == "torchvision":
        raise importlib.metadata.PackageNotFoundError(name)
    return found(name)
importlib.metadata.distribution = distribution
importlib.metadata.version = lambda name: distribution(name).version
"""
