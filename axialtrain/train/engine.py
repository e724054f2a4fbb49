"""A model under DeepSpeed on our mesh. The only file that knows DeepSpeed.

DeepSpeed is told of two groups: the tensor axis as its model-parallel group, and data x row x col
together as its data-parallel one. Row and column ranks hold the same weights and each has a part of
the gradient, so to DeepSpeed they are replicas like any other. Told of them as sequence-parallel
ranks or as a second mesh dim, it does not sum their gradients at some ZeRO stages, with no error.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import logger as deepspeed_logger
from deepspeed.utils import safe_get_full_fp32_param
from torch import Tensor, nn

from axialtrain.mesh.mesh import Mesh
from axialtrain.mesh.parallelize import tensor_dims
from axialtrain.train.config import OptimConfig, ZeroConfig

# Elements of the buffers in which DeepSpeed sums gradients and gathers weights. It allocates them
# whole, whatever the size of the model; its default of 5e8 would be 2 GB.
BUCKET = 2**24


class _Topology:
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


class Engine:
    """A model being trained on a mesh, in fp32: forward, backward, optimizer step, whole weights.

    model: built serially, then spread with `parallelize(model, mesh)`.
    micro_batch: images per data rank at a time. accumulation: how many such an optimizer step has.

    The objective is the mean over ranks outside the tensor axis, and over the micro-batches of a
    step, of each one's loss. All methods but train, eval and close are collective.
    DeepSpeed keeps the mesh in a module global: one engine at a time in a process, and `close` at
    its end.

    Raises ValueError outside an initialized process group (one rank has one too), or where nothing
    in the model is to be trained.
    """

    def __init__(
        self,
        model: nn.Module,
        mesh: Mesh,
        *,
        optim: OptimConfig,
        zero: ZeroConfig,
        micro_batch: int,
        accumulation: int,
    ) -> None:
        if not dist.is_initialized():
            raise ValueError("training needs torch.distributed.init_process_group(), on 1 rank too")
        self.model = model
        self.mesh = mesh
        self._accumulation = accumulation
        self._pending = 0  # micro-batches since the last optimizer step
        self._split = tensor_dims(model)
        # Before DeepSpeed: at ZeRO 3 it empties the parameters.
        self.shapes = {
            name: self._whole_shape(name, value.shape) for name, value in model.state_dict().items()
        }

        _prepare_deepspeed()
        self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=_optimizer(model, optim),
            mpu=_Topology(mesh),
            config={
                # Never train_batch_size: DeepSpeed would derive one of the others from it.
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": optim.clip,  # left out, it would be 1.0
                "zero_allow_untested_optimizer": True,  # SGD
                "zero_optimization": {
                    "stage": zero.stage,
                    "reduce_bucket_size": BUCKET,
                    "allgather_bucket_size": BUCKET,
                    "stage3_param_persistence_threshold": zero.persistence_threshold,
                },
            },
        )
        self._stage = zero.stage
        self.device: torch.device = self._deepspeed.device

    def __call__(self, *args: Any, **options: Any) -> Any:
        """The model's forward, on tensors that are on `device`."""
        return self._deepspeed(*args, **options)

    def train(self) -> None:
        self._deepspeed.train()

    def eval(self) -> None:
        self._deepspeed.eval()

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch. `accumulation` of them make a step."""
        assert self._pending < self._accumulation, "step() is due"
        self._deepspeed.backward(loss)
        self._pending += 1
        if self._pending < self._accumulation:
            self._deepspeed.step()  # counts the micro-batch; the weights stay

    def step(self, lr: float) -> float:
        """Update the weights at learning rate `lr`. Returns the gradient's norm before clipping.

        Raises FloatingPointError, on all ranks alike and with the weights as they were, where the
        norm is not finite.
        """
        assert self._pending == self._accumulation, "backward() is due"
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        if self._stage == 0:
            # DeepSpeed reports no norm here, and would take the step whatever the norm is.
            norm = self._gradient_norm()
            _check_finite(norm)
            self._deepspeed.step()
        else:
            self._deepspeed.step()  # left out by DeepSpeed where the norm is not finite
            norm = float(self._deepspeed.get_global_grad_norm())
            _check_finite(norm)
        self._pending = 0
        return norm

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The state_dict of the serial model, one entry at a time: (name, whole tensor on the CPU).

        First the parameters, in fp32, then the persistent buffers as this rank has them. The
        tensors are copies. All ranks must run it to its end, with no other collective between.
        """
        for name, param in self.model.named_parameters():
            part = self._unpartitioned(param)
            if name in self._split:
                part = part.contiguous()
                parts = [torch.empty_like(part) for _ in range(self.mesh.tensor.size)]
                dist.all_gather(parts, part, group=self.mesh.tensor.handle)
                part = torch.cat(parts, self._split[name])
            yield name, part.to("cpu")
        for name, buffer in self.model.named_buffers():
            if name in self.shapes:
                yield name, buffer.detach().to("cpu", copy=True)

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model, and let its globals forget the mesh."""
        self._deepspeed.destroy()
        # It would keep the process groups alive, and answer with them where it is asked before the
        # next engine has set its own.
        deepspeed_groups.mpu = None

    def _unpartitioned(self, param: nn.Parameter) -> Tensor:
        """A copy of the parameter joined over the ranks that ZeRO dealt it out to."""
        master = safe_get_full_fp32_param(param)
        if master is not None:
            return master.detach()
        # ZeRO 0, or a parameter that is not trained: no optimizer has it.
        with deepspeed.zero.GatheredParameters([param], enabled=self._stage == 3):
            return param.detach().clone()

    def _whole_shape(self, name: str, shape: torch.Size) -> torch.Size:
        whole = list(shape)
        if name in self._split:
            whole[self._split[name]] *= self.mesh.tensor.size
        return torch.Size(whole)

    def _gradient_norm(self) -> float:
        """Of the summed gradients, where they are whole on each rank (ZeRO 0)."""
        split = torch.zeros((), dtype=torch.float64, device=self.device)
        replicated = split.clone()
        for name, param in self.model.named_parameters():
            if param.grad is not None:
                norm = torch.linalg.vector_norm(param.grad, dtype=torch.float64)
                (split if name in self._split else replicated).add_(norm.square())
        if self._split:
            dist.all_reduce(split, group=self.mesh.tensor.handle)
        return math.sqrt(float(split + replicated))


def _prepare_deepspeed() -> None:
    deepspeed_logger.setLevel(logging.WARNING)
    # An op that serves inference only: building it needs a compiler, and a build that is killed
    # leaves a lock on which every later run hangs.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    # It numbers parameters and modules (in a default argument) through the life of a process, and
    # ZeRO 3 compares the numbers between ranks, which may not have had the same engines before.
    deepspeed.zero.Init.param_id = 0
    DeepSpeedZeRoOffload._register_deepspeed_module.__defaults__ = ([0],)


def _check_finite(norm: float) -> None:
    if not math.isfinite(norm):
        raise FloatingPointError(f"the norm of the gradient is {norm}")


def _optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.Optimizer:
    trained = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not trained:
        raise ValueError("no parameter of the model requires a gradient")

    def decays(name: str, param: nn.Parameter) -> bool:
        # As timm does: no biases, norms and scales, and no positions and learned tokens.
        return param.ndim >= 2 and name.endswith("weight")

    decayed = [param for name, param in trained if decays(name, param)]
    others = [param for name, param in trained if not decays(name, param)]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.name == "adamw":
        first, second = config.betas
        return torch.optim.AdamW(groups, lr=config.lr, betas=(first, second))
    return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
