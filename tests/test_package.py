"""What is installed: a wheel and an sdist run the quickstart where else there is only what they
depend on."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from killed_runs import metrics
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from repository import REPOSITORY

from axialtrain.launch.scripts import FILES

# A short quickstart, of a small model on a mesh of two.
SHORT = [
    "quickstart", "--scenes", "2", "1", "mesh=1x2", "train.steps=2", "hydra.run.dir=runs/short",
    "data.window=[512,512]", "model.dim=16", "model.depth=1", "model.heads=2",
]  # fmt: skip
LEFT = ("config.yaml", "metrics.jsonl", "reading.json", "loss.png", "prediction.png", "checkpoints")

pytestmark = pytest.mark.slow


def run(*command: object, cwd: Path, timeout: float = 240) -> str:
    """The output of a command that knows nothing of the repository; it must end with 0."""
    foreign = ("PYTHONPATH", "RANK", "WORLD_SIZE", "VIRTUAL_ENV")
    clean = {name: value for name, value in os.environ.items() if name not in foreign}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env=clean | {"WANDB_MODE": "disabled", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{command}:\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def names() -> list[str]:
    """The files of the checkout, but those that git ignores."""
    listed = run("git", "ls-files", "-co", "--exclude-standard", cwd=REPOSITORY).splitlines()
    return [name for name in listed if (REPOSITORY / name).is_file()]


@pytest.fixture(scope="module")
def built(names, tmp_path_factory) -> tuple[Path, Path, Path]:
    """The sdist, the wheel that is built of it, and one that is built of the checkout."""
    folder = tmp_path_factory.mktemp("built")
    copy = folder / "copy"
    for name in names:
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_bytes((REPOSITORY / name).read_bytes())
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir"]
    run(*build, folder / "of-checkout", "--wheel", copy, cwd=folder)
    said = run(*build, folder, copy, cwd=folder)
    assert "absent from the `packages`" not in said
    (sdist,), (wheel,), (other,) = (
        found.glob(name)
        for found, name in ((folder, "*.tar.gz"), (folder, "*.whl"), (folder / "of-checkout", "*"))
    )
    return sdist, wheel, other


def environment(folder: Path, package: Path) -> Path:
    """Python of an environment with `package` alone, which sees the packages that it depends on."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    python = folder / "bin" / "python"
    # A folder that a .pth file names is searched, and its own .pth files are not read: what is
    # installed there for editing is not found.
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    run(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", package, cwd=folder)
    where = run(python, "-c", "import axialtrain; print(axialtrain.__file__)", cwd=folder)
    assert Path(where.strip()) == site / "axialtrain" / "__init__.py"
    return python


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_a_wheel_has_what_it_needs_and_nothing_else(names, built):
    sdist, wheel, other = built
    inside = contents(wheel)
    assert inside == contents(other), "of the sdist and of the checkout it is the same"
    wanted = {name for name in names if name.startswith("axialtrain/")}
    wanted |= {f"axialtrain/{name}" for name in names if name.startswith("configs/")}
    wanted |= {f"axialtrain/scripts/{name}" for name in [*FILES.values(), "hostfile.example"]}
    assert wanted <= inside.keys()
    for name in inside.keys() - wanted:
        assert name.split("/")[0].endswith(".dist-info"), f"{name} should not be in a wheel"
    with tarfile.open(sdist) as archive:
        files = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "constraints.txt"} <= files
    stray = [name for name in files if name.startswith(("tests", "docker", ".ci", "docs"))]
    assert stray == []


def test_what_is_imported_is_asked_for(names):
    """By the dependencies, or by an extra that is not for developers. The environments below see
    all that is installed beside, and would not tell."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    asked = [
        *project["dependencies"],
        *(w for name in extras if name != "dev" for w in extras[name]),
    ]
    declared = {canonicalize_name(Requirement(text).name) for text in asked}
    owners = packages_distributions()
    imported = set()
    for name in names:
        if name.startswith("axialtrain/") and name.endswith(".py"):
            for node in ast.walk(ast.parse((REPOSITORY / name).read_text())):
                if isinstance(node, ast.Import):
                    imported |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module is not None:
                    imported.add(node.module.partition(".")[0])
    others = imported - sys.stdlib_module_names - {"axialtrain", "_typeshed"}
    assert {"torch", "yaml", "hydra"} <= others
    undeclared = [
        module
        for module in sorted(others)
        if declared.isdisjoint(map(canonicalize_name, owners[module]))
    ]
    assert undeclared == []


@pytest.mark.parametrize(
    ("modules", "spared"),
    [
        ("axialtrain.models.registry, axialtrain.tasks.segmentation", "torch._dynamo"),
        ("axialtrain.launch.local, axialtrain.bench.suites", "torch._dynamo"),
        ("axialtrain.train.run", "torch._inductor.compile_fx"),
    ],
    ids=["models", "commands", "training"],
)
def test_no_process_imports_a_compiler_that_it_does_not_use(modules, spared):
    """They take one second of processor time, and two."""
    code = f"import sys, {modules}\nprint(*sys.modules)"
    found = run(sys.executable, "-c", code, cwd=REPOSITORY).split()
    assert modules.split(", ")[0] in found
    assert spared not in found


def test_a_wheel_in_an_empty_environment_runs_the_quickstart(built, tmp_path):
    python = environment(tmp_path / "environment", built[1])
    empty = tmp_path / "empty"
    empty.mkdir()
    said = run(python.with_name("axialtrain"), *SHORT, cwd=empty)
    assert "The ceiling of a model without long range" in said
    assert_trained(empty)


def test_an_sdist_in_an_empty_environment_runs_it_under_torchrun(built, tmp_path):
    python = environment(tmp_path / "environment", built[0])
    empty = tmp_path / "empty"
    empty.mkdir()
    torchrun = [python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    said = run(*torchrun, "-m", "axialtrain.cli", *SHORT, cwd=empty)
    assert said.count("drawing 2 scenes for train") == 1, "one rank draws"
    assert said.count("The ceiling of a model without long range") == 1
    assert_trained(empty)


def assert_trained(folder: Path) -> None:
    for name in LEFT:
        assert (folder / "runs" / "short" / name).exists()
    assert [line["step"] for line in metrics(folder / "runs" / "short")] == [1, 2]
