"""Tasks on Axial-ResNet and Axial-DeepLab: what `build` gives, and losses of classes per pixel."""

from __future__ import annotations

import pytest
import torch
from distributed.task_ranks import CLASSES, plain_segmentation, whole_images

from axialtrain.models.conv_config import AxialDeepLabConfig, AxialResNetConfig
from axialtrain.models.deeplab import SemanticDeepLab
from axialtrain.models.heads import Classifier, Segmenter
from axialtrain.models.registry import build_backbone
from axialtrain.tasks.classification import Classification, ClassificationConfig
from axialtrain.tasks.reconstruction import Reconstruction, ReconstructionConfig
from axialtrain.tasks.segmentation import Segmentation, SegmentationConfig

SMALL = {"layers": [1, 1, 1, 1], "width": 0.125, "heads": 2, "image": None, "span": 5}
RESNET = AxialResNetConfig(**SMALL)
DEEPLAB = AxialDeepLabConfig(
    trunk=AxialResNetConfig(**SMALL, output_stride=16),
    **{"aspp": [], "semantic": 8, "low_semantic": [4, 4]},
)
GRID, PATCH = (3, 2), 16


def test_an_axial_deeplab_segments_pixels():
    task = Segmentation(SegmentationConfig(CLASSES))
    torch.manual_seed(0)
    model = task.build(build_backbone(DEEPLAB)).double()
    assert isinstance(model, SemanticDeepLab)
    batch = whole_images(GRID, PATCH, dtype=torch.float64)
    logits = model(*task.inputs(batch))
    assert logits.shape == (*batch.labels.shape, CLASSES)
    sums, targets = task.loss(logits, batch)
    expected, count = plain_segmentation(logits, batch)
    assert targets.tolist() == count.tolist()
    torch.testing.assert_close(sums, expected, rtol=1e-12, atol=0)
    panels = task.panels(logits, batch, mean=0.5, std=0.25)
    assert {panel.pixels.shape for panel in panels} == {(GRID[0] * PATCH, GRID[1] * PATCH, 3)}
    scores = task.scores(logits, batch)
    assert 0 <= task.summary(scores)["accuracy"] <= 1


def test_an_axial_resnet_segments_cells_and_classifies():
    task = Segmentation(SegmentationConfig(CLASSES, cells=8))
    model = task.build(build_backbone(RESNET))
    assert isinstance(model, Segmenter)
    batch = whole_images(GRID, 32)
    logits = model.eval()(*task.inputs(batch))
    assert logits.shape[1:] == (3 * 8, 2 * 8, CLASSES)
    assert task.panels(logits, batch, mean=0.5, std=0.25)[0].pixels.shape == (24, 16, 3)
    model = Classification(ClassificationConfig(pool="mean")).build(build_backbone(RESNET))
    assert isinstance(model, Classifier)
    assert model.eval()(batch.pixels, batch.valid, batch.place).shape[1] == 2


def test_what_no_model_of_theirs_can_do():
    hidden = Reconstruction(ReconstructionConfig(), seed=0)
    for config in (RESNET, DEEPLAB):
        with pytest.raises(ValueError, match=r"task=reconstruction .* allowed are axial transf"):
            hidden.build(build_backbone(config))
    with pytest.raises(
        ValueError, match=r"^task=classification .*model=axial_deeplab .*allowed are"
    ):
        Classification(ClassificationConfig(pool="mean")).build(build_backbone(DEEPLAB))
    for pool, distilled in (("prefix", False), ("attention", False), ("prefix", True)):
        config = ClassificationConfig(pool=pool, distilled=distilled)
        with pytest.raises(ValueError, match=f"^pool='{pool}': an Axial-ResNet .*is 'mean'$"):
            Classification(config).build(build_backbone(RESNET))
    with pytest.raises(
        ValueError, match=r"^task\.cells=2: .*names a class per pixel already: allo"
    ):
        Segmentation(SegmentationConfig(cells=2)).build(build_backbone(DEEPLAB))
    with pytest.raises(ValueError, match=r"task\.cells=3 does not divide model\.patch=32"):
        Segmentation(SegmentationConfig(cells=3)).build(build_backbone(RESNET))
