"""`axialtrain launch`: its arguments, and what they do."""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from axialtrain.launch.scripts import FILES, Launch, filled

if TYPE_CHECKING:
    from axialtrain.mesh.mesh import MeshConfig

DESCRIPTION = """Prints the script or manifest of launch/ for this run, with its nodes, processes
and arguments filled in, or submits it. Before, the config is composed as `train` does and the mesh
compared with the nodes: their processes must be as many, and the parts of `tensor` on one node.
Where `row` or `col` crosses nodes without need, the better mesh is named.
What is printed is one run: submitted again, it goes on from its last checkpoint."""
SUBMIT = {
    "slurm": ("sbatch",),
    "kubernetes": ("kubectl", "apply", "--filename=-"),
    "kubeflow": ("kubectl", "apply", "--filename=-"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of the command."""
    parser.add_argument("--with", dest="launcher", required=True, choices=list(FILES))
    parser.add_argument("--nodes", type=int, required=True, metavar="N")
    parser.add_argument(
        "--gpus-per-node",
        type=int,
        required=True,
        metavar="G",
        help="processes of each node; with launcher.device=cpu, as many CPUs",
    )
    parser.add_argument(
        "--hostfile",
        type=Path,
        metavar="FILE",
        help="of torchrun and deepspeed: lines of HOST slots=G, all reached by ssh",
    )
    parser.add_argument("--name", help="of the job, axialtrain-NAME without, NAME from the config")
    parser.add_argument(
        "--image", default="axialtrain:latest", help="of the pods; default %(default)s"
    )
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--out", type=Path, metavar="FILE", help="write it to a new file, do not print it"
    )
    where.add_argument(
        "--submit", action="store_true", help="hand it to sbatch or kubectl, or start it here"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="of axialtrain train")


def launch(parsed: argparse.Namespace) -> int:
    """Do what the command's arguments say; returns the exit status."""
    if parsed.out is not None and not parsed.out.absolute().parent.is_dir():
        raise ValueError(f"--out {parsed.out}: allowed is a file in a folder that is there")
    taker = SUBMIT.get(parsed.launcher, ("bash",))
    if parsed.submit and shutil.which(taker[0]) is None:
        raise ValueError(f"--submit needs {taker[0]}, which is not here: print it or use --out")
    run, warning = prepared(
        parsed.launcher,
        parsed.overrides,
        nodes=parsed.nodes,
        processes=parsed.gpus_per_node,
        hostfile=parsed.hostfile,
        name=parsed.name,
        image=parsed.image,
    )
    text = filled(parsed.launcher, run)
    if parsed.out is not None:
        _refuse_other(parsed.out, text)
    if warning is not None:
        print(f"axialtrain: {warning}", file=sys.stderr)
    if parsed.submit:
        return submit(parsed.launcher, text)
    if parsed.out is None:
        print(text, end="")
        return 0
    from axialtrain.data.whole import replacing

    with replacing(parsed.out) as file:
        file.write(text.encode())
        # For its owner alone: a URL among the overrides may hold a password.
        os.fchmod(file.fileno(), 0o600 if text.startswith("# ") else 0o700)
    print(f"written: {parsed.out}")
    return 0


def prepared(
    launcher: str,
    overrides: Sequence[str],
    *,
    nodes: int,
    processes: int,
    hostfile: Path | None = None,
    name: str | None = None,
    image: str = "axialtrain:latest",
) -> tuple[Launch, str | None]:
    """(what to fill in, what could be placed better) of a run on `nodes` of `processes` each.

    Raises ValueError where the config, the mesh, the hosts or the name do not fit.
    """
    from axialtrain.train.compose import compose_run

    for key, value in (("nodes", nodes), ("gpus-per-node", processes)):
        if value < 1:
            raise ValueError(f"--{key} is {value}: allowed are whole numbers from 1")
    if hostfile is not None:
        if launcher not in ("torchrun", "deepspeed"):
            raise ValueError(f"--hostfile is for torchrun and deepspeed, not for {launcher}")
        check_hostfile(hostfile, nodes, processes)
    elif launcher == "deepspeed" and nodes > 1:
        raise ValueError(f"--with deepspeed on {nodes} nodes needs --hostfile FILE")
    if name is not None and not re.fullmatch(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?", name):
        raise ValueError(
            f"--name is {name!r}: allowed are up to 40 of a-z, 0-9 and -, a letter first, no - last"
        )
    config, folder, _ = compose_run(overrides, nodes * processes)
    warning = check_placement(config.mesh, nodes, processes)
    own = _run_folder(folder, overrides)
    if any(override.startswith("hydra.run.dir=") for override in own):
        # The same run, if Hydra reads the folder's name as we wrote it.
        _, again, _ = compose_run([*own, *overrides], nodes * processes)
        if again != folder:
            raise ValueError(f"the run folder is {folder}: allowed is hydra.run.dir=PLAIN_NAME")
    return Launch(
        name=name or _job_name(config.name),
        overrides=[*own, *overrides],
        nodes=nodes,
        processes=processes,
        gpus=config.launcher.device != "cpu",
        python=sys.executable,
        hostfile=None if hostfile is None else hostfile.absolute(),
        image=image,
    ), warning


def check_placement(mesh: MeshConfig, nodes: int, processes: int) -> str | None:
    """What could be placed better on `nodes` of `processes` each, or None.

    Raises ValueError where the mesh has not as many processes, or a tensor group several nodes.
    """
    from axialtrain.mesh.placement import placed_on_nodes

    if mesh.size != nodes * processes:
        spread = mesh.row * mesh.col * mesh.tensor
        allowed = [
            f"--nodes {mesh.size // per_node} --gpus-per-node {per_node}"
            for per_node in range(1, mesh.size + 1)
            if mesh.size % per_node == 0
        ]
        if nodes * processes % spread == 0:
            allowed.insert(0, f"mesh.data={nodes * processes // spread}")
        raise ValueError(
            f"mesh {mesh} has {mesh.size} processes, {nodes} nodes of {processes} have "
            f"{nodes * processes}: allowed are {', '.join(allowed)}"
        )
    placement = placed_on_nodes(mesh.degrees, nodes, processes)
    if "tensor" in placement.crossing:
        raise ValueError(
            f"mesh {mesh} on {nodes} nodes of {processes} processes: allowed is `tensor` inside a "
            f"node. {placement.warning}"
        )
    return placement.warning


def check_hostfile(path: Path, nodes: int, processes: int) -> None:
    """Raise ValueError where the hostfile has other hosts than `nodes` with `processes` each."""
    if not path.is_file():
        raise ValueError(f"--hostfile {path} is not there: allowed is a file of HOST slots=N lines")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        found = re.fullmatch(r"([^\s#\"]+)\s+slots=([1-9]\d*)\s*", line)
        if found is None or found[1] in hosts:
            raise ValueError(f"{path}:{number} is {line!r}: allowed is HOST slots=N, a host once")
        hosts[found[1]] = int(found[2])
    if list(hosts.values()) != [processes] * nodes:
        have = ", ".join(f"{host} slots={slots}" for host, slots in hosts.items()) or "no host"
        raise ValueError(f"{path} has {have}: allowed are {nodes} hosts with slots={processes}")


def submit(launcher: str, text: str) -> int:
    """Hand the script or manifest on, or become it; returns the exit status of who took it."""
    command = SUBMIT.get(launcher)
    if command is None:
        sys.stdout.flush()
        os.execvp("bash", ["bash", "-c", text, FILES[launcher]])
    return subprocess.run(command, input=text, text=True, check=False).returncode


def _refuse_other(out: Path, text: str) -> None:
    """Raise ValueError where `out` is there and is not what would be written."""
    if not (out.exists() or out.is_symlink()):
        return
    if not out.is_file() or out.read_bytes() != text.encode():
        raise ValueError(
            f"--out {out}: is there already, and is another: allowed is a new file, or one with "
            "the same content"
        )


def _run_folder(folder: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides by which every start of the script is the same run, where there are none."""
    keys = {override.partition("=")[0] for override in overrides}
    own = []
    if "hydra.run.dir" not in keys:
        here = Path.cwd()
        name = str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
        if not re.fullmatch(r"[\w./-]+", name):
            name = "'" + name.replace("\\", "\\\\").replace("'", "\\'") + "'"
        own.append(f"hydra.run.dir={name}")
    if "resume" not in keys:
        own.append("resume=auto")
    return own


def _job_name(run: str) -> str:
    """What Kubernetes takes for the name of a service: it is in the names of the pods, too."""
    return ("axialtrain-" + re.sub(r"[^a-z0-9]+", "-", run.lower()))[:40].strip("-")
