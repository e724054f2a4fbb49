"""A process that writes what its loaders read, a line a sample, and goes on where it was killed.

python stream_process.py FOLDER OPTIONS: OPTIONS is JSON of the `DataConfig` and of the mesh, data
ranks and micro-batch, for `loaded.stream`. What counts is what `state.json` says is complete.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from loaded import loader_of, stream

from axialtrain.data.augment import AugmentConfig
from axialtrain.data.config import DataConfig
from axialtrain.data.order import OrderState
from axialtrain.data.sampling import SampleConfig
from axialtrain.data.whole import replacing
from axialtrain.data.windows import CutConfig


def config_of(values: dict[str, object]) -> DataConfig:
    kinds = {"cut": CutConfig, "sample": SampleConfig, "augment": AugmentConfig}
    groups = {key: kind(**values.pop(key, {})) for key, kind in kinds.items()}  # type: ignore[arg-type]
    return DataConfig(**values, **groups)  # type: ignore[arg-type]


def main(folder: Path, options: dict[str, object]) -> None:
    config = config_of(options.pop("data"))  # type: ignore[arg-type]
    steps = options.pop("steps")
    one = loader_of(config)
    lines, saved = folder / "stream.txt", folder / "state.json"
    first = 0
    if saved.exists():
        state = OrderState.from_json(saved.read_bytes(), str(saved))
        first = one.resume(state)
        kept = lines.read_text().splitlines(keepends=True)[: state.next_index]
        lines.write_text("".join(kept))  # a step that was not complete is read again
    with lines.open("a") as file:
        for number, step in enumerate(stream(config, first, steps, **options), first):  # type: ignore[arg-type]
            for index, window, crc in step:
                file.write(f"{index} {window} {crc:08x}\n")
                file.flush()
            os.fsync(file.fileno())
            with replacing(saved) as state_file:
                state_file.write(one.state(number + 1).to_json().encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
