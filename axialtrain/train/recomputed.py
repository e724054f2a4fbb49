"""`train.recompute` and `train.recompute_band`: what they do not go with."""

from __future__ import annotations

from axialtrain.mesh.mesh import MeshConfig
from axialtrain.models.transformer import AxialTransformerConfig
from axialtrain.tasks.classification import ClassificationConfig
from axialtrain.tasks.reconstruction import ReconstructionConfig


def check_recompute(
    every: int, band: int, model: object, mesh: MeshConfig, stage: int, task: object
) -> None:
    """Raise ValueError where they do not go with the rest of a run.

    every, band: see `Recompute`. stage: of ZeRO.
    """
    for key, value in (("recompute", every), ("recompute_band", band)):
        if value and not isinstance(model, AxialTransformerConfig):
            raise ValueError(
                f"train.{key}={value}: only an axial transformer can: allowed is 0 with a model of "
                "another kind"
            )
    if not band:
        return
    assert isinstance(model, AxialTransformerConfig)
    key = f"train.recompute_band={band}"
    if isinstance(task, ReconstructionConfig):
        raise ValueError(
            f"{key}: leaves the pixels on the host, and task=reconstruction compares with them: "
            "allowed is 0, or another task"
        )
    if isinstance(task, ClassificationConfig) and task.distill.teacher is not None:
        raise ValueError(
            f"{key}: leaves the pixels on the host, and the teacher sees them at once: allowed is "
            f"0 with task.distill.teacher={task.distill.teacher}"
        )
    if not any(len(which.dims) == 1 for which in model.passes):
        raise ValueError(
            f"{key}: the model has no pass of rows or columns: allowed is 0 with "
            f"model.axial_config.pattern={model.axial_config.pattern}"
        )
    if model.prefix_tokens:
        raise ValueError(
            f"{key}: prefix tokens attend to all tokens at once: allowed is 0 with "
            f"model.prefix_tokens={model.prefix_tokens}"
        )
    if model.axial_config.fusion == "sum":
        raise ValueError(
            f"{key}: summed passes keep what they see: allowed is 0 with "
            "model.axial_config.fusion=sum"
        )
    if mesh.exchange != "swap":
        raise ValueError(
            f"{key}: a rank has whole lines where tokens are swapped alone: allowed is 0 with "
            f"mesh.exchange={mesh.exchange}"
        )
    if mesh.overlap > 1:
        raise ValueError(
            f"{key}: what arrives in bands is kept whole: allowed is 0 with "
            f"mesh.overlap={mesh.overlap}"
        )
    if stage == 3:
        raise ValueError(
            f"{key}: a pass runs again within its own backward, where no hook of zero.stage=3 "
            "gathers its weights: allowed is 0, or zero.stage of 0, 1, 2"
        )
