"""One transformer layer: its attention passes, then its MLP."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from axialtrain.attention.config import AxialConfig
from axialtrain.attention.masks import GridMask
from axialtrain.attention.passes import AxialAttention
from axialtrain.grid import Layout, Place
from axialtrain.mesh.exchange import Exchange
from axialtrain.models.by_band import in_bands
from axialtrain.models.chance import Chance
from axialtrain.models.mlp import Mlp


class Norm(nn.LayerNorm):
    """torch's layer norm over the channels, which trains in bf16 on a CPU too.

    torch's CPU kernel adds up the gradients of weight and bias over the tokens in bf16 (measured:
    20,000 tokens gave a bias 0.03 of its gradient), so there all of it is computed in fp32. Its
    CUDA kernel does so by itself.
    """

    def __init__(self, dim: int) -> None:
        super().__init__(dim, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or self.weight.dtype not in (torch.bfloat16, torch.float16):
            return super().forward(x)
        weight, bias = self.weight.float(), self.bias.float()
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class LayerScale(nn.Module):
    """A learned factor per channel of a residual branch (CaiT, arXiv 2103.17239), as in timm."""

    def __init__(self, dim: int, start: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(start)))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Drawn(NamedTuple):
    """What a training step has drawn of one pass.

    skip: whether it is left out. keep: [B], the factor of its residual branch, None where it is 1;
    keep_mlp: that of the MLP's, after the last pass.
    """

    skip: bool = False
    keep: Tensor | None = None
    keep_mlp: Tensor | None = None


# Of a layer: (itself, x, prefix, place, number, valid, drawn, with_mlp) -> x and prefix.
OnePass = Callable[
    ["Layer", Tensor, Tensor, Place, int, GridMask | None, Drawn, bool], tuple[Tensor, Tensor]
]


class Layer(nn.Module):
    """Pre-norm transformer layer: attention passes, fused as `config` says, and one MLP.

    With shared projections it has the parameters of a standard ViT layer, under timm's names
    (norm1, attn, norm2, mlp). With separate ones, `attn` is a list with one entry per pass, and so
    is `norm1` where the passes run in sequence. Tokens move at most once per pass, and stay where
    the last pass left them: everything else is token by token.

    index: number of the layer. drop_path: chance that a residual branch is left out for an image
    while training (arXiv 1603.09382), the others being scaled up.
    grid: (H, W) that learned positions are made for, or None. qkv_bias: see `AxialAttention`.
    layer_scale: what `LayerScale` starts from, None for none. mlp_chunk: see `Mlp`.
    """

    def __init__(
        self,
        dim: int,
        heads: int,
        mlp_width: int,
        config: AxialConfig,
        *,
        index: int = 0,
        drop_path: float = 0.0,
        grid: tuple[int, int] | None = None,
        qkv_bias: bool = True,
        layer_scale: float | None = None,
        mlp_chunk: int | None = None,
    ) -> None:
        super().__init__()
        self.index = index
        self.drop_path = drop_path
        self.skip_axis = config.skip_axis
        self.summed = config.fusion == "sum"
        self.passes = config.passes(index)
        shared = config.share_projections or len(self.passes) == 1
        self.norm1: nn.Module = Norm(dim)
        if shared:
            self.attn: nn.Module = AxialAttention(
                dim, heads, self.passes, config, grid=grid, qkv_bias=qkv_bias
            )
        else:
            self.attn = nn.ModuleList(
                AxialAttention(dim, heads, (which,), config, grid=grid, qkv_bias=qkv_bias)
                for which in self.passes
            )
            if not self.summed:
                self.norm1 = nn.ModuleList(Norm(dim) for _ in self.passes)
        self.norm2: nn.Module = Norm(dim)
        self.mlp: nn.Module = Mlp(dim, mlp_width, mlp_chunk)
        self.ls1, self.ls2 = (
            nn.Identity() if layer_scale is None else LayerScale(dim, layer_scale) for _ in range(2)
        )
        self.exchange = Exchange()
        self.compiled_pass: OnePass | None = None  # in place of `one_pass`

    def __getstate__(self) -> dict[str, Any]:
        # As torch leaves out what `compile` made of a module.
        state: dict[str, Any] = super().__getstate__()
        return state | {"compiled_pass": None}

    def exit(self, place: Place) -> Place:
        """Where the tokens are after this layer, known without running it."""
        for which in self.passes:
            place = which.enters(place, self.exchange.kind)
        return place

    def forward(
        self,
        x: Tensor,
        prefix: Tensor,
        place: Place,
        valid: GridMask | Tensor | None = None,
        chance: Chance | None = None,
        band: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """x: [B, h, w, D] under place.layout -> [B, h', w', D] under self.exit(place).layout.

        prefix: [B, n, D], tokens beside the image, the same on every rank; n may be 0.
        valid: bool [B, H, W] of the whole grid, None where all tokens are.
        chance: the draws of a training step, None in evaluation.
        band: tokens at a time of a pass whose lines are whole here, or one line where it has more:
            nothing of the pass is kept but its input, and the MLP goes with the last pass. 0: all
            tokens at once, as always where there is a prefix, or where passes are summed.
        """
        skipped = None
        if chance is not None:
            skipped = chance.skipped(self.index, len(self.passes), self.skip_axis)
        if not self.summed:
            return self._sequence(x, prefix, place, valid, chance, skipped, band)
        x, prefix = self._sum(x, prefix, place, valid, chance, skipped)
        return self._ended(x, prefix, self._kept(x, chance, len(self.passes)))

    def _ended(self, x: Tensor, prefix: Tensor, keep: Tensor | None) -> tuple[Tensor, Tensor]:
        """What the MLP makes of tokens and prefix after all passes."""
        if prefix.shape[1]:
            prefix = self._after(prefix, keep)
        return self._after(x, keep), prefix

    def _after(self, x: Tensor, keep: Tensor | None) -> Tensor:
        return _add(x, self.ls2(self.mlp(self.norm2(x))), keep)

    def _sequence(
        self,
        x: Tensor,
        prefix: Tensor,
        place: Place,
        valid: GridMask | Tensor | None,
        chance: Chance | None,
        skipped: int | None,
        band: int,
    ) -> tuple[Tensor, Tensor]:
        valid = GridMask.of(valid)
        for number, which in enumerate(self.passes):
            goal = which.enters(place, self.exchange.kind)
            last = number == len(self.passes) - 1
            drawn = Drawn(
                number == skipped,
                self._kept(x, chance, number),
                self._kept(x, chance, len(self.passes)) if last else None,
            )
            # A prefix attends to the tokens of all bands at once.
            lines = len(which.dims) == 1 and goal.layout is not Layout.TILE and not prefix.shape[1]
            # A band or a graph has the MLP in it; else it comes when what the pass made is let go.
            within = False
            if lines and not band and self.exchange.in_bands(place, goal.layout):
                x = self._as_they_arrive(x, prefix, place, goal, number, valid, drawn)
            else:
                x = self.exchange(x, place, goal.layout)
                within = last and ((lines and band > 0) or self.compiled_pass is not None)
                if lines and band:
                    x = self._in_bands(x, prefix, goal, number, valid, drawn, within, band)
                else:
                    x, prefix = self._call(self, x, prefix, goal, number, valid, drawn, within)
            if last and not within:
                x, prefix = self._ended(x, prefix, drawn.keep_mlp)
            place = goal
        return x, prefix

    def one_pass(
        self,
        x: Tensor,
        prefix: Tensor,
        place: Place,
        number: int,
        valid: GridMask | None,
        drawn: Drawn,
        with_mlp: bool,
    ) -> tuple[Tensor, Tensor]:
        """Pass `number` where its tokens are, and the MLP behind it where asked for.

        x: [B, h, w, D] under place.layout, prefix: [B, n, D] -> the same.
        """
        which = self.passes[number]
        attn, norm = _of(self.attn, number), _of(self.norm1, number)
        out, of_prefix = attn(norm(x), _on(norm, prefix), place, which, valid, skip=drawn.skip)
        x, prefix = self._added(x, out, drawn.keep), self._added(prefix, of_prefix, drawn.keep)
        return self._ended(x, prefix, drawn.keep_mlp) if with_mlp else (x, prefix)

    @property
    def _call(self) -> OnePass:
        """`one_pass`, as it is or compiled."""
        return self.compiled_pass or Layer.one_pass

    def _as_they_arrive(
        self,
        x: Tensor,
        prefix: Tensor,
        place: Place,
        goal: Place,
        number: int,
        valid: GridMask | None,
        drawn: Drawn,
    ) -> Tensor:
        """Pass `number`, of rows or columns, on each band of lines while the next are on their way.

        prefix: [B, 0, D].
        """
        bands = self.exchange.bands(x, place, goal.layout)
        done = [
            self._call(self, lines, prefix, here, number, valid, drawn, False)[0]
            for lines, here in bands
        ]
        # along the dim that is not attended to
        return done[0] if len(done) == 1 else torch.cat(done, 3 - self.passes[number].dims[0])

    def _in_bands(
        self,
        x: Tensor,
        prefix: Tensor,
        place: Place,
        number: int,
        valid: GridMask | None,
        drawn: Drawn,
        with_mlp: bool,
        band: int,
    ) -> Tensor:
        """Pass `number`, of rows or columns, of which x alone is kept, with the MLP or without.

        prefix: [B, 0, D].
        """
        along = self.passes[number].dims[0]
        across = 3 - along
        lines = max(1, band // max(1, len(x) * x.shape[along]))  # of a band
        parts = [one.rect for one in place.bands(max(1, -(-x.shape[across] // lines)))]

        def run(tokens: Tensor, index: int) -> Tensor:
            # Lines know nothing of each other, so a band is a grid: one graph does for all of them.
            part = parts[index]
            here = Place(part.height, part.width, place.layout, coarse=True)
            mask = None if valid is None else valid.part(part)
            return self._call(self, tokens, prefix, here, number, mask, drawn, with_mlp)[0]

        sizes = [part.height if across == 1 else part.width for part in parts]
        used = [_of(self.attn, number), _of(self.norm1, number), self.ls1]
        if with_mlp:
            used += [self.norm2, self.mlp, self.ls2]
        return in_bands(run, x, sizes, across, used)

    def _sum(
        self,
        x: Tensor,
        prefix: Tensor,
        place: Place,
        valid: GridMask | Tensor | None,
        chance: Chance | None,
        skipped: int | None,
    ) -> tuple[Tensor, Tensor]:
        # Everything meets where the last pass is: the others' input goes out, and comes back.
        goal = self.exit(place)
        x, place = self.exchange(x, place, goal.layout), goal
        seen, seen_prefix = self.norm1(x), _on(self.norm1, prefix)
        keep = self._kept(x, chance, 0)
        for number, which in enumerate(self.passes):
            attn = _of(self.attn, number)
            if number == skipped:
                out, of_prefix = attn(seen, seen_prefix, place, which, valid, skip=True)
            else:
                there = which.enters(place, self.exchange.kind)
                moved = self.exchange(seen, place, there.layout)
                out, of_prefix = attn(moved, seen_prefix, there, which, valid)
                out = self.exchange(out, there, place.layout)
            x, prefix = self._added(x, out, keep), self._added(prefix, of_prefix, keep)
        return x, prefix

    def _added(self, x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
        return _add(x, self.ls1(branch), keep)

    def _kept(self, x: Tensor, chance: Chance | None, branch: int) -> Tensor | None:
        """[B], the factor of a residual branch of each image; None where it is 1.

        Passes are numbered 0, 1, ..., the MLP is the last branch. Drop-path and left-out passes
        are made up for alike, so that what runs has the expectation of evaluation.
        """
        if chance is None:
            return None
        factor = 1.0
        if branch < len(self.passes) and len(self.passes) > 1:
            factor = 1 / (1 - self.skip_axis / len(self.passes))
        if self.drop_path:
            kept = chance.kept(self.index, branch, self.drop_path)
            # Multiplied in fp32 at least, and rounded to x's dtype once.
            wide = torch.promote_types(x.dtype, torch.float32)
            factors = (torch.tensor(kept, dtype=wide) * factor).to(x.dtype)
            return factors.to(x.device, non_blocking=True)  # the host need not wait for it
        return None if factor == 1 else x.new_full((x.shape[0],), factor)


def _of(module: nn.Module, number: int) -> nn.Module:
    """The module of pass `number`: its own, or the one that the passes share."""
    return module[number] if isinstance(module, nn.ModuleList) else module


def _on(norm: nn.Module, prefix: Tensor) -> Tensor:
    """The normed prefix; where there is none, no work, and no gathering of the norm at ZeRO 3."""
    return norm(prefix) if prefix.shape[1] else prefix


def _add(x: Tensor, branch: Tensor, keep: Tensor | None) -> Tensor:
    """x: [B, ..., D] plus a residual branch, scaled for each image."""
    if keep is None:
        return x + branch
    return x + branch * keep.view(-1, *[1] * (x.ndim - 1))
