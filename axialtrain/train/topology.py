"""What DeepSpeed is told of the mesh."""

from __future__ import annotations

import torch.distributed as dist

from axialtrain.mesh.mesh import Mesh


class Topology:
    """The mesh as DeepSpeed asks for it (its `mpu`).

    It decides by `hasattr` what it is dealing with: a getter more, and it computes other gradients.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._tensor = mesh.tensor
        self._replicas = mesh.replicas

    def get_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tensor.handle

    def get_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_tensor_model_parallel_group(self) -> dist.ProcessGroup | None:
        return self._tensor.handle

    def get_tensor_model_parallel_rank(self) -> int:
        return self._tensor.rank

    def get_tensor_model_parallel_world_size(self) -> int:
        return self._tensor.size

    def get_data_parallel_group(self) -> dist.ProcessGroup | None:
        return self._replicas.handle

    def get_data_parallel_group_ranks(self) -> list[int]:
        return list(self._replicas.ranks)

    def get_data_parallel_rank(self) -> int:
        return self._replicas.rank

    def get_data_parallel_world_size(self) -> int:
        return self._replicas.size
