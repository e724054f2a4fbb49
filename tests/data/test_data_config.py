"""The `data` group: what is wrong is named, and it comes from YAML and from the command line."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from axialtrain.data.config import DataConfig

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.3, 2]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("shards", ""),
        ("window", [1]),
        ("window", [0, 5]),
        ("mean", True),
        ("mean", None),
        ("mean", "0.5"),
        ("mean", float("nan")),
        ("mean", []),
        ("mean", [0.5, 0.5, False]),
        ("mean", [0.5, 0.5, [0.5]]),
        ("mean", {"red": 0.5}),
        ("std", 0.0),
        ("std", float("inf")),
        ("std", 10**400),
        ("std", [0.2, 0.2, 0]),
        ("std", [0.2, 0.2, float("nan")]),
        ("prefetch", -1),
        ("workers", 0),
    ],
)
def test_wrong_config_is_named(key: str, value: object) -> None:
    with pytest.raises(ValueError, match=rf"^data\.{key} is .*allowed is"):
        DataConfig(**{"shards": "x", key: value})  # type: ignore[arg-type]


def test_normalisation_comes_from_yaml_and_command_line() -> None:
    from axialtrain.train.compose import compose_run

    schema = OmegaConf.structured(DataConfig)
    read = OmegaConf.create("{shards: x, mean: [0.485, 0.456, 0.406], std: 1}")
    for dots, mean, std in (([], MEAN, 1.0), (["mean=0", "std=[0.229,0.3,2]"], 0.0, STD)):
        config = OmegaConf.to_object(OmegaConf.merge(schema, read, OmegaConf.from_dotlist(dots)))
        assert isinstance(config, DataConfig)
        assert (config.mean, config.std) == (mean, std)
        assert isinstance(config.mean, type(mean))
    for overrides, mean, std in (
        (["data.mean=0.4"], 0.4, 0.25),
        (["data.mean=[0.485,0.456,0.406]", "data.std=[0.229,0.3,2]"], MEAN, STD),
        (["data.mean=[0,0,0]", "data.mean=0.3"], 0.3, 0.25),
    ):
        config = compose_run(["data.shards=x", *overrides])[0].data
        assert (config.mean, config.std) == (mean, std)
    for override in ("data.mean=grey", "data.mean=null"):
        with pytest.raises(ValueError, match=r"^data\.mean is .*, allowed is a number from 0 to 1"):
            compose_run(["data.shards=x", override])
