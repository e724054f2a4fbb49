"""Layers and models on a device that is not the CPU: everything is made there, the numbers are the
same, and the host waits for it no oftener than it must."""

from __future__ import annotations

import pytest
from distributed.other_device_ranks import GRID, a_layer, a_transformer, convolutional, embedded

from axialtrain.attention.config import AxialConfig
from axialtrain.models.recompute import Recompute

pytestmark = pytest.mark.slow  # a process that imports everything anew

PATTERNS = ["row+col", "window+shifted", "global", "window+row+col+global"]
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])


@pytest.mark.parametrize("prefix", [0, 2])
@MASKED
@pytest.mark.parametrize("positions", ["none", "rope", "relative"])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_layer(elsewhere, pattern, positions, masked, prefix):
    config = AxialConfig([pattern], positions=positions, window=4)
    found = elsewhere(a_layer, config=config, masked=masked, prefix=prefix)
    assert found.off < 1e-10
    # Once for rows and once for columns; windows, few tokens, and all with a bias are masked where
    # they are.
    lines = 0 if positions == "relative" else sum(word in pattern for word in ("row", "col"))
    assert found.waits == ["attention/compact.py:plan"] * lines * masked


def test_attention_in_chunks(elsewhere):
    config = AxialConfig(["row+col"], kernel="chunks")
    assert elsewhere(a_layer, config=config, masked=True, prefix=2).off < 1e-10


@pytest.mark.parametrize(
    "kept",
    [Recompute(), Recompute(1), Recompute(2, 1.0), Recompute(band=20), Recompute(2, 0.5, 20)],
    ids=str,
)
@MASKED
def test_a_transformer(elsewhere, kept, masked):
    found = elsewhere(a_transformer, kept=kept, masked=masked)
    assert found.off < 1e-10
    waits = [wait for wait in found.waits if wait != "backward"]
    if kept.offload:  # what waits on the host goes there, and comes back
        moved = ("models/recompute.py:run_layers", "models/by_band.py:backward")
        waits = [wait for wait in waits if wait not in moved]
    # Whether all tokens count; how rows and columns are compacted, all at once or band by band.
    lines = sum(GRID) if kept.band else 2
    assert (
        waits == ["models/transformer.py:encode"] + ["attention/compact.py:plan"] * lines * masked
    )


@MASKED
def test_embeddings_and_prefix(elsewhere, masked):
    assert elsewhere(embedded, masked=masked).off < 1e-10


@MASKED
def test_convolutional_models(elsewhere, masked):
    found = elsewhere(convolutional, masked=masked)
    assert found.off < 1e-10
    assert found.waits == ["models/axial_resnet.py:maps"] * masked  # whether all tokens count
