"""The `axialtrain` command: the only place that puts rooms together."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

from axialtrain.bench import arguments as bench_arguments
from axialtrain.data import shard_command
from axialtrain.launch import doctor_arguments, launch_command
from axialtrain.launch.errors import (
    EXPECTED,
    again,
    own_rank,
    say,
    say_by_host,
    speaks,
    to_the_end,
    told_early,
)

QUICKSTART = (24, 4)  # scenes to train on, and for validation


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 2 and one message for what a user did wrong."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    parsed = _parser().parse_args(arguments)
    parsed.own_process = arguments is None  # and not called by somebody's Python
    try:
        return int(parsed.command(parsed))
    except EXPECTED as error:
        # Under torchrun every rank refuses the same thing for the same reason: said once.
        return say(error) if speaks() else 2
    except KeyboardInterrupt:
        print("axialtrain: interrupted", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="axialtrain",
        description="Axial-attention transformers on gigapixel images, on any mesh.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    shard = commands.add_parser(
        "shard",
        help="turn images of any size into shards",
        description=shard_command.DESCRIPTION,
    )
    shard_command.arguments(shard)
    shard.set_defaults(command=shard_command.shard)

    verify = commands.add_parser(
        "verify",
        help="whether shards are whole: every byte, every checksum",
        description="Ends with 0 where the shards are clean, 1 where there are faults, 2 where it "
        "could not be run.",
    )
    verify.add_argument(
        "shards", nargs="+", metavar="DIR|URL", help="several are the splits of one data set"
    )
    modes = verify.add_mutually_exclusive_group()
    for mode, text in (
        ("quick", "sizes, heads and the directory against the tar headers"),
        ("full", "every byte and every checksum; the default"),
        ("deep", "full, all decoded, and no group in several splits"),
    ):
        modes.add_argument(f"--{mode}", dest="mode", action="store_const", const=mode, help=text)
    verify.add_argument("--jobs", type=int, help="shards at once, as many as there are cores")
    verify.add_argument("--json", type=Path, metavar="FILE", help="write a record of the faults")
    verify.add_argument(
        "--quarantine",
        type=Path,
        metavar="FOLDER",
        help="move damaged shards there, and their images out of the manifest",
    )
    verify.set_defaults(command=_verify, mode="full")

    inspect = commands.add_parser("inspect", help="look at shards, or at one image of them")
    inspect.add_argument("shards", metavar="DIR|URL")
    inspect.add_argument("image", nargs="?", metavar="IMAGE", help="its name in the shards")
    inspect.add_argument("--patch", type=int, default=16, help="side of a token in pixels")
    inspect.add_argument(
        "--region",
        nargs=4,
        type=int,
        metavar=("Y", "X", "HEIGHT", "WIDTH"),
        help="pixels of the image to write to --png",
    )
    inspect.add_argument("--png", type=Path, metavar="FILE")
    inspect.add_argument("--mesh", metavar="RxC", help="what each rank would read of the image")
    inspect.add_argument(
        "--window",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="pixels at the image's centre that --mesh shares, instead of all",
    )
    inspect.add_argument("--bench", action="store_true", help="measure for some seconds")
    inspect.add_argument(
        "--all", action="store_true", help="look at every head and block, however many there are"
    )
    inspect.add_argument("--json", metavar="FILE|-", help="write a record; - prints it instead")
    inspect.set_defaults(command=_inspect)

    scene = commands.add_parser("scene", help="draw labelled scenes that need long range")
    scene.add_argument("--out", required=True, type=Path, metavar="DIR")
    scene.add_argument("--count", type=int, default=1)
    scene.add_argument("--size", type=int, default=4096, help="side in pixels")
    scene.add_argument("--seed", type=int, default=0)
    scene.add_argument(
        "--bands",
        nargs=2,
        type=int,
        default=(6, 8),
        metavar=("FEWEST", "MOST"),
        help="row bands, and column bands, of a scene, 1 to 8",
    )
    scene.add_argument(
        "--lossless", action="store_true", help="pixels as drawn, not JPEG as most scanners write"
    )
    scene.set_defaults(command=_scene)

    train = commands.add_parser(
        "train",
        help="train: experiment=NAME [key=value ...]",
        description="Composes configs/ with Hydra. Starts as many local processes as the mesh "
        "needs, or uses those of torchrun or deepspeed.",
    )
    train.add_argument("overrides", nargs="*", metavar="key=value")
    train.set_defaults(command=_train)

    look = commands.add_parser(
        "doctor",
        help="what keeps a run from starting, or makes it slow: [mesh=RxC or key=value ...]",
        description=doctor_arguments.DESCRIPTION,
    )
    doctor_arguments.arguments(look)
    look.set_defaults(command=_doctor)

    launch = commands.add_parser(
        "launch",
        help="the script or manifest that starts a run on many nodes",
        description=launch_command.DESCRIPTION,
    )
    launch_command.arguments(launch)
    launch.set_defaults(command=launch_command.launch)

    export = commands.add_parser(
        "export",
        help="the weights of a run in one plain file",
        description="Writes the weights of a run's last checkpoint to a file that "
        "`axialtrain train init=FILE` and others read.",
    )
    export.add_argument("checkpoint", metavar="RUN|CHECKPOINT", help="a folder or a URL")
    export.add_argument("--out", required=True, type=Path, metavar="FILE", help="a new file")
    export.add_argument("--to", choices=["safetensors"], default="safetensors")
    export.add_argument(
        "--names",
        choices=["axialtrain", "timm"],
        default="axialtrain",
        help="timm: the names and packing of timm's VisionTransformer",
    )
    export.add_argument(
        "--best", action="store_true", help="the checkpoint that was best in validation"
    )
    export.set_defaults(command=_export)

    models = commands.add_parser(
        "models", help="the models by name: parameters, and multiply-adds of an image"
    )
    models.add_argument("pattern", nargs="?", default="*", help="of names, like 'axial_resnet*'")
    models.add_argument(
        "--out", type=Path, metavar="FILE.md", help="a page whose table to replace, not print"
    )
    models.set_defaults(command=_models)

    bench = commands.add_parser("bench", help="measure, and write what was measured")
    bench_arguments.arguments(bench)

    quickstart = commands.add_parser(
        "quickstart", help="scenes, shards and a trained model in the current folder"
    )
    quickstart.add_argument("overrides", nargs="*", metavar="key=value")
    quickstart.add_argument(
        "--scenes",
        nargs=2,
        type=int,
        default=QUICKSTART,
        metavar=("TRAIN", "VALIDATION"),
        help="how many to draw, 24 and 4",
    )
    quickstart.set_defaults(command=_quickstart)
    return parser


def _verify(parsed: argparse.Namespace) -> int:
    from axialtrain.data.quarantine import check_quarantine, quarantine
    from axialtrain.data.verify import verify

    _check_file("json", parsed.json)
    if parsed.quarantine is not None:
        if len(parsed.shards) > 1:
            raise ValueError("quarantine is for one folder of shards: verify one after the other")
        check_quarantine(parsed.shards[0], parsed.quarantine)
    report = verify(parsed.shards, mode=parsed.mode, jobs=parsed.jobs)
    print(report)
    if parsed.json is not None:
        report.write(parsed.json)
    if parsed.quarantine is not None and report.count:
        print(quarantine(report.sets[0], parsed.quarantine))
    return 1 if report.count else 0


def _check_file(key: str, path: Path | None) -> None:
    """ValueError where no file can be written to `path`."""
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"{key} is {path}, allowed is a file in a folder that is there")


def _scene(parsed: argparse.Namespace) -> int:
    from axialtrain.data.scene import draw_scenes

    for paths in draw_scenes(
        parsed.out,
        count=parsed.count,
        size=parsed.size,
        seed=parsed.seed,
        bands=(parsed.bands[0], parsed.bands[1]),
        lossless=parsed.lossless,
    ):
        print(*paths)
    return 0


def _inspect(parsed: argparse.Namespace) -> int:
    from axialtrain.data.inspect import inspect

    _check_file("json", None if parsed.json in (None, "-") else Path(parsed.json))
    _check_file("png", parsed.png)
    found = inspect(
        parsed.shards,
        parsed.image,
        patch=parsed.patch,
        region=parsed.region,
        png=parsed.png,
        mesh=parsed.mesh,
        window=parsed.window,
        bench=parsed.bench,
        every=parsed.all,
    )
    if parsed.json == "-":
        print(found.to_json().decode(), end="")
        return 0
    if parsed.json is not None:
        found.write(parsed.json)
    print(found)
    return 0


@told_early()
def _train(parsed: argparse.Namespace) -> int:
    import torch

    from axialtrain.launch.local import (
        can_fork,
        device_type,
        processes_of_outer_launcher,
        start,
        threads_each,
    )
    from axialtrain.train.alike import AlikeError
    from axialtrain.train.check import check, check_kernel
    from axialtrain.train.compose import compose_run
    from axialtrain.train.signals import Interrupted

    started = processes_of_outer_launcher()
    own_threads = torch.get_num_threads()
    fork = parsed.own_process and started is None and can_fork()
    with to_the_end():
        try:
            config, folder, text = compose_run(parsed.overrides, started)
        except EXPECTED as error:  # the arguments are the same everywhere
            return say(error) if speaks() else 2
        try:
            check(config, folder, started)
            device = device_type(config.launcher.device, config.mesh.size)
            check_kernel(config, device)
        except EXPECTED as error:  # files and devices may not be
            return say_by_host(error)
    # Otherwise DeepSpeed looks for an accelerator by itself, and says on stdout what it found.
    os.environ["DS_ACCELERATOR"] = device
    from axialtrain.train.run import run

    threads = threads_each(config.launcher.threads, config.mesh.size, own_threads)
    arguments = (config, folder, text, device, threads)
    if started is None:
        # Threads do not outlive a fork: tqdm has one, and what reads from an object store.
        fork = fork and threading.active_count() == 1
        return start(run, arguments, config.mesh.size, fork=fork, last=parsed.own_process)
    try:
        run(*arguments)
    except Interrupted as error:
        return again(error)
    except AlikeError as error:
        return say(error) if own_rank() == 0 else 2
    except EXPECTED as error:
        return say(error, rank=own_rank())  # what only this rank knows
    return 0


def _doctor(parsed: argparse.Namespace) -> int:
    from axialtrain.launch.doctor import doctor

    return doctor(parsed)


def _export(parsed: argparse.Namespace) -> int:
    from axialtrain.train.export import export

    print(export(parsed.checkpoint, parsed.out, names=parsed.names, best=parsed.best))
    return 0


def _models(parsed: argparse.Namespace) -> int:
    from axialtrain.bench.zoo import markdown, write

    if parsed.out is None:
        print(markdown(parsed.pattern))
    else:
        write(parsed.out, parsed.pattern)
        print(f"written: {parsed.out}")
    return 0


def _quickstart(parsed: argparse.Namespace) -> int:
    from axialtrain.data.scene import ceiling
    from axialtrain.launch.local import processes_of_outer_launcher
    from axialtrain.train.compose import compose_run

    if min(parsed.scenes) < 1:
        raise ValueError(f"--scenes {parsed.scenes}: allowed are two numbers from 1")
    parsed.overrides = ["experiment=quickstart", *parsed.overrides]
    # A wrong key is refused before scenes are drawn.
    compose_run(parsed.overrides, processes_of_outer_launcher())
    try:
        _draw_quickstart(parsed.scenes)
    except EXPECTED as error:  # one rank draws, which alone knows
        return say(error, rank=own_rank() if "WORLD_SIZE" in os.environ else None)
    status = _train(parsed)
    if status == 0 and own_rank() == 0:
        print(
            f"\nThe ceiling of a model without long range is an expected mIoU of {ceiling():.3f}: "
            "nothing near a parcel tells its class.\n"
            "Look at prediction.png and loss.png there. Then try:\n"
            "  axialtrain train experiment=quickstart mesh=1x4   # same numbers\n"
            "  axialtrain train experiment=quickstart zero=3 train.steps=20\n"
            "  axialtrain shard SLIDE.svs --out shards/slide && \\\n"
            "    axialtrain train experiment=reconstruct data.shards=shards/slide mesh=2x2"
        )
    return status


def _draw_quickstart(scenes: Sequence[int]) -> None:
    """Scenes and shards in the current folder, unless they are there. scenes: to train on, and for
    validation."""
    from tqdm import tqdm

    from axialtrain.data.alone import alone
    from axialtrain.data.region import open_shards
    from axialtrain.data.scene import draw_scenes
    from axialtrain.data.shard import shard_images

    tqdm.monitor_interval = 0  # no thread, which would not outlive the fork of the ranks
    end = 0
    with alone(Path("scenes")):  # of the ranks of torchrun one draws, and the others find it done
        for split, count in zip(("train", "validation"), scenes, strict=True):
            first, end = end, end + count  # no name of a scene, and so no group, is in two splits
            shards = Path("shards") / split
            if (shards / "manifest.json").exists():
                end = first + len(open_shards(str(shards)).images)
                if own_rank() == 0:
                    print(f"{shards} is there already: used as it is")
                continue
            print(f"drawing {count} scenes for {split}", flush=True)
            folder = Path("scenes") / split
            drawn = draw_scenes(folder, count=count, size=4096, seed=0, first=first)
            print(shard_images([s[0] for s in drawn], shards, labels=[s[1] for s in drawn]))


if __name__ == "__main__":
    sys.exit(main())
