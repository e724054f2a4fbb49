"""What a way holds at once."""

from __future__ import annotations

import torch

from axialtrain.bench.peak import held_at_once

CPU = torch.device("cpu")


def test_what_was_there_before_does_not_count_and_what_is_let_go_makes_room():
    x = torch.zeros(1000)

    def way() -> None:
        y = x + 1  # 4000 bytes
        z = y.double()  # 8000
        del y
        torch.cat((z, z))  # 16,000

    assert held_at_once(way, CPU) == (24_000, 16_000)


def test_views_cost_nothing():
    x = torch.zeros(10, 100)
    assert held_at_once(lambda: x.transpose(0, 1)[3:].flatten(0, 0), CPU) == (0, 0)
