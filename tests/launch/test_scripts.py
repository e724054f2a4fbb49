"""What is in launch/, as it stands and filled in: by its own tools, and run on stand-ins."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import kubernetes_validate
import pytest
import yaml
from repository import REPOSITORY
from system_tools import program

from axialtrain.launch.launch_command import check_placement
from axialtrain.launch.scripts import FILES, POD_FAILURES, Launch, filled
from axialtrain.mesh.mesh import MeshConfig

SHELL = [name for name, file in FILES.items() if not file.endswith(".yaml")]
PODS = [name for name, file in FILES.items() if file.endswith(".yaml")]
KUBERNETES = ("1.29", "1.37")  # the oldest that anybody should have, and the newest of the schemas
HOSTILE = [
    "experiment=quickstart",
    "data.shards={a: 2, b: 1}",
    """name='a"b $(touch broken) `touch broken` ${HOME} $$ $(NODES) \\ %n'""",
    "name=x\n  evil: true # \n- y",
    "name='; touch broken; exit'",
    "hydra.run.dir=runs/${now:%Y}",
    "name=",
    "name=größer",
]


def hostile(**changed) -> Launch:
    return Launch(**{"name": "a-job", "overrides": HOSTILE, "nodes": 3, "processes": 4} | changed)


def shellcheck(text: str) -> None:
    done = subprocess.run(
        [program("shellcheck"), "-"], input=text, capture_output=True, text=True, timeout=60,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "path",
    [
        *sorted((REPOSITORY / "launch").glob("*.sh")),
        REPOSITORY / "launch" / "slurm.sbatch",
        *sorted((REPOSITORY / ".ci").iterdir()),
    ],
    ids=lambda path: path.name,
)
def test_shellcheck_has_nothing_to_say(path):
    shellcheck(path.read_text())


@pytest.mark.parametrize("launcher", FILES)
def test_the_files_are_short(launcher):
    assert len((REPOSITORY / "launch" / FILES[launcher]).read_text().splitlines()) < 60


@pytest.mark.parametrize("gpus", [True, False])
@pytest.mark.parametrize("launcher", SHELL)
def test_shellcheck_has_nothing_to_say_of_a_filled_script(launcher, gpus, tmp_path):
    shellcheck(filled(launcher, hostile(gpus=gpus, hostfile=tmp_path / "the hosts")))


def stand_in(folder, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
    (folder / name).chmod(0o755)


def report(folder, name: str) -> None:
    """A stand-in that prints its arguments, one JSON list a line."""
    (folder / name).write_text(
        f"#!{sys.executable} -S\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
    )
    (folder / name).chmod(0o755)


def ran(command: list[str], folder, **environment: str) -> list[list[str]]:
    """What the stand-ins in `folder` were given."""
    kept = {name: os.environ[name] for name in ("HOME", "LANG") if name in os.environ}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, check=False,
        env=kept | {"PATH": f"{folder}:{os.environ['PATH']}"} | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert not (folder / "broken").exists(), "an override was run"
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(("nodes", "meeting"), [(1, "localhost:0"), (3, "node0:29400")])
def test_torchrun_gets_the_arguments_as_they_were_given(nodes, meeting, tmp_path):
    report(tmp_path, "python3")
    text = filled("torchrun", hostile(nodes=nodes, python=str(tmp_path / "python3")))
    environment = {"RENDEZVOUS": "node0:29400"} if nodes > 1 else {}
    (given,) = ran(["bash", "-c", text, "torchrun.sh", "more=1"], tmp_path, **environment)
    assert given[:2] == ["-m", "torch.distributed.run"]
    assert given[-len(HOSTILE) - 2 :] == ["train", *HOSTILE, "more=1"]
    assert {f"--nnodes={nodes}", "--nproc-per-node=4", f"--rdzv-endpoint={meeting}"} < set(given)


@pytest.mark.parametrize("launcher", SHELL)
def test_another_command_takes_the_place_of_train(launcher, tmp_path):
    for name in ("python3", "torchrun"):
        report(tmp_path, name)
    stand_in(tmp_path, "scontrol", "echo node7")
    stand_in(tmp_path, "srun", 'while [[ $1 == --* ]]; do shift 2; done; exec "$@"')
    text = filled(launcher, hostile(nodes=1, python=str(tmp_path / "python3")))
    (given,) = ran(
        ["bash", "-c", text], tmp_path, COMMAND="doctor",
        SLURM_JOB_NODELIST="node7", SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="1", SLURM_NODEID="0",
    )  # fmt: skip
    assert given[given.index("axialtrain.cli") + 1] == "doctor"


def test_deepspeed_gets_the_arguments_as_they_were_given(tmp_path):
    report(tmp_path, "python3")
    text = filled("deepspeed", hostile(nodes=1, python=str(tmp_path / "python3")))
    (given,) = ran(["bash", "-c", text], tmp_path)
    assert given[:2] == ["-m", "deepspeed.launcher.runner"]
    assert given[-len(HOSTILE) - 2 :] == ["axialtrain.cli", "train", *HOSTILE]
    assert {"--num_accelerators=4", "--module", "--no_local_rank"} < set(given)


@pytest.mark.parametrize("gpus", [True, False])
def test_slurm_gets_the_arguments_as_they_were_given(gpus, tmp_path):
    report(tmp_path, "torchrun")
    stand_in(tmp_path, "scontrol", "echo node7; echo node8")
    stand_in(tmp_path, "srun", 'while [[ $1 == --* ]]; do shift 2; done; exec "$@"')
    text = filled("slurm", hostile(gpus=gpus, python=str(tmp_path / "python3")))
    unit = "gpus-per-node" if gpus else "cpus-per-task"
    head = text[: text.index("set --")]
    for line in ("job-name=a-job", "nodes=3", f"{unit}=4"):
        assert head.count(f"\n#SBATCH --{line}\n") == 1
    (given,) = ran(
        ["bash", "-c", text], tmp_path,
        SLURM_JOB_NODELIST="node[7-8]", SLURM_JOB_ID="1", SLURM_JOB_NUM_NODES="3", SLURM_NODEID="0",
    )  # fmt: skip
    assert given[-len(HOSTILE) :] == HOSTILE
    assert given[given.index("--nproc-per-node") + 1] == "4"


def documents(launcher: str, launch: Launch | None = None) -> list[dict]:
    text = (REPOSITORY / "launch" / FILES[launcher]).read_text()
    if launch is not None:
        text = filled(launcher, launch)
        assert text.startswith("# "), "the head comment stays"
    return list(yaml.safe_load_all(text))


def pod_of(document: dict) -> dict:
    spec = document["spec"]
    template = spec.get("template") or spec["pytorchReplicaSpecs"]["Worker"]["template"]
    return template["spec"]


def expanded(word: str, variables: dict[str, str]) -> str:
    """What Kubernetes makes of a word of `args`: $(NAME), and $$ for one $."""
    return re.sub(
        r"\$\$|\$\((\w+)\)",
        lambda found: "$" if found[1] is None else variables.get(found[1], found[0]),
        word,
    )


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("launch", [None, hostile(), hostile(gpus=False)], ids=repr)
def test_kubernetes_takes_the_job(launch, version):
    service, job = documents("kubernetes", launch)
    kubernetes_validate.validate(service, version, strict=True)
    kubernetes_validate.validate(job, version, strict=True)
    assert service["metadata"]["name"] == job["metadata"]["name"] == pod_of(job)["subdomain"]
    name = service["spec"]["selector"]["batch.kubernetes.io/job-name"]
    assert name == job["metadata"]["name"]
    environment = {one["name"]: one["value"] for one in pod_of(job)["containers"][0]["env"]}
    assert environment["RENDEZVOUS"].startswith(f"{name}-0.{name}:")
    assert int(environment["NODES"]) == job["spec"]["completions"] == job["spec"]["parallelism"]


def test_the_validator_refuses_what_is_wrong():
    _, job = documents("kubernetes")
    job["spec"]["paralelism"] = 2
    with pytest.raises(kubernetes_validate.ValidationError, match="paralelism"):
        kubernetes_validate.validate(job, KUBERNETES[0], strict=True)


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("launch", [None, hostile(), hostile(gpus=False)], ids=repr)
def test_kubernetes_takes_the_pods_of_the_pytorchjob(launch, version):
    """The operator's own schema is in no package: its keys were compared by hand."""
    (job,) = documents("kubeflow", launch)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod_of(job)}
    kubernetes_validate.validate(pod, version, strict=True)
    assert pod["spec"]["containers"][0]["name"] == "pytorch"
    spec, policy = job["spec"], job["spec"]["elasticPolicy"]
    nodes = spec["pytorchReplicaSpecs"]["Worker"]["replicas"]
    assert nodes == policy["minReplicas"] == policy["maxReplicas"]
    assert f"--nproc-per-node={spec['nprocPerNode']}" in pod["spec"]["containers"][0]["command"]


@pytest.mark.parametrize("launcher", PODS)
def test_a_manifest_is_filled_in(launcher):
    document = documents(launcher, hostile(nodes=5, processes=6, image="registry/us:1"))[-1]
    container = pod_of(document)["containers"][0]
    assert container["image"] == "registry/us:1"
    assert container["resources"] == {"limits": {"nvidia.com/gpu": 6}}
    policy = document["spec"].get("runPolicy", document["spec"])
    assert policy["backoffLimit"] == 5 * POD_FAILURES
    cpu = documents(launcher, hostile(gpus=False))[-1]
    assert pod_of(cpu)["containers"][0]["resources"] == {"requests": {"cpu": 4}}


@pytest.mark.parametrize("launcher", PODS)
def test_a_manifest_as_it_stands_has_a_mesh_that_needs_no_warning(launcher):
    document = documents(launcher)[-1]
    container = pod_of(document)["containers"][0]
    (mesh,) = (word for word in container["args"] if word.startswith("mesh="))
    row, col = map(int, mesh.removeprefix("mesh=").split("x"))
    nodes = document["spec"].get("completions") or document["spec"]["elasticPolicy"]["minReplicas"]
    gpus = container["resources"]["limits"]["nvidia.com/gpu"]
    assert check_placement(MeshConfig(row=row, col=col), nodes, gpus) is None


@pytest.mark.parametrize("launcher", PODS)
def test_a_pod_that_comes_anew_finds_the_store_of_the_others(launcher):
    """torch 2.13 tells only those of the first round where it is: test_host_faults.py."""
    container = pod_of(documents(launcher, hostile())[-1])["containers"][0]
    given = [f"{one['name']}={one['value']}" for one in container.get("env", [])]
    said = " ".join([*container["command"], *given])
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in said


@pytest.mark.parametrize("launcher", PODS)
@pytest.mark.parametrize("index", [0, 2])
def test_a_pod_gets_the_arguments_as_they_were_given(launcher, index, tmp_path):
    report(tmp_path, "torchrun")
    container = pod_of(documents(launcher, hostile())[-1])["containers"][0]
    variables = {one["name"]: one["value"] for one in container.get("env", [])}
    words = [expanded(word, variables) for word in [*container["command"], *container["args"]]]
    (given,) = ran(words, tmp_path, JOB_COMPLETION_INDEX=str(index), **variables)
    assert given[-len(HOSTILE) - 3 :] == ["-m", "axialtrain.cli", "train", *HOSTILE]
    assert "--nproc-per-node=4" in given
    if launcher == "kubernetes":
        assert {"--nnodes=3", "--rdzv-endpoint=a-job-0.a-job:29400"} < set(given)
        conf = next(word for word in given if word.startswith("--rdzv-conf="))
        assert f"is_host={'true' if index == 0 else 'false'}," in conf
