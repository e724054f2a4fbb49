"""What `axialtrain models` counts is what the formulas of the layers say, and the page says it."""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from repository import REPOSITORY
from torch.utils.flop_counter import FlopCounterMode

from axialtrain.bench.zoo import BEGIN, END, HEAD, Row, rows
from axialtrain.cli import main
from axialtrain.models.position_sensitive import PositionSensitiveAttention
from axialtrain.models.registry import list_models, model_config

PAGE = REPOSITORY / "docs" / "models.md"
RESNETS = {  # parameters, multiply-adds in G of 224 x 224 px (the first three as published)
    "axial_resnet50s": (11_586_216, "2.843"),
    "axial_resnet50m": (25_179_400, "5.955"),
    "axial_resnet50l": (43_973_480, "10.194"),
    "axial_resnet26s": (5_944_936, "1.812"),
    "conv_stem_axial_resnet50s": (12_481_000, "2.843"),
}
QUICK = ("axial_resnet26s", "axial_resnet50s", "axial_vit_tiny_patch16")


def each(names):
    return [
        pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK), id=name)
        for name in names
    ]


@cache
def row_of(name) -> Row:
    (row,) = rows(name)
    return row


def of_resnet(config) -> int:
    """Multiply-adds, layer by layer, of 224 x 224 px and 1000 classes."""
    total = 112**2 * 7 * 7 * 3 * config.stem
    side, inputs = 56, config.stem
    for stage, (blocks, c) in enumerate(zip(config.layers, config.channels, strict=True)):
        for block in range(blocks):
            cells = side**2
            total += cells * inputs * c  # 1 x 1
            # Twice: q, k and v; q k, q r and k r of c / 2 channels; values and their positions.
            total += 2 * (cells * c * 2 * c + cells * side * (3 * c // 2 + 2 * c))
            if block == 0 and stage > 0:
                side //= 2
            total += side**2 * c * 2 * c
            if block == 0:
                total += side**2 * inputs * 2 * c  # the shortcut
            inputs = 2 * c
    return total + inputs * 1000


def of_vit(config) -> int:
    """Multiply-adds of rows and columns of 224 x 224 px, a class token and 1000 classes."""
    side, d = 224 // config.patch, config.dim
    grid = side**2
    tokens = grid + 1
    # Of one pass. With its only key, a token's product of weight and value is none of matrices.
    attended = 2 * d * (grid * (side + 1) + grid) + d
    layer = 2 * (4 * tokens * d**2 + attended) + 8 * tokens * d**2
    return grid * 3 * config.patch**2 * d + config.depth * layer + d * 1000


@pytest.mark.parametrize("name", each(RESNETS))
def test_the_numbers_of_an_axial_resnet(name):
    row = row_of(name)
    parameters, billions = RESNETS[name]
    assert row.parameters == parameters
    assert row.multiply_adds == of_resnet(model_config(name))
    assert f"{row.multiply_adds / 1e9:.3f}" == billions


@pytest.mark.slow
@pytest.mark.parametrize("name", each(list_models("axial_vit_*")))
def test_the_cost_of_an_axial_vit(name):
    assert row_of(name).multiply_adds == of_vit(model_config(name))


def test_the_size_of_a_chunk_costs_nothing():
    """Of which the count takes one for all."""
    layer = PositionSensitiveAttention(16, 2, 5, axis=1).eval().requires_grad_(False)
    counts = []
    for chunk in (100, layer.chunk, 2**62):
        layer.chunk = chunk
        with FlopCounterMode(display=False) as counter:
            layer(torch.zeros(2, 6, 7, 16))
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] == counts[2] > 0


# --- The page -------------------------------------------------------------------------------------


def checked_in() -> dict[str, str]:
    table = PAGE.read_text().partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    assert tuple(table[:2]) == HEAD
    return {re.match(r"\| `(\w+)` ", line)[1]: line for line in table[2:]}


def test_the_page_has_a_line_for_each_model():
    assert list(checked_in()) == list_models()


@pytest.mark.parametrize("name", each(list_models()))
def test_the_page_says_what_is_counted(name):
    assert checked_in()[name] == row_of(name).line


def test_only_the_table_of_a_page_is_replaced(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\n| old |\n{END}\nafter\n")
    assert main(["models", "axial_resnet26s", "--out", str(page)]) == 0
    assert capsys.readouterr().out == f"written: {page}\n"
    assert main(["models", "axial_resnet26*"]) == 0
    table = capsys.readouterr().out
    line = "| `axial_resnet26s` | 224 x 224 | 1000 | 5,944,936 | 1.812 |"
    assert table.splitlines() == [*HEAD, line]
    assert page.read_text() == f"before\n{BEGIN}\n{table}{END}\nafter\n"
    assert [path.name for path in tmp_path.iterdir()] == ["page.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["vit_*"], "models vit_*: no name matches: allowed are axial_deeplab_l, "),
        (
            ["axial_resnet26s", "--out", "none.md"],
            "--out none.md: allowed is a page with",
        ),
        (
            ["axial_resnet26s", "--out", "half.md"],
            "--out half.md: allowed is a page with",
        ),
    ],
)
def test_what_cannot_be_is_refused(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "half.md").write_text(f"{END}\n{BEGIN}\n")
    assert main(["models", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert (tmp_path / "half.md").read_text() == f"{END}\n{BEGIN}\n"
    assert not (tmp_path / "none.md").exists()
