"""Training on ranks, and the same steps in plain torch without DeepSpeed, for any small model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from deepspeed.runtime.zero.parameter_offload import FWD_MODULE_STACK
from torch import Tensor, nn

from axialtrain.grid import Layout, Place, Rect
from axialtrain.mesh.collectives import sum_over
from axialtrain.mesh.exchange import Exchange
from axialtrain.mesh.mesh import Mesh, MeshConfig
from axialtrain.mesh.parallelize import parallelize
from axialtrain.models.transformer import AxialTransformer, AxialTransformerConfig
from axialtrain.train.config import OptimConfig, ZeroConfig
from axialtrain.train.engine import Engine
from axialtrain.train.optimizer import moment_keys


@dataclass(frozen=True)
class Task:
    """A model and its batches; the functions belong to a module, so that ranks can import them.

    build: the serial model, (inputs, place) -> logits [B, h, w, classes].
    batch: of an optimizer step: (inputs, targets [B, H, W], valid [B, H, W]) of the whole images.
    cut: the part of inputs in a rectangle of tokens.
    """

    build: Callable[[], nn.Module]
    batch: Callable[[int], tuple[Tensor, Tensor, Tensor]]
    cut: Callable[[Tensor, Rect], Tensor]


@dataclass
class Trained:
    losses: list[float]  # of each step, of the whole batch
    norms: list[float]  # of the gradient, before clipping
    weights: dict[str, Tensor]
    moments: dict[str, Tensor] = field(default_factory=dict)  # "exp_avg/NAME", of plain torch


# --- A toy like our models ------------------------------------------------------------------------

HEIGHT, WIDTH, IMAGES = 7, 5, 4
DIM, HEADS, HIDDEN, CHANNELS, CLASSES = 10, 2, 14, 3, 3  # no size of it divides by 4


class Attention(nn.Module):
    """Attention along rows, on whole rows. qkv is packed head by head."""

    def __init__(self) -> None:
        super().__init__()
        self.head_dim = DIM // HEADS
        self.qkv = nn.Linear(DIM, 3 * DIM)
        self.proj = nn.Linear(DIM, DIM)

    def forward(self, x: Tensor) -> Tensor:
        images, h, w, _ = x.shape
        qkv = self.qkv(x).view(images * h, w, -1, 3, self.head_dim).transpose(1, 2)
        q, k, v = qkv.unbind(3)
        # Bounded keys: softmax does not see what all keys have in common, and the gradient of their
        # bias would be nothing but rounding.
        out = F.scaled_dot_product_attention(q, k.tanh(), v)
        return self.proj(out.transpose(1, 2).reshape(images, h, w, -1))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(DIM, HIDDEN)
        self.fc2 = nn.Linear(HIDDEN, DIM)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.exchange = Exchange()
        self.norm1 = nn.LayerNorm(DIM)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(DIM)
        self.mlp = Mlp()

    def forward(self, x: Tensor, place: Place) -> Tensor:
        x = self.exchange(x, place, Layout.ROWS)
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return self.exchange(x, place.under(Layout.ROWS), Layout.TILE)


class Toy(nn.Module):
    """tokens [B, h, w, CHANNELS] under TILE -> logits [B, h, w, CLASSES] under TILE."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(CHANNELS, DIM)
        self.layers = nn.ModuleList(Layer() for _ in range(2))
        self.head = nn.Linear(DIM, CLASSES)
        self.frozen = nn.Parameter(torch.linspace(0.5, 1.5, DIM), requires_grad=False)
        self.register_buffer("offset", torch.arange(CLASSES) / 10)
        self.register_buffer("scratch", torch.ones(1), persistent=False)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        x = self.embed(x) * self.frozen
        for layer in self.layers:
            x = layer(x, place)
        return self.head(x) + self.offset


def build_toy() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Toy()


def toy_batch(step: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    x = torch.randn(IMAGES, HEIGHT, WIDTH, CHANNELS, generator=generator)
    targets = torch.randint(CLASSES, (IMAGES, HEIGHT, WIDTH), generator=generator)
    # Images of unequal valid counts, one of them of none.
    shares = torch.tensor([0.9, 0.5, 0.1, 0.0]).roll(step).view(-1, 1, 1)
    valid = torch.rand(IMAGES, HEIGHT, WIDTH, generator=generator) < shares
    return x, targets, valid


def cut_tokens(x: Tensor, rect: Rect) -> Tensor:
    return x[:, rect.top : rect.bottom, rect.left : rect.right]


TOY = Task(build_toy, toy_batch, cut_tokens)


# --- Plain torch ----------------------------------------------------------------------------------


def serial_steps(task: Task, optim: OptimConfig, rates: list[float]) -> Trained:
    """One step at each learning rate, on the whole batch at once."""
    model = task.build()
    named = {name: param for name, param in model.named_parameters() if param.requires_grad}
    trained = list(named.values())
    decayed = [p for name, p in named.items() if p.ndim >= 2 and name.endswith("weight")]
    others = [p for name, p in named.items() if p.ndim < 2 or not name.endswith("weight")]
    groups = [
        {"params": decayed, "weight_decay": optim.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer: torch.optim.Optimizer
    if optim.name == "adamw":
        optimizer = torch.optim.AdamW(groups, betas=(optim.betas[0], optim.betas[1]))
    else:
        optimizer = torch.optim.SGD(groups, momentum=optim.momentum)
    losses, norms = [], []
    for step, rate in enumerate(rates):
        inputs, targets, valid = task.batch(step)
        place = Place(targets.shape[1], targets.shape[2])
        errors = _errors(model(inputs, place), targets, valid)
        loss = (errors / valid.sum((1, 2)).clamp(min=1)).mean()
        optimizer.zero_grad()
        loss.backward()
        limit = optim.clip or float("inf")
        norms.append(float(torch.nn.utils.clip_grad_norm_(trained, limit)))
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    weights = {name: value.detach().clone() for name, value in model.state_dict().items()}
    moments = {
        f"{key}/{name}": optimizer.state[param][key].clone()
        for name, param in named.items()
        for key in moment_keys(optim)
    }
    return Trained(losses, norms, weights, moments)


def _errors(logits: Tensor, targets: Tensor, valid: Tensor) -> Tensor:
    """[B]: the sum of the cross-entropy over the valid tokens of each image."""
    errors = F.cross_entropy(logits.float().movedim(-1, 1), targets, reduction="none")
    return errors.where(valid, 0).sum((1, 2))


# --- On ranks -------------------------------------------------------------------------------------


def train_steps(
    task: Task,
    mesh: MeshConfig,
    zero: ZeroConfig,
    optim: OptimConfig,
    rates: list[float],
    accumulation: int = 2,
) -> Trained:
    """The same steps on this rank's part. Between steps, as a run does, it validates and gathers
    the weights."""
    axes = Mesh(**mesh.degrees)
    images = len(task.batch(0)[1])
    engine = Engine(
        parallelize(task.build(), axes),
        axes,
        optim=optim,
        zero=zero,
        micro_batch=images // (mesh.data * accumulation),
        accumulation=accumulation,
    )
    trained = Trained([], [], {})
    for step, rate in enumerate(rates):
        engine.train()
        loss, norm = one_step(engine, task, step, rate, accumulation)
        trained.losses.append(loss)
        trained.norms.append(norm)
        engine.eval()
        with torch.no_grad():
            inputs, targets, _ = task.batch(step)
            place = axes.place(targets.shape[1], targets.shape[2])
            engine(task.cut(inputs, place.rect), place)
        trained.weights = dict(engine.weights())
    engine.close()
    return trained


def one_step(
    engine: Engine,
    task: Task,
    step: int,
    rate: float,
    accumulation: int = 1,
    spoil: Callable[[Tensor, int], Tensor] = lambda loss, part: loss,
) -> tuple[float, float]:
    """(loss of the whole batch, norm of the gradient). spoil: what becomes of the loss of a
    micro-batch, before its backward."""
    axes, mesh = engine.mesh, engine.mesh.config
    inputs, targets, valid = task.batch(step)
    place = axes.place(targets.shape[1], targets.shape[2])
    images = len(targets)
    micro_batch = images // (mesh.data * accumulation)
    shown = 0.0
    for part in range(accumulation):
        first = (part * mesh.data + axes.coordinates["data"]) * micro_batch
        mine = slice(first, first + micro_batch)
        local = cut_tokens(valid[mine], place.rect)
        errors = _errors(
            engine(task.cut(inputs[mine], place.rect), place),
            cut_tokens(targets[mine], place.rect),
            local,
        )
        count = sum_over(local.sum((1, 2)), axes.spatial)
        scale = mesh.data * accumulation * mesh.row * mesh.col / images
        loss = scale * (errors / count.clamp(min=1)).sum()
        engine.backward(spoil(loss, part))
        shown += loss.item() / accumulation
    norm = engine.step(rate)
    return float(sum_over(torch.tensor(shown), axes.replicas)) / axes.replicas.size, norm


def left_afterwards() -> tuple[bool, int]:
    """Whether torch has its own linear again when an engine of stage 3 is closed, and how many more
    modules DeepSpeed then takes for running than before."""
    before, axes = len(FWD_MODULE_STACK), Mesh()
    engine = Engine(
        parallelize(build_toy(), axes),
        axes,
        optim=OptimConfig("sgd"),
        zero=ZeroConfig(3),
        micro_batch=1,
        accumulation=1,
    )
    engine.close()
    return F.linear is torch._C._nn.linear, len(FWD_MODULE_STACK) - before


# --- Our transformer, its MLP in chunks -----------------------------------------------------------


class Chunked(nn.Module):
    """A rank has more tokens than a chunk, or fewer, or a number that no chunk divides."""

    def __init__(self) -> None:
        super().__init__()
        config = AxialTransformerConfig(
            patch=1, dim=8, depth=2, heads=2, bands=CHANNELS, qkv_bias=False, mlp_chunk=15
        )
        self.backbone = AxialTransformer(config)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        logits: Tensor = self.head(self.backbone(x, None, place)[0])
        return logits


def build_chunked() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return Chunked()


CHUNKED = Task(build_chunked, toy_batch, cut_tokens)
