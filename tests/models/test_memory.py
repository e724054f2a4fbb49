"""What a step keeps, counted as it runs, against the arithmetic; and the gigapixels' sums."""

import pytest
import torch
from distributed.other_device_ranks import held_by_a_step
from torch.autograd.graph import saved_tensors_hooks

from axialtrain.bench.peak import Peak
from axialtrain.data.strips import STRIP
from axialtrain.grid import Place
from axialtrain.models.layer import Layer
from axialtrain.models.memory import step_memory
from axialtrain.models.recompute import Recompute
from axialtrain.models.registry import build_backbone
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig
from axialtrain.train.compose import compose_run

GIB = 2**30
SMALL = {"patch": 2, "dim": 64, "depth": 3, "heads": 2}


def saved_by(layer: Layer, side: int, band: int = 0) -> int:
    """Bytes of what a layer keeps for backward, each storage once, but for its weights."""
    found = {}
    weights = {value.untyped_storage().data_ptr() for value in layer.parameters()}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            found[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or it may be used anew
        return tensor

    x = torch.randn(1, side, side, layer.norm2.normalized_shape[0], requires_grad=True)
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        layer(x, x.new_zeros(1, 0, x.shape[-1]), Place(side, side), band=band)
    return sum(size for size, _ in found.values())


def test_evaluation_lets_go_of_what_a_pass_made_before_its_mlp():
    """Between its two passes and the MLP a layer holds the tokens once: with the norm's, and four
    times their width before GELU and behind it, 10 in all."""
    model = AxialTransformer(AxialTransformerConfig(**SMALL)).eval()
    x = torch.randn(1, 32, 32, 64)
    with torch.no_grad(), Peak() as peak:
        model.blocks[0](x, x.new_zeros(1, 0, 64), Place(32, 32))
    assert 10 <= peak.bytes / x.nbytes <= 10.1


@pytest.mark.parametrize("pattern", ["row", "row+col"])
@pytest.mark.parametrize("mlp_chunk", [None, 100], ids=["whole", "in chunks"])
def test_a_layer_keeps_what_is_counted(pattern, mlp_chunk):
    """To 3%: the angles of rotation, which are of one line, count nowhere."""
    side = 32
    config = AxialTransformerConfig(
        **SMALL, mlp_chunk=mlp_chunk, axial_config={"pattern": [pattern]}
    )
    got = saved_by(AxialTransformer(config).blocks[0], side)
    memory = step_memory(config, Recompute(1), tokens=side**2, parameters=0, value_bytes=4)
    assert memory.layers <= got <= 1.03 * memory.layers


@pytest.mark.parametrize("pattern", ["row", "row+col"])
def test_in_bands_a_layer_keeps_the_inputs_of_its_passes_alone(pattern):
    side = 32
    config = AxialTransformerConfig(**SMALL, axial_config={"pattern": [pattern]})
    got = saved_by(AxialTransformer(config).blocks[0], side, band=64)
    way = Recompute(1, band=64)
    memory = step_memory(config, way, tokens=side**2, parameters=0, value_bytes=4)
    assert got == memory.layers == len(pattern.split("+")) * side**2 * 64 * 4


def held_by(model: AxialTransformer, side: int) -> int:
    """Bytes that a step holds at once beside weights and pixels."""
    pixels = torch.randn(1, 2 * side, 2 * side, 3)
    with Peak() as peak:
        model(pixels)[0].mean().backward()
    return peak.bytes


@pytest.mark.parametrize(
    ("way", "depth", "once"),
    [(Recompute(2, band=64), 4, 1), (Recompute(0, band=64), 2, 0), (Recompute(0, band=32), 2, 0)],
    ids=str,
)
def test_a_step_in_bands_holds_what_is_counted(way, depth, once):
    """To 6%, beside the tokens before the layers at hand, which count twice where they wait on the
    device. Narrow tokens: with few of them the gradients of weights, which go with these, count."""
    side, dim = 32, 8
    config = AxialTransformerConfig(**SMALL | {"depth": depth, "dim": dim})
    model = AxialTransformer(config)
    model.recompute = way
    memory = step_memory(config, way, tokens=side**2, parameters=0, value_bytes=4)
    want = memory.device - memory.pixels - once * side**2 * dim * 4
    of_norm = 2 * dim * 4 + 64  # gradients of the last norm's weights, and a loss
    assert 0.94 * want <= held_by(model, side) <= want + of_norm


@pytest.mark.parametrize(
    ("recompute", "kept", "host", "layers"),
    [
        (Recompute(), 0, 0, 3 * 14),
        (Recompute(1), 3, 0, 14),
        (Recompute(2), 2, 0, 28),
        (Recompute(1, 1.0), 0, 3, 14),
        (Recompute(1, 0.4), 2, 1, 14),
        (Recompute(2, 0.5, band=1), 1, 1, 4),
        (Recompute(0, band=1), 0, 0, 6),
    ],
    ids=str,
)
def test_tokens_wait_where_they_are_told_to(recompute, kept, host, layers):
    config = AxialTransformerConfig(**SMALL, mlp_chunk=1)
    memory = step_memory(config, recompute, tokens=100, parameters=7)
    once = 100 * 64 * 2
    assert (memory.kept, memory.host) == (kept * once, host * once)
    assert layers <= memory.layers / once <= 1.2 * layers  # beside it what is in fp32
    assert memory.weights == 7 * 20
    parts = (memory.weights, memory.pixels, memory.kept, memory.layers, memory.gradients)
    assert memory.device == sum(parts) + memory.band
    assert (memory.band > 0) == (recompute.band > 0)
    # The pixels of 2 x 2 px a token: on the device in fp32, and as patches; or one flag each, and
    # they in bf16 on the host.
    assert memory.pixels == 400 * (1 if recompute.band else 3 * 6)
    assert memory.of_host - memory.host == (400 * (3 * 2 + 1) if recompute.band else 0)


def test_passes_whose_memory_is_not_known_are_refused():
    config = AxialTransformerConfig(**SMALL, axial_config={"pattern": ["row+global"]})
    with pytest.raises(ValueError, match=r"memory of \['global'\] passes is not known: allowed"):
        step_memory(config, Recompute(), tokens=1, parameters=1)


def experiment(name: str, way: Recompute | None = None):
    """(the composed config, the memory of its step, kept in its own `way` or another)."""
    config = compose_run([f"experiment={name}", "data.shards=x"])[0]
    with torch.device("meta"):
        parameters = sum(value.numel() for value in build_backbone(config.model).parameters())
    train, tokens = config.train, (config.data.window[0] // config.model.patch) ** 2
    own = Recompute(train.recompute, train.offload, train.recompute_band)
    return config, step_memory(config.model, way or own, tokens=tokens, parameters=parameters)


@pytest.mark.parametrize(
    ("name", "side"), [("gigapixel_h200", 2048), ("four_gigapixels_h200", 4096)]
)
def test_the_step_of_an_experiment_fits_one_gpu(name, side):
    config, memory = experiment(name)
    assert [size // config.model.patch for size in config.data.window] == [side, side]
    assert (config.model.dim, config.model.depth) == (512, 12)
    assert (config.train.precision, config.mesh.size) == ("bf16", 1)
    assert 100 * GIB < memory.device <= 120 * GIB


def test_the_gigapixel_fits_in_other_ways():
    """What its comment says of them."""
    assert 65 * GIB < experiment("gigapixel_h200", Recompute(1, band=65536))[1].device < 70 * GIB
    assert 120 * GIB < experiment("gigapixel_h200", Recompute(1, 0.5))[1].device < 125 * GIB


def test_what_waits_of_four_gigapixels_fits_the_host():
    """Beside a strip that is being read, and some GiB of the process itself."""
    config, memory = experiment("four_gigapixels_h200")
    assert config.data.prefetch == 0
    once = 4096**2 * 512 * 2
    assert (memory.kept, memory.host) == (once, 5 * once)
    strip = STRIP * (3 + 1 + 3 * 4 + 4)  # as read, in fp32, and a band of that on the way
    assert 100 * GIB < memory.of_host + strip <= 120 * GIB


@pytest.mark.parametrize("every", [1, 2, 3])
def test_four_gigapixels_do_not_fit_by_offloading_alone(every):
    """One layer computed again is 14 times the tokens, 240 GB, whatever is kept of the others."""
    _, memory = experiment("four_gigapixels_h200", Recompute(every, 1.0))
    assert memory.kept == 0
    assert memory.layers > 130 * GIB


@pytest.mark.slow
def test_a_step_on_a_device_holds_what_is_counted(elsewhere):
    """As a gigapixel's does, on a window of 8192 px: 512 x 512 tokens, 3 of its 12 layers."""
    kept = Recompute(band=8192)
    config = AxialTransformerConfig(patch=16, dim=512, depth=3, heads=8, mlp_chunk=65_536)
    memory = step_memory(config, kept, tokens=512 * 512, parameters=0)
    held, host = elsewhere(held_by_a_step, config=config, kept=kept, side=8192)
    assert host == 0
    # None of the flags that say which pixels are there; gradients of 10 M weights beside them.
    want = memory.device - memory.pixels
    assert want <= held <= want + 10e6 * 2


@pytest.mark.slow
def test_tokens_that_wait_on_the_host_are_there_and_nowhere_else(elsewhere):
    """As those of four gigapixels do, on a window of 4096 px: 256 x 256 tokens, 6 layers."""
    kept = Recompute(2, 0.7, band=8192)
    config = AxialTransformerConfig(patch=16, dim=512, depth=6, heads=8, mlp_chunk=65_536)
    memory = step_memory(config, kept, tokens=256 * 256, parameters=0)
    held, host = elsewhere(held_by_a_step, config=config, kept=kept, side=4096)
    assert host == memory.host == 2 * 256 * 256 * 512 * 2
    without = memory.device - memory.pixels - memory.band
    assert without + memory.band / 2 <= held <= without + memory.band + 19e6 * 2
