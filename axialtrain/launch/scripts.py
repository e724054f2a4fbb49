"""The scripts and manifests of `launch/`, filled in for one run.

Nothing is a template here: each file works as it stands, and has its values in variables with
defaults or in YAML. What a user wrote comes into a script as one quoted word, and into a manifest
as one string, whatever is in it.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import axialtrain

FILES = {
    "slurm": "slurm.sbatch",
    "torchrun": "torchrun.sh",
    "deepspeed": "deepspeed.sh",
    "kubernetes": "kubernetes.yaml",
    "kubeflow": "kubeflow.yaml",
}
BODY = "set -euo pipefail\n"  # after the head comment of each script
POD_FAILURES = 4  # that a Job bears, for each of its nodes


@dataclass(frozen=True)
class Launch:
    """What is to run where.

    overrides: the arguments of `axialtrain train`.
    processes: of each node.
    gpus: whether each process has a GPU.
    python: the interpreter that has axialtrain, on every node at the same place.
    hostfile: of torchrun and deepspeed; None where torchrun is started on each node by itself.
    image: of the containers.
    """

    name: str
    overrides: Sequence[str]
    nodes: int
    processes: int
    gpus: bool = True
    python: str = "python3"
    hostfile: Path | None = None
    image: str = "axialtrain:latest"


def filled(launcher: str, launch: Launch) -> str:
    """The script or manifest of `launcher`, one of FILES, for `launch`."""
    text = (script_folder() / FILES[launcher]).read_text()
    if launcher == "kubernetes":
        return _kubernetes(text, launch)
    if launcher == "kubeflow":
        return _kubeflow(text, launch)
    if launcher == "slurm":
        return _slurm(text, launch)
    lines = [f"PYTHON=${{PYTHON:-{shlex.quote(launch.python)}}}"]
    if launch.hostfile is not None:
        lines.append(f"export HOSTFILE={shlex.quote(str(launch.hostfile))}")
    else:
        lines.append(f"export NODES={launch.nodes} PROCESSES={launch.processes}")
    return _with_lines(text, launch, lines)


def script_folder() -> Path:
    """`launch/`: inside the package when it was installed, beside it in a checkout."""
    package = Path(axialtrain.__file__).parent
    inside = package / "scripts"
    return inside if inside.is_dir() else package.parent / "launch"


def _with_lines(text: str, launch: Launch, lines: Sequence[str]) -> str:
    """`text` with `lines` and the arguments after its head comment; more may follow them."""
    head, body, rest = text.partition(BODY)
    assert body, "each script has this line"
    words = " ".join(map(shlex.quote, launch.overrides))
    return "".join(
        [
            head,
            "# The following lines are of `axialtrain launch`.\n",
            *(f"{line}\n" for line in lines),
            "# shellcheck disable=SC2016 # the arguments are taken as they are\n",
            f'set -- {words} "$@"\n',
            body,
            rest,
        ]
    )


def _slurm(text: str, launch: Launch) -> str:
    unit = "gpus-per-node" if launch.gpus else "cpus-per-task"
    for key, value in {"job-name": launch.name, "nodes": str(launch.nodes)}.items():
        text, found = re.subn(
            rf"^#SBATCH --{key}=.*$", f"#SBATCH --{key}={value}", text, flags=re.MULTILINE
        )
        assert found == 1, f"slurm.sbatch has one --{key}"
    text = text.replace(
        f"#SBATCH --nodes={launch.nodes}\n",
        f"#SBATCH --nodes={launch.nodes}\n#SBATCH --{unit}={launch.processes}\n",
    )
    programs = shlex.quote(str(Path(launch.python).parent))
    lines = [f"export PATH={programs}:$PATH PROCESSES={launch.processes}"]
    return _with_lines(text, launch, lines)


def _kubernetes(text: str, launch: Launch) -> str:
    service, job = yaml.safe_load_all(text)
    service["metadata"]["name"] = job["metadata"]["name"] = launch.name
    service["spec"]["selector"]["batch.kubernetes.io/job-name"] = launch.name
    spec = job["spec"]
    spec["completions"] = spec["parallelism"] = launch.nodes
    spec["backoffLimit"] = POD_FAILURES * launch.nodes
    pod = spec["template"]["spec"]
    pod["subdomain"] = launch.name
    container = _container(pod, launch)
    values = {
        "NODES": str(launch.nodes),
        "PROCESSES": str(launch.processes),
        "RENDEZVOUS": f"{launch.name}-0.{launch.name}:29400",
    }
    for variable in container["env"]:
        variable["value"] = values.pop(variable["name"])
    assert not values, "kubernetes.yaml has all of them"
    return _manifest(text, service, job)


def _kubeflow(text: str, launch: Launch) -> str:
    job = yaml.safe_load(text)
    job["metadata"]["name"] = launch.name
    spec = job["spec"]
    spec["nprocPerNode"] = str(launch.processes)
    spec["elasticPolicy"].update(minReplicas=launch.nodes, maxReplicas=launch.nodes)
    spec["runPolicy"]["backoffLimit"] = POD_FAILURES * launch.nodes
    worker = spec["pytorchReplicaSpecs"]["Worker"]
    worker["replicas"] = launch.nodes
    container = _container(worker["template"]["spec"], launch)
    container["command"] = [
        re.sub(r"^--nproc-per-node=.*", f"--nproc-per-node={launch.processes}", word)
        for word in container["command"]
    ]
    return _manifest(text, job)


def _container(pod: dict[str, Any], launch: Launch) -> dict[str, Any]:
    """The only container of `pod`, with the arguments, the image and the GPUs of `launch`."""
    (container,) = pod["containers"]
    container["image"] = launch.image
    # Kubernetes replaces $(NAME) in arguments, and makes one $ of two.
    container["args"] = [override.replace("$", "$$") for override in launch.overrides]
    if launch.gpus:
        container["resources"]["limits"]["nvidia.com/gpu"] = launch.processes
    else:
        container["resources"] = {"requests": {"cpu": launch.processes}}
    return container


def _manifest(text: str, *documents: dict[str, Any]) -> str:
    """The `documents` under the first comment of `text`; the others are in the file itself."""
    head = re.match(r"(#.*\n)*", text)
    assert head is not None, "it matches the empty text"
    return head[0] + yaml.safe_dump_all(documents, sort_keys=False, width=100)
