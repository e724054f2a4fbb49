"""`train.compile`: the layers of an axial transformer, compiled by torch, each in place.

A layer is one graph, with no break in it, for each size of the token grid (and with and without a
mask), so a run over images of bucketed sizes compiles once for each bucket. Where something has to
come between passes (swaps on a mesh that splits the image, the bands of `train.recompute_band`,
draws of numpy), each pass is one, and all bands of a size share it. The sums over the tensor axis
are in the graphs. Weights keep their names. What has no graph is refused: other collectives within
an image than swaps, the hooks with which ZeRO 3 gathers weights inside of a layer, a learned bias.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from sysconfig import get_path
from typing import Any

import torch
from torch import nn

from axialtrain.mesh.collectives import gather_objects
from axialtrain.mesh.mesh import Group, MeshConfig
from axialtrain.models.layer import Layer
from axialtrain.models.transformer import AxialTransformerConfig
from axialtrain.train.alike import RefusedError

GRAPHS = 64  # of a layer: sizes, with and without mask, training and evaluation
# Of each of these in passes: bands of two sizes; forward, and forward in backward, each of a pass
# that is run or left out; evaluation
OF_PASS = 10


def check_compile(model: object, mesh: MeshConfig, stage: int) -> None:
    """Raise ValueError where train.compile=true does not go with the rest of a run."""
    if not isinstance(model, AxialTransformerConfig):
        raise ValueError(
            f"train.compile=true, and model is {type(model).__name__}: allowed are axial "
            "transformers, or train.compile=false"
        )
    if mesh.row * mesh.col > 1:
        _check_split(model, mesh)
    if stage == 3:
        raise ValueError(
            "train.compile=true, and zero.stage=3, which gathers weights inside of a layer: "
            "allowed are 0, 1, 2, or train.compile=false"
        )
    if model.axial_config.positions == "relative":
        raise ValueError(
            "train.compile=true, and model.axial_config.positions=relative, whose gradient is "
            "taken in chunks without a graph: allowed are rope, axial, none, or train.compile=false"
        )
    if model.axial_config.fusion == "sum":
        for key, value in _draws(model).items():
            if value:
                raise ValueError(
                    f"train.compile=true, and model.{key}={value}, which is drawn between passes, "
                    "with model.axial_config.fusion=sum, whose passes are one graph: allowed is "
                    f"model.{key}=0, fusion=sequential, or train.compile=false"
                )


def _draws(model: AxialTransformerConfig) -> dict[str, float]:
    return {"drop_path": model.drop_path, "axial_config.skip_axis": model.axial_config.skip_axis}


def _check_split(model: AxialTransformerConfig, mesh: MeshConfig) -> None:
    """Where an image is split, tokens may meet in swaps alone, which come between two graphs."""
    axis = "row" if mesh.row > 1 else "col"
    axial = model.axial_config
    lines = all(len(which.dims) == 1 for which in model.passes)
    wants = (
        (mesh.exchange == "swap", "mesh.exchange", mesh.exchange, "swap"),
        (mesh.overlap == 1, "mesh.overlap", mesh.overlap, 1),
        (not model.prefix_tokens, "model.prefix_tokens", model.prefix_tokens, 0),
        (axial.fusion != "sum", "model.axial_config.fusion", axial.fusion, "sequential"),
        (lines, "model.axial_config.pattern", axial.pattern, "row and col"),
    )
    for met, key, value, allowed in wants:
        if not met:
            raise ValueError(
                f"train.compile=true, and mesh.{axis}={getattr(mesh, axis)}, with {key}={value}, "
                f"whose collectives are in no graph: allowed is {allowed}, mesh.row=1 and "
                "mesh.col=1, or train.compile=false"
            )


def check_compiler(device_type: str, world: Group) -> None:
    """Raise RefusedError, on every rank, where a host lacks what torch compiles with. Collective.

    For a CPU that is a C++ compiler and Python's headers. Of a GPU nothing is asked.
    """
    for host, lacking in gather_objects((socket.gethostname(), _lacking(device_type)), world):
        if lacking:
            raise RefusedError(
                f"train.compile=true, and {host} has no {lacking}, with which torch compiles for a "
                "CPU: allowed are a host that has it, or train.compile=false"
            )


def _lacking(device_type: str) -> str:
    if device_type != "cpu":
        return ""
    # Imported here: they are much of what torch takes to import, and of no use to other runs.
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "C++ compiler (g++, or the one that the environment's CXX names)"
    header = Path(get_path("include"), "Python.h")
    return "" if header.exists() else f"Python headers ({header})"


def compiles_passes(model: AxialTransformerConfig, mesh: MeshConfig, band: int) -> bool:
    """Whether `compile_layers` must go by passes. band: `train.recompute_band`."""
    return mesh.row * mesh.col > 1 or band > 0 or any(_draws(model).values())


def compile_layers(
    model: nn.Module, *, by_pass: bool = False, backend: str | Callable[..., Any] = "inductor"
) -> int:
    """Compile every layer of `model` where it stands; returns how many there are.

    by_pass: a graph of each pass, the last with the MLP, not of the whole layer: what exchanges
        tokens between passes, takes a pass in bands, or draws, stays outside.
    backend: torch's, by name or as a function. An operation without a graph is an error.
    Raises ValueError where the model has no layer of ours, or by_pass one whose passes are summed.
    """
    layers = [module for module in model.modules() if isinstance(module, Layer)]
    if not layers:
        raise ValueError(
            f"train.compile=true: a {type(model).__name__} has no layer of an axial transformer: "
            "allowed is train.compile=false"
        )
    if by_pass and any(layer.summed for layer in layers):
        raise ValueError("train.compile=true: summed passes are compiled as a layer alone")
    # All layers are one code to torch, and each has a graph of its own for each size. The limits
    # are raised while a layer is called, which is when torch compiles, and for nobody else's code:
    # an argument for them alone came with torch 2.13.
    limits, most = torch._dynamo.config, GRAPHS * len(layers)
    if by_pass:
        most *= OF_PASS * max(len(layer.passes) for layer in layers)
    raised = limits.patch(
        recompile_limit=max(limits.recompile_limit, most),
        accumulated_recompile_limit=max(limits.accumulated_recompile_limit, most),
    )
    options: dict[str, Any] = {"fullgraph": True, "dynamic": False, "backend": backend}
    if by_pass:
        one = raised(torch.compile(Layer.one_pass, **options))
        for layer in layers:
            layer.compiled_pass = one
        return len(layers)
    for layer in layers:
        layer.compile(**options)
        call = layer._compiled_call_impl
        assert call is not None, "it was compiled"
        layer._compiled_call_impl = raised(call)
    return len(layers)
