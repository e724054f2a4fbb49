"""One transformer layer: its attention passes, then its MLP."""

from __future__ import annotations

from torch import Tensor, nn

from axialtrain.attention.config import Pass
from axialtrain.attention.passes import AxialAttention
from axialtrain.grid import Place
from axialtrain.mesh.exchange import Exchange


class Mlp(nn.Module):
    """fc1 -> GELU -> fc2, with timm's names."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, width)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(width, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    """Pre-norm transformer layer with one residual per attention pass and one for the MLP.

    It has the parameters of a standard ViT layer, under timm's names: its passes share norm1 and
    the projections of `attn`. Tokens move at most once per pass, and stay where the last pass
    left them: everything else is token by token.
    """

    def __init__(
        self, dim: int, heads: int, mlp_width: int, passes: tuple[Pass, ...], *, positions: str
    ) -> None:
        super().__init__()
        self.passes = passes
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = AxialAttention(dim, heads, positions=positions)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, mlp_width)
        self.exchange = Exchange()

    def exit(self, place: Place) -> Place:
        """Where the tokens are after this layer, known without running it."""
        return place.under(self.passes[-1].layout)

    def forward(self, x: Tensor, place: Place, valid: tuple[Tensor, ...]) -> Tensor:
        """x: [B, h, w, D] under place.layout -> [B, h', w', D] under self.exit(place).layout.

        valid: for each pass, [B, h, w] under its layout: the tokens that are keys.
        """
        for which, keys in zip(self.passes, valid, strict=True):
            x = self.exchange(x, place, which.layout)
            place = place.under(which.layout)
            x = x + self.attn(self.norm1(x), which, keys)
        return x + self.mlp(self.norm2(x))
