"""Axial-ResNet and Axial-DeepLab against torch's own functions, masks, spans and refusals."""

from __future__ import annotations

import itertools

import pytest
import torch
from plain_axial import Plain
from torch import Tensor, nn

from axialtrain.grid import Place
from axialtrain.mesh.mesh import MeshConfig
from axialtrain.models.axial_resnet import AxialResNet
from axialtrain.models.conv_config import AxialDeepLabConfig, AxialResNetConfig
from axialtrain.models.deeplab import AxialDeepLab, PanopticDeepLab, SemanticDeepLab
from axialtrain.models.heads import Classifier
from axialtrain.models.position_sensitive import PositionSensitiveAttention

CLASSES = 5


def resnet(**options) -> AxialResNetConfig:
    """Narrow, of few blocks, whose stages differ in how many they have."""
    return AxialResNetConfig(**{"layers": [1, 2, 1, 1], "width": 0.125, "heads": 2} | options)


def deeplab(**options) -> AxialDeepLabConfig:
    trunk = resnet(image=None, span=9, output_stride=16)
    sizes = {
        "semantic": 6,
        "instance": 5,
        "low_semantic": [3, 2],
        "low_instance": [2, 3],
        "head": 4,
    }
    return AxialDeepLabConfig(trunk=trunk, **{"aspp": [2, 3]} | sizes | options)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """Parameters and running statistics too: a zero hides a wrong gradient, a one a wrong norm."""
    generator = torch.Generator().manual_seed(seed)
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(noise, alpha=0.3 / max(1, parameter[0].numel()) ** 0.5)
        for name, buffer in model.named_buffers():
            drawn = torch.rand(buffer.shape, generator=generator, dtype=torch.float64)
            buffer.copy_(drawn + 0.5 if name.endswith("var") else drawn - 0.5)
    return model


def image(height: int, width: int, images: int = 2, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(images, height, width, 3, generator=generator, dtype=torch.float64)


def assert_same(model: nn.Module, plain: Plain, out: Tensor, want: Tensor) -> None:
    """Output, the gradient of every parameter, and the running statistics."""
    torch.testing.assert_close(out, want, rtol=1e-10, atol=1e-10)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    names = [name for name, _ in model.named_parameters()]
    found = torch.autograd.grad((out * grad).sum(), list(model.parameters()))
    expected = torch.autograd.grad(
        (want * grad).sum(), [plain.parameters[n] for n in names], materialize_grads=True
    )
    # What a softmax or a batch norm takes out behind it has a gradient of zero: see the others'.
    least = 1e-3 * max(float(one.abs().max()) for one in expected)
    for name, got, other in zip(names, found, expected, strict=True):
        scale = max(float(other.abs().max()), least)
        torch.testing.assert_close(got, other, rtol=0, atol=1e-10 * scale, msg=name)
    for name, buffer in model.named_buffers():
        torch.testing.assert_close(buffer, plain.buffers[name], rtol=1e-10, atol=1e-12, msg=name)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("size", "options"),
    [
        ((64, 96), {"image": [64, 96]}),
        ((96, 64), {"image": [128, 96]}),  # tables of a larger image: their middle
        ((64, 96), {"image": None, "span": 5}),
        ((64, 96), {"image": None, "span": 255, "output_stride": 16}),
    ],
    ids=["of its size", "smaller", "clipped", "stride 16"],
)
def test_the_classifier_is_torchs(size, options, training):
    config = resnet(**options)
    model = randomised(Classifier(AxialResNet(config), CLASSES, "mean")).train(training)
    plain = Plain(model, training)
    want = F_linear(plain, plain.resnet(image(*size), config, "backbone.")[-1].mean((2, 3)))
    assert_same(model, plain, model(image(*size)), want)


def F_linear(plain: Plain, x: Tensor) -> Tensor:  # noqa: N802
    weight, bias = plain.parameters["head.weight"], plain.parameters["head.bias"]
    return nn.functional.linear(x, weight, bias)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("aspp", [[2, 3], []], ids=["aspp", "without"])
def test_the_panoptic_model_is_torchs(aspp, training):
    config = deeplab(aspp=aspp)
    model = randomised(PanopticDeepLab(AxialDeepLab(config), CLASSES)).train(training)
    plain = Plain(model, training)
    out = model(image(64, 96))
    assert out.shape == (2, 64, 96, CLASSES + 3)
    assert_same(model, plain, out, plain.panoptic(image(64, 96), config))


def test_the_semantic_model_is_the_semantic_half_of_the_panoptic_one():
    config = deeplab()
    both = randomised(PanopticDeepLab(AxialDeepLab(config), CLASSES)).eval()
    half = SemanticDeepLab(AxialDeepLab(config), CLASSES).double().eval()
    missing, unexpected = half.load_state_dict(both.state_dict(), strict=False)
    assert not missing
    assert all(name.startswith(("instance.", "centre.", "offset.")) for name in unexpected)
    out = half(image(64, 96))
    torch.testing.assert_close(out, both(image(64, 96))[..., :CLASSES])


@pytest.mark.slow
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("kind", ["resnet", "deeplab"])
def test_an_image_that_ends_inside_the_grid_is_as_if_it_ended_there(kind, training):
    """Padding that holds anything: outputs, gradients and running statistics are the cut one's."""
    if kind == "resnet":
        model = Classifier(AxialResNet(resnet(image=None, span=6)), CLASSES, "mean")
        patch = 32
    else:
        model, patch = PanopticDeepLab(AxialDeepLab(deeplab()), CLASSES), 16
    model = randomised(model).train(training)
    grid, inside = (4, 5), (3, 4)
    pixels = image(grid[0] * patch, grid[1] * patch)
    cut = pixels[:, : inside[0] * patch, : inside[1] * patch].clone()
    valid = torch.zeros(2, *grid, dtype=torch.bool)
    valid[:, : inside[0], : inside[1]] = True
    pixels[:, inside[0] * patch :] = torch.nan
    pixels[:, :, inside[1] * patch :] = torch.nan
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    results = []
    for given, mask, place in ((pixels, valid, Place(*grid)), (cut, None, None)):
        model.load_state_dict(statistics, strict=False)
        out = model(given, mask, place)
        if kind == "deeplab":
            out = out[:, : inside[0] * patch, : inside[1] * patch]
        grads = torch.autograd.grad(out.square().sum(), list(model.parameters()))
        results.append((out, *grads, *(buffer.clone() for buffer in model.buffers())))
    for got, want in zip(*results, strict=True):
        scale = max(1e-3, float(want.detach().abs().max()))
        torch.testing.assert_close(got, want, rtol=0, atol=1e-9 * scale)


def test_batch_norms_start_as_published():
    model = AxialResNet(resnet())
    for block in itertools.chain(model.layer1, model.layer2, model.layer3, model.layer4):
        assert not block.bn2.weight.any(), "a block starts as its shortcut"
        assert (block.bn1.weight == 1).all()


@torch.no_grad()
def test_weights_start_with_the_published_deviations():
    torch.manual_seed(0)
    layer = PositionSensitiveAttention(64, 8, 56, axis=1)
    assert layer.qkv.weight.std() == pytest.approx(64**-0.5, rel=0.05)
    assert layer.relative.std() == pytest.approx(8**-0.5, rel=0.1)
    model = AxialResNet(AxialResNetConfig())
    assert model.conv1.weight.std() == pytest.approx((2 / (32 * 49)) ** 0.5, rel=0.05)
    block = model.layer3[0]
    assert block.conv_up.weight.std() == pytest.approx((2 / 512) ** 0.5, rel=0.05)
    assert block.downsample.conv.weight.std() == pytest.approx((2 / 512) ** 0.5, rel=0.05)


@pytest.mark.slow
def test_a_checkpoint_at_224_runs_at_384_x_640_with_tables_of_limited_span():
    """The same weights, another size: what torch's functions make of them there."""
    saved = randomised(Classifier(AxialResNet(resnet(span=20)), CLASSES, "mean")).eval()
    assert saved(image(224, 224, images=1)).shape == (1, CLASSES)
    config = resnet(image=[384, 640], span=20)
    model = Classifier(AxialResNet(config), CLASSES, "mean").double().eval()
    model.load_state_dict(saved.state_dict())
    plain = Plain(saved, training=False)
    maps = plain.resnet(image(384, 640, images=1), config, "backbone.")
    assert maps[-1].shape[2:] == (12, 20)
    want = F_linear(plain, maps[-1].mean((2, 3)))
    torch.testing.assert_close(model(image(384, 640, images=1)), want, rtol=1e-10, atol=1e-10)


def test_an_image_that_is_not_of_whole_tokens_is_refused_not_cropped():
    model = AxialResNet(resnet(image=[128, 128]))
    allowed = (
        r"pixels are \[B, 100, 96, 3\]: allowed here is \[B, 96, 96, 3\]; pad .* multiples of 32"
    )
    with pytest.raises(ValueError, match=allowed):
        model(image(100, 96).float())
    with pytest.raises(ValueError, match=r"allowed here is \[B, 64, 96, 3\]"):
        model(image(96, 96).float(), None, Place(2, 3))


def test_tables_of_an_images_span_differ_between_height_and_width():
    model = AxialResNet(resnet(image=[64, 160]))
    spans = [(block[0].height.span, block[0].width.span) for block in (model.layer1, model.layer4)]
    assert spans == [(16, 40), (4, 10)]  # the last stage's first block attends at stride 16
    assert model.layer2[1].height.span == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layers": [1, 1, 1]}, r"model.layers=\[1, 1, 1\]: allowed are 4 numbers"),
        ({"width": 0.1}, "model.width=0.1 makes 25 channels in a stage, which model.heads=2"),
        ({"width": 99.0}, "model.width=99.0: allowed are numbers up to"),
        ({"image": None}, "model.image=null needs model.span"),
        ({"image": [224]}, r"model.image=\[224\]: allowed are 2 numbers"),
        ({"span": 0}, "model.span=0: allowed are whole numbers from 1"),
        ({"output_stride": 8}, "model.output_stride=8: allowed are 16 and 32"),
        ({"heads": 0}, "model.heads=0: allowed are whole numbers from 1"),
        ({"name": "resnet"}, "model.name='resnet': allowed is 'axial_resnet'"),
    ],
)
def test_sizes_that_make_no_model_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        resnet(**options)


def test_decoders_need_stride_16():
    with pytest.raises(ValueError, match=r"model\.trunk\.output_stride=32: the decoders need 16"):
        AxialDeepLabConfig(trunk=resnet())


def test_an_image_larger_than_the_tables_is_refused():
    model = AxialResNet(resnet(image=[64, 64]))
    with pytest.raises(ValueError, match=r"64 x 96 px exceeds model.image=\[64, 64\].*model.span"):
        model(image(64, 96).float())


@pytest.mark.parametrize("config", [resnet(), deeplab()], ids=["resnet", "deeplab"])
def test_weights_in_parts_are_refused(config):
    config.check_mesh(MeshConfig(row=2, col=3, data=2))
    with pytest.raises(ValueError, match=r"mesh\.tensor=2: convolutional models.*allowed is 1"):
        config.check_mesh(MeshConfig(tensor=2))
    with pytest.raises(ValueError, match=r"mesh\.exchange=gather: .*allowed is swap"):
        config.check_mesh(MeshConfig(exchange="gather"))


def test_the_keys_of_a_trunk_are_named_as_such():
    config = AxialDeepLabConfig(trunk=resnet(image=[64, 64], output_stride=16))
    with pytest.raises(ValueError, match=r"exceeds model\.trunk\.image=.*with model\.trunk\.span"):
        config.check_grid(4, 5)
    with pytest.raises(ValueError, match=r"model\.trunk=3: allowed is a config of an axial_resnet"):
        AxialDeepLabConfig(trunk=3)
