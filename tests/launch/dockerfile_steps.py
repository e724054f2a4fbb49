"""Executes the steps of a Dockerfile in a chroot, where there is no builder of images.

It knows what our Dockerfiles use: ARG, ENV, FROM, WORKDIR, COPY, RUN, USER, HEALTHCHECK and CMD. An
image here is a folder with a whole file system; the base is one that the caller has made.
"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

# In a mount namespace of its own, which takes the mounts along when it ends.
ENTER = (
    'mount --rbind /dev "$0/dev" && mount -t proc proc "$0/proc" && '
    'root=$0 user=$1 && shift && exec chroot --userspec="$user" "$root" "$@"'
)
NETWORK = ("etc/resolv.conf", "etc/hosts")  # a builder lays them into every step, too
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass
class Image:
    """root: of its file system."""

    root: Path
    environment: dict[str, str] = field(default_factory=lambda: {"PATH": PATH})
    workdir: str = "/"
    user: str = "0"
    health: list[str] = field(default_factory=list)
    command: list[str] = field(default_factory=list)

    def run(
        self, command: Sequence[str], timeout: float, **more: str
    ) -> subprocess.CompletedProcess[str]:
        """The finished process of a command in the image. more: variables of its environment."""
        inside = f'cd {shlex.quote(self.workdir)} && exec "$@"'
        environment = [f"{k}={v}" for k, v in (self.environment | more).items()]
        return subprocess.run(
            ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", ENTER,
             str(self.root), f"{self.user}:{self.user}", "env", "--ignore-environment",
             *environment, "sh", "-c", inside, "sh", *command],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout,
            check=False,
        )  # fmt: skip


def build(
    dockerfile: Path,
    context: Path,
    base: Path,
    folder: Path,
    timeout: float,
    **environment: str,
) -> Image:
    """The last stage of `dockerfile`, in a new folder in `folder`.

    base: the root of a file system, in the place of every base image. timeout: s, of each RUN.
    environment: of every RUN, as a builder's --build-arg gives it.
    Raises AssertionError where a RUN fails, ValueError where there is an unknown instruction.
    """
    stages: dict[str, Image] = {}
    image, arguments = None, dict[str, str]()
    for word, rest in instructions(dockerfile.read_text()):
        if word == "ARG" and image is None:
            continue  # the name of the base
        if word == "FROM":
            name = rest.partition(" AS ")[2] or "last"
            root = folder / name
            # As it is, with the files of devices in its /dev, which Python would read.
            subprocess.run(["cp", "--archive", base, root], check=True, timeout=timeout)
            for file in NETWORK:
                shutil.copyfile(f"/{file}", root / file)
            image = stages[name] = Image(root)
            arguments = {}
            continue
        assert image is not None
        if word == "ARG":
            key, _, value = rest.partition("=")
            arguments[key] = shlex.split(value)[0] if shlex.split(value) else ""
        elif word == "ENV":
            for pair in shlex.split(rest):
                key, _, value = pair.partition("=")
                known = image.environment
                image.environment[key] = re.sub(
                    r"\$(\w+)", lambda found, known=known: known.get(found[1], ""), value
                )
        elif word == "WORKDIR":
            image.workdir = rest
            inside(image, rest).mkdir(parents=True, exist_ok=True)
        elif word == "COPY":
            copy(rest.split(), image, stages, context)
        elif word == "RUN":
            done = image.run(["sh", "-c", rest], timeout, **arguments, **environment)
            assert done.returncode == 0, f"RUN {rest}:\n{done.stdout}"
        elif word == "USER":
            image.user = rest
        elif word in ("HEALTHCHECK", "CMD"):
            command = json.loads(rest[rest.index("[") :])
            if word == "CMD":
                image.command = command
            else:
                image.health = command
        else:
            raise ValueError(f"{dockerfile}: {word} is unknown here")
    return stages["last"]


def instructions(text: str) -> list[tuple[str, str]]:
    """(word, what follows it) of every instruction, on one line each."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    pairs = [line.partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word, rest.strip()) for word, _, rest in pairs]


def inside(image: Image, path: str) -> Path:
    return image.root / path.lstrip("/")


def copy(parts: list[str], image: Image, stages: dict[str, Image], context: Path) -> None:
    """COPY [--from=STAGE] SOURCE ... TARGET, of files, or of the one folder SOURCE."""
    origin = context
    if parts[0].startswith("--from="):
        origin = stages[parts.pop(0).removeprefix("--from=")].root
    *sources, target = parts
    to = inside(image, target if target.startswith("/") else f"{image.workdir}/{target}")
    for source in sources:
        path = origin / source.lstrip("/")
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__") if origin == context else None
            shutil.copytree(path, to, symlinks=True, dirs_exist_ok=True, ignore=ignore)
        else:
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, to)
