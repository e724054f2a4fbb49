"""A model under DeepSpeed on our mesh. The only file that knows DeepSpeed.

DeepSpeed is told of two groups: the tensor axis as its model-parallel group, and data x row x col
together as its data-parallel one. Row and column ranks hold the same weights and each has a part of
the gradient, so to DeepSpeed they are replicas like any other. Told of them as sequence-parallel
ranks or as a second mesh dim, it does not sum their gradients at some ZeRO stages, with no error.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import deepspeed
import deepspeed.runtime.compiler
import torch
import torch._dynamo  # torch's optimizers import it: here, local ranks share it
import torch.distributed as dist
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK, DeepSpeedZeRoOffload
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import groups as deepspeed_groups
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from axialtrain.mesh.mesh import Mesh
from axialtrain.mesh.parallelize import tensor_dims
from axialtrain.models.mlp import Mlp
from axialtrain.train import fragments
from axialtrain.train.config import OptimConfig, ZeroConfig
from axialtrain.train.fragments import Fragment
from axialtrain.train.optimizer import create_moments, moment_keys, torch_optimizer
from axialtrain.train.topology import Topology

# Elements of the buffers in which DeepSpeed sums gradients and gathers weights. It allocates them
# whole, whatever the size of the model; its default of 5e8 would be 2 GB.
BUCKET = 2**24


def _import_muon() -> None:
    """Import DeepSpeed's Muon, as it does itself with the first gradient, whatever the optimizer.

    Here local ranks share it; and it is left as Python, for it would be compiled by torch, which
    imports all of inductor: 2 s of processor time, for an optimizer that we do not have.
    """
    compiler = deepspeed.runtime.compiler
    compile_, compiler.compile = compiler.compile, lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = compile_


_import_muon()


class Engine:
    """A model being trained on a mesh: forward, backward, optimizer step, and its whole state.

    model: built serially, in fp32, then spread with `parallelize(model, mesh)`.
    micro_batch: images per data rank at a time. accumulation: how many such an optimizer step has.
    precision: "fp32", or "bf16": parameters and gradients in bf16, summed over ranks in fp32, with
    fp32 masters and moments in the optimizer. Neither needs a loss scale.

    The objective is the mean over ranks outside the tensor axis, and over the micro-batches of a
    step, of each one's loss. Buffers must be equal on all ranks, as what is saved is one rank's.
    All methods but train, eval and close are collective.
    DeepSpeed keeps the mesh in a module global: one engine at a time in a process, and `close` at
    its end.

    shapes: whole, of what `weights` gives. moments_of: the moments that each trained parameter has.
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
        precision: str = "fp32",
    ) -> None:
        if not dist.is_initialized():
            raise ValueError("training needs torch.distributed.init_process_group(), on 1 rank too")
        self.model = model
        self.mesh = mesh
        self._accumulation = accumulation
        self._pending = 0  # micro-batches since the last optimizer step
        self._split = tensor_dims(model)
        # Before DeepSpeed: at ZeRO 3 it empties the parameters.
        self._local = {name: value.shape for name, value in model.state_dict().items()}
        self.shapes = {name: self._whole_shape(name, shape) for name, shape in self._local.items()}

        # DeepSpeed makes its masters of weights already rounded to bf16.
        exact = {}
        if precision == "bf16":
            exact = {name: param.detach().clone() for name, param in model.named_parameters()}

        self._linear = torch.nn.functional.linear
        _prepare_deepspeed()
        if zero.stage == 3:
            # In chunks it uses the parameters of its projections without calling these, with whose
            # calls DeepSpeed gathers them.
            for module in model.modules():
                if isinstance(module, Mlp):
                    module.chunk = None
        self._deepspeed, self._optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=torch_optimizer(model, optim),
            mpu=Topology(mesh),
            config={
                # Never train_batch_size: DeepSpeed would derive one of the others from it.
                "train_micro_batch_size_per_gpu": micro_batch,
                "gradient_accumulation_steps": accumulation,
                "gradient_clipping": optim.clip,  # left out, it would be 1.0
                "zero_allow_untested_optimizer": True,  # SGD
                "bf16": {"enabled": precision == "bf16"},
                # Row and column ranks each have a part of a gradient: summed in bf16, the sum
                # would depend on the mesh far more than the parts do.
                "communication_data_type": "fp32",
                "zero_optimization": {
                    "stage": zero.stage,
                    "reduce_bucket_size": BUCKET,
                    "allgather_bucket_size": BUCKET,
                    "stage3_param_persistence_threshold": zero.persistence_threshold,
                },
            },
        )
        self._stage = zero.stage
        self._plain = zero.stage == 0 and precision == "fp32"  # torch's own optimizer
        self._torch: torch.optim.Optimizer = (
            self._optimizer if self._plain else self._optimizer.optimizer
        )
        self._fragments: dict[str, Fragment | None] = {
            name: self._fragment(param)
            for name, param in model.named_parameters()
            if param.requires_grad
        }
        for name, fragment in self._fragments.items():
            if name in exact and fragment is not None:
                # At ZeRO 0 it has also taken a step of weight decay with them.
                fragment.master.copy_(exact[name].reshape(-1)[fragment.part])
        # What is not trained has no master.
        self._frozen = {n: value for n, value in exact.items() if n not in self._fragments}
        del exact
        held = [fragment.flat for fragment in self._fragments.values() if fragment is not None]
        create_moments(self._torch, {id(flat): flat for flat in held}.values(), optim)
        self._moment_keys = moment_keys(optim)
        self.moments_of = dict.fromkeys(self._fragments, self._moment_keys)
        self._updates = 0
        self._buffers = self._copied_buffers()
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

        Where that is not finite, on all ranks alike, the gradient is dropped: weights and moments
        stay as they were, and buffers are again what they were after the step before.
        """
        assert self._pending == self._accumulation, "backward() is due"
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        self._pending = 0
        if self._plain:
            # DeepSpeed reports no norm here, and would take the step whatever the norm is.
            norm = self._gradient_norm()
            if math.isfinite(norm):
                self._deepspeed.step()
            else:
                self._deepspeed.zero_grad()
                self._deepspeed.micro_steps += 1  # or it would wait for one micro-batch more
        else:
            for name in self._split if self._stage == 0 else ():
                # In bf16 its norm is that of the gradients, which it asks for what only the
                # parameters say: that they are parts.
                grad: Any = self.model.get_parameter(name).grad
                grad.model_parallel = True
            self._deepspeed.step()  # left out by DeepSpeed where the norm is not finite
            norm = float(self._deepspeed.get_global_grad_norm())
        if math.isfinite(norm):
            self._updates += 1
            self._buffers = self._copied_buffers()
        else:
            for name, buffer in self.model.named_buffers():
                buffer.copy_(self._buffers[name])
        return norm

    @property
    def updates(self) -> int:
        """Optimizer steps that changed the weights: what Adam corrects its moments by."""
        return self._updates

    @property
    def loss_scale(self) -> float:
        return 1.0 if self._plain else float(self._optimizer.loss_scale)

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The state_dict of the serial model, one entry at a time: (name, whole tensor on the CPU).

        First the parameters, in fp32, then the persistent buffers as this rank has them. The
        tensors are copies. All ranks must run it to its end, with no other collective between.
        """
        yield from self._wholes(lambda fragment: fragment.master)
        for name, param in self.model.named_parameters():
            if name in self._frozen:
                yield name, self._joined(name, self._frozen[name].clone())
            elif name not in self._fragments:  # not trained: no optimizer has it
                with deepspeed.zero.GatheredParameters([param], enabled=self._stage == 3):
                    part = param.detach().to(torch.float32, copy=True)
                yield name, self._joined(name, part)
        for name, buffer in self.model.named_buffers():
            if name in self.shapes:
                yield name, buffer.detach().to("cpu", copy=True)

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """(name of a trained parameter, key of its moment, whole fp32 tensor on the CPU).

        Collective like `weights`. Zero before the first step.
        """
        for key in self._moment_keys:
            moment = partial(Fragment.moment, optimizer=self._torch, key=key)
            for name, whole in self._wholes(moment):
                yield name, key, whole

    def load(
        self,
        weights: Callable[[str], Tensor],
        moments: Callable[[str, str], Tensor],
        updates: int,
    ) -> None:
        """Take over a state that `weights`, `moments` and `updates` gave, on any mesh.

        weights, moments: give a whole tensor, on the CPU, by name, and by name and key. Asked on
        every rank in the same order, one at a time. Between optimizer steps only.
        """
        assert self._pending == 0, "step() is due"
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                value = self._part(name, weights(name))
                self._set_used(param, value)
                if name in self._frozen:
                    self._frozen[name].copy_(value)
                if name not in self._fragments:
                    continue
                fragment = self._fragments[name]
                if fragment is not None:
                    fragment.master.copy_(value.reshape(-1)[fragment.part])
                for key in self.moments_of[name]:
                    moment = self._part(name, moments(name, key)).reshape(-1)
                    if fragment is not None:
                        fragment.moment(self._torch, key).copy_(moment[fragment.part])
            for name, buffer in self.model.named_buffers():
                if name in self.shapes:
                    buffer.copy_(weights(name))
        for state in self._torch.state.values():
            if "step" in state:
                state["step"].fill_(updates)
        self._updates = updates
        self._buffers = self._copied_buffers()

    def close(self) -> None:
        """Take DeepSpeed's hooks off the model, and let its globals forget the mesh."""
        self._deepspeed.destroy()
        # ZeRO 3 keeps the model on its stack of modules that run, and with it groups and states.
        # What a cache of its coordinator keeps (`__params_to_release`) stays with the process.
        own = set(self.model.modules())
        FWD_MODULE_STACK[:] = [one for one in FWD_MODULE_STACK if one not in own]
        # ZeRO 3 puts its own there, whose gradients come in another order, also in later engines.
        torch.nn.functional.linear = self._linear
        # It would keep the process groups alive, and answer with them where it is asked before the
        # next engine has set its own.
        deepspeed_groups.mpu = None

    def _fragment(self, param: nn.Parameter) -> Fragment | None:
        if self._plain:
            return fragments.of_plain(param)
        if self._stage == 0:
            return fragments.of_whole_masters(self._optimizer, param)
        if self._stage == 3:
            return fragments.of_slice(self._optimizer, param)
        return fragments.of_partition(self._optimizer, param)

    def _wholes(self, view: Callable[[Fragment], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """What the ranks have of each trained parameter, joined, on the CPU."""
        for names in self._buckets():
            sizes = [self._local[name].numel() for name in names]
            # One collective for many small parameters; adding zeros changes nothing.
            flat = torch.zeros(sum(sizes), device=self.device)
            for name, part in zip(names, flat.split(sizes), strict=True):
                if (fragment := self._fragments[name]) is not None:
                    part[fragment.part] = view(fragment).detach()
            if self._stage > 0:  # else every rank has the whole
                dist.all_reduce(flat, group=self.mesh.replicas.handle)
            for name, part in zip(names, flat.split(sizes), strict=True):
                yield name, self._joined(name, part.view(self._local[name]).clone())

    def _buckets(self) -> Iterator[list[str]]:
        """The trained parameters, as many at a time as BUCKET elements hold, or one."""
        bucket: list[str] = []
        held = 0
        for name in self._fragments:
            size = self._local[name].numel()
            if bucket and held + size > BUCKET:
                yield bucket
                bucket, held = [], 0
            bucket.append(name)
            held += size
        yield bucket

    def _joined(self, name: str, part: Tensor) -> Tensor:
        """`part` of each tensor rank, side by side, on the CPU."""
        if name in self._split:
            part = part.contiguous()
            parts = [torch.empty_like(part) for _ in range(self.mesh.tensor.size)]
            dist.all_gather(parts, part, group=self.mesh.tensor.handle)
            part = torch.cat(parts, self._split[name])
        return part.to("cpu")

    def _copied_buffers(self) -> dict[str, Tensor]:
        return {name: buffer.detach().clone() for name, buffer in self.model.named_buffers()}

    def _part(self, name: str, whole: Tensor) -> Tensor:
        """This tensor rank's part of a whole parameter, on its device."""
        if whole.shape != self.shapes[name]:
            raise ValueError(
                f"{name} is {tuple(whole.shape)}, allowed is {tuple(self.shapes[name])}"
            )
        if name in self._split:
            tensor = self.mesh.tensor
            whole = whole.chunk(tensor.size, self._split[name])[tensor.rank]
        return whole.to(self.device)

    def _set_used(self, param: nn.Parameter, value: Tensor) -> None:
        """Write what the forward reads, which is not the master."""
        if self._stage == 3:
            whole = param.ds_status == ZeroParamStatus.AVAILABLE  # type: ignore[attr-defined]
            fragments.set_slice(param, value, kept_whole=whole)
        else:
            param.copy_(value)

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
