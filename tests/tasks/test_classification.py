"""Classification: losses, distillation and scores are their formulas, and the same on any mesh."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import pytest

import torchvision_ops  # isort: skip  # noqa: F401 (before timm)
import torch
from distributed.launcher import run_ranks
from distributed.task_ranks import ACCUMULATION, HELD_OUT, IMAGES
from distributed.vit_ranks import (
    CLASSES,
    PATCH,
    Lesson,
    learn,
    small_options,
    small_vit,
    targets_of,
    whole_batch,
)
from torch import Tensor

from axialtrain.mesh.mesh import Mesh, MeshConfig
from axialtrain.models.chance import Chance
from axialtrain.models.registry import model_config
from axialtrain.tasks.classification import Classification, ClassificationConfig, DistillConfig
from axialtrain.train.config import OptimConfig, RunConfig
from axialtrain.train.schedule import ScheduleConfig, learning_rate

CPU = torch.device("cpu")
GRID = (5, 7)
STUDENT = model_config("axial_vit_tiny_patch8", **small_options("distilled"))


def a_teacher(kind: str = "class", **options):
    """A ViT of timm, of heads of 64 channels as all that the weights may be of.

    It does not say the same of every image: its classes are alike in the mean.
    """
    options = {"embed_dim": 64, "num_heads": 1, "mlp_ratio": 2} | options
    model = small_vit(kind, dynamic_img_size=True, dynamic_img_pad=True, **options)
    if {"num_classes", "in_chans"}.isdisjoint(options):
        with torch.no_grad():
            mean = model(a_batch().pixels.movedim(-1, 1)).mean(0)
            model.head.bias -= 2 * mean if kind == "distilled" else mean
    return model


def a_task(teacher: str | None = None, classes: int = CLASSES, **options) -> Classification:
    distill = {key: options.pop(key) for key in ("kind", "weight", "temperature") if key in options}
    config = ClassificationConfig(classes, distill=DistillConfig(teacher, **distill), **options)
    return Classification(config)


def a_batch(step: int = 0):
    """Images that are all there: as timm would have them."""
    batch = whole_batch(GRID, step)
    return replace(
        batch,
        pixels=torch.randn(batch.pixels.shape, generator=torch.Generator().manual_seed(step)),
        valid=torch.ones_like(batch.valid),
    )


def some_logits(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(IMAGES, *shape, generator=generator, dtype=torch.float64)


# --- The formulas, written out --------------------------------------------------------------------


def cross_entropy(logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """-sum_c q_c log p_c, where q has 1 - smoothing of its mass on the target, the rest evenly."""
    share = torch.full_like(logits, smoothing / logits.shape[1])
    share[torch.arange(len(logits)), targets] += 1 - smoothing
    return -(share * (logits - logits.exp().sum(1, keepdim=True).log())).sum(1)


def hard_distillation(by_label, by_teacher, targets, taught, weight, smoothing=0.0) -> Tensor:
    """DeiT (arXiv 2012.12877), eq. 3, of either head: lambda is 1/2 there."""
    decision = torch.stack([row.argmax() for row in taught])
    first = cross_entropy(by_label, targets, smoothing)
    return (1 - weight) * first + weight * cross_entropy(by_teacher, decision)


def soft_distillation(by_label, by_teacher, targets, taught, weight, heat, smoothing=0.0) -> Tensor:
    """Eq. 2: (1 - lambda) CE + lambda tau^2 KL of the two distributions at temperature tau."""
    p, q = (taught / heat).softmax(1), (by_teacher / heat).softmax(1)
    divergence = (p * (p / q).log()).sum(1)
    first = cross_entropy(by_label, targets, smoothing)
    return (1 - weight) * first + weight * heat**2 * divergence


# --- Loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_loss_is_the_cross_entropy_of_each_image(smoothing):
    batch, logits = a_batch(), some_logits(CLASSES)
    loss, targets = a_task(smoothing=smoothing).loss(logits, batch)
    want = cross_entropy(logits, batch.targets, smoothing)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)
    assert targets.tolist() == [1] * IMAGES, "of each rank: no factor row x col"


def test_without_a_teacher_both_heads_learn_the_labels():
    batch, logits = a_batch(), some_logits(2, CLASSES)
    loss, _ = a_task(distilled=True, weight=0.3, smoothing=0.2).loss(logits, batch)
    want = 0.7 * cross_entropy(logits[:, 0], batch.targets, 0.2)
    want = want + 0.3 * cross_entropy(logits[:, 1], batch.targets, 0.2)
    torch.testing.assert_close(loss, want, rtol=1e-12, atol=0)


@pytest.mark.parametrize("kind", ["class", "distilled"])
@pytest.mark.parametrize("how", ["hard", "soft"])
def test_distillation_is_the_papers(tmp_path, how, kind):
    """The teacher is timm's own model, with its own position embedding at this image's size."""
    timms = a_teacher(kind)
    torch.save(timms.state_dict(), tmp_path / "teacher.pth")
    options = {"kind": how, "weight": 0.3, "temperature": 2.5, "smoothing": 0.1}
    task = a_task(str(tmp_path / "teacher.pth"), distilled=True, **options)
    task.prepare(Mesh(), CPU)
    batch = a_batch()
    logits = some_logits(2, CLASSES).requires_grad_()
    with torch.no_grad():
        taught = timms(batch.pixels.movedim(-1, 1)).double()
    assert len(taught.argmax(1).unique()) > 1
    common = (logits[:, 0], logits[:, 1], batch.targets, taught, 0.3)
    if how == "hard":
        want = hard_distillation(*common, smoothing=0.1)
    else:
        want = soft_distillation(*common, 2.5, smoothing=0.1)
    got, _ = task.loss(logits, batch)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    weights = torch.arange(1.0, IMAGES + 1).double()
    (gradient,) = torch.autograd.grad(got @ weights, logits)
    (wanted,) = torch.autograd.grad(want @ weights, logits)
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-6)


def test_in_evaluation_a_distilled_model_is_judged_by_its_labels(tmp_path):
    torch.save(a_teacher().state_dict(), tmp_path / "teacher.pth")
    batch, logits = a_batch(), some_logits(CLASSES)
    loss, _ = a_task(str(tmp_path / "teacher.pth"), distilled=True).loss(logits, batch)
    torch.testing.assert_close(loss, cross_entropy(logits, batch.targets), rtol=1e-12, atol=0)


def test_a_teacher_is_not_trained_and_draws_nothing(tmp_path):
    torch.save(a_teacher().state_dict(), tmp_path / "teacher.pth")
    before = torch.get_rng_state()
    teacher = a_task(str(tmp_path / "teacher.pth"), distilled=True).teacher()
    assert torch.equal(torch.get_rng_state(), before), "a run with a teacher draws other weights"
    assert teacher is not None
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert a_task().teacher() is None


# --- Scores ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("classes", [CLASSES, 8, 3])
def test_scores_count_the_best_and_the_five_best(classes):
    batch, logits = a_batch(), some_logits(classes, seed=1)
    batch = replace(batch, targets=batch.targets % classes)
    batch.weight[3] = 0  # a filler
    first = five = 0
    for image in (0, 1, 2, 4):
        order = sorted(range(classes), key=lambda c, i=image: -float(logits[i, c]))
        first += order[0] == batch.targets[image]
        five += batch.targets[image] in order[:5]
    task = a_task(classes=classes)
    scores = task.scores(logits, batch)
    assert scores["counts"].tolist() == [4, first, five]
    assert task.summary(scores) == {"accuracy": first / 4, "top5": five / 4}
    assert 0 < first < 4 or classes == 3


def test_scores_add_up_over_batches():
    task, first, second = a_task(), a_batch(), a_batch(step=1)
    logits = some_logits(CLASSES), some_logits(CLASSES, seed=1)
    both = replace(
        first,
        targets=torch.cat([first.targets, second.targets]),
        weight=torch.cat([first.weight, second.weight]),
    )
    one, other = (
        task.scores(*pair)["counts"] for pair in zip(logits, (first, second), strict=True)
    )
    assert torch.equal(one + other, task.scores(torch.cat(logits), both)["counts"])
    assert task.summary({"counts": torch.zeros(3)}) == {"accuracy": 0, "top5": 0}


def test_the_panel_names_both_classes():
    batch, logits = a_batch(), some_logits(CLASSES)
    (panel,) = a_task().panels(logits, batch, mean=0.4, std=0.1)
    assert panel.title == f"class {batch.targets[0]}, predicted {logits[0].argmax()}"
    assert panel.pixels.shape == (*GRID, 3)


# --- What is not allowed --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 1}, r"task\.classes=1: allowed are 2 to"),
        ({"classes": 2**16 + 1}, r"task\.classes=65537: allowed are 2 to"),
        ({"pool": "median"}, r"task\.pool='median': allowed are mean, prefix, attention"),
        ({"smoothing": 1.0}, r"task\.smoothing=1\.0: allowed is 0 to below 1"),
        ({"kind": "mild"}, r"task\.distill\.kind='mild': allowed are hard, soft"),
        ({"weight": 1.1}, r"task\.distill\.weight=1\.1: allowed is 0 to 1"),
        ({"temperature": 0.0}, r"task\.distill\.temperature=0\.0: allowed are numbers above 0"),
        ({"weight": 0.4}, r"task\.distill\.weight=0\.4 says nothing without task\.distilled=true"),
        ({"distilled": True, "kind": "soft"}, r"kind=soft says nothing without task\.distill\.tea"),
        (
            {"distilled": True, "temperature": 2.0},
            r"temperature=2\.0 says nothing without task\.dis",
        ),
        ({"teacher": "x.pth"}, r"task\.distill\.teacher=x\.pth teaches .* task\.distilled=true"),
    ],
    ids=str,
)
def test_a_value_that_is_not_allowed_is_named(options, message):
    with pytest.raises(ValueError, match=message):
        a_task(**options)


TEACHERS = {
    "other classes": (lambda: a_teacher(num_classes=4), "tells [4] classes apart, allowed are"),
    "no head": (lambda: a_teacher(num_classes=0), "tells [] classes apart, allowed are those of"),
    "mean pooling": (lambda: a_teacher("mean"), "allowed are weights of timm's ViT and DeiT"),
    "registers": (lambda: a_teacher("registers"), "allowed are weights of timm's ViT and DeiT"),
    "registers alone": (lambda: a_teacher("mean", fc_norm=False), "has no cls_token: allowed are"),
    "no token": (lambda: a_teacher("mean", reg_tokens=0, fc_norm=False), "has no cls_token: allo"),
    "heads of 80 channels": (  # vit_huge's and deit3_huge's; the weights do not say so
        lambda: a_teacher(embed_dim=1280, num_heads=16, depth=1, mlp_ratio=0.1),
        "width 1280, which is no multiple of 64 up to 1024: allowed are",
    ),
    "other patches": (
        lambda: a_teacher(patch_size=2 * PATCH),
        "has patch=4, allowed is the student's, model.patch=2",
    ),
    "other bands": (lambda: a_teacher(in_chans=4), "has bands=4, allowed is the student's, model"),
}


@pytest.mark.parametrize(("make", "message"), TEACHERS.values(), ids=TEACHERS)
def test_a_teacher_that_does_not_fit_is_refused(tmp_path, make, message):
    torch.save(make().state_dict(), tmp_path / "teacher.pth")
    task = a_task(str(tmp_path / "teacher.pth"), distilled=True)
    with pytest.raises(ValueError, match=r"task\.distill\.teacher=.*teacher\.pth: ") as caught:
        task.check(STUDENT)
    assert message in str(caught.value)


def test_a_teacher_that_fits_is_taken(tmp_path):
    torch.save(a_teacher().state_dict(), tmp_path / "teacher.pth")
    a_task(str(tmp_path / "teacher.pth"), distilled=True).check(STUDENT)
    a_task().check(STUDENT)


# --- The loop on meshes takes the steps of one process --------------------------------------------

MESHES = {
    "2x2": MeshConfig(row=2, col=2),
    "2x2 heads": MeshConfig(row=2, col=2, exchange="heads"),
    "data 2, row 2": MeshConfig(data=2, row=2),
    "col 2, tensor 2": MeshConfig(col=2, tensor=2, exchange="gather"),
}
STEPS = 3
SGD = OptimConfig("sgd", lr=10.0, weight_decay=0.02, momentum=0.9, clip=0.1)
SCHEDULE = ScheduleConfig("cosine", warmup=1, final=0.1)


@dataclass
class Plain:
    start: dict[str, Tensor]
    losses: list[float]
    norms: list[float]
    held_out: list[tuple[float, float]]  # loss and accuracy, after the second step and the last
    weights: dict[str, Tensor]


def plain_loss(lesson: Lesson, output: Tensor, batch) -> Tensor:
    """The mean over the images of a step, of the formulas above."""
    if output.ndim == 2:
        return cross_entropy(output, batch.targets, lesson.smoothing).mean()
    teacher = Classification(lesson.config).teacher()
    assert teacher is not None
    with torch.no_grad():
        taught = teacher.double()(batch.pixels, batch.valid, batch.place)
    common = (output[:, 0], output[:, 1], batch.targets, taught, lesson.weight)
    if lesson.kind == "hard":
        return hard_distillation(*common, smoothing=lesson.smoothing).mean()
    return soft_distillation(*common, 2.0, smoothing=lesson.smoothing).mean()


@functools.cache
def plain_steps(lesson: Lesson) -> Plain:
    model = lesson.build().double()
    named = dict(model.named_parameters())
    start = {name: weight.detach().clone() for name, weight in named.items()}
    decayed = [p for name, p in named.items() if p.ndim >= 2 and name.endswith("weight")]
    others = [p for name, p in named.items() if not (p.ndim >= 2 and name.endswith("weight"))]
    groups = [
        {"params": decayed, "weight_decay": SGD.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.SGD(groups, momentum=SGD.momentum)
    losses, norms, held_out = [], [], []
    for step in range(STEPS):
        batch = whole_batch(lesson.grid, step, torch.float64)
        chance = Chance(RunConfig.seed, step, tuple(batch.samples.tolist()))
        output = model.train()(batch.pixels, batch.valid, batch.place, chance=chance)
        loss = plain_loss(lesson, output, batch)
        optimizer.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), SGD.clip)))
        losses.append(loss.item())
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, STEPS, SGD.lr, SCHEDULE)
        optimizer.step()
        if step > 0:
            batch = whole_batch(lesson.grid, HELD_OUT, torch.float64)
            output = model.eval()(batch.pixels, batch.valid, batch.place)
            hits = (output.argmax(1) == batch.targets).double().mean()
            held_out.append((plain_loss(lesson, output, batch).item(), hits.item()))
    return Plain(start, losses, norms, held_out, {n: p.detach() for n, p in named.items()})


def check(lesson: Lesson, mesh: str, stage: int) -> None:
    expected = plain_steps(lesson)
    assert min(expected.norms) > 2 * SGD.clip, "clipping should be at work"
    ranks = run_ranks(
        learn,
        MESHES[mesh].size,
        lesson=lesson,
        mesh=MESHES[mesh],
        stage=stage,
        optim=SGD,
        schedule=SCHEDULE,
        steps=STEPS,
    )
    logged = ranks[0].logged
    assert [entry["loss"] for entry in logged] == pytest.approx(expected.losses, rel=1e-5)
    assert [entry["grad_norm"] for entry in logged] == pytest.approx(expected.norms, rel=1e-5)
    for entry, (loss, accuracy) in zip(logged[1:], expected.held_out, strict=True):
        assert entry["val_loss"] == pytest.approx(loss, rel=1e-5)
        assert entry["accuracy"] == pytest.approx(accuracy)
        assert accuracy <= entry["top5"] <= 1
    for got in ranks:
        for name in ("loss", "grad_norm", "val_loss", "accuracy"):
            assert got.last[name] == logged[-1][name]
        assert got.weights.keys() == expected.weights.keys()
        away, moved = 0.0, 0.0
        for name, weight in expected.weights.items():
            assert torch.equal(got.weights[name], ranks[0].weights[name]), name
            difference = (got.weights[name] - weight).norm()
            distance = (weight - expected.start[name]).norm()
            assert distance > 1e-4 * expected.start[name].norm(), name
            # Of its way; or 1e-7 of the weight itself, which fp32 rounds off.
            assert difference <= max(3e-5 * distance, 1e-7 * weight.norm()), name
            away, moved = away + difference.square(), moved + distance.square()
        assert away.sqrt() <= 3e-6 * moved.sqrt()


@pytest.fixture(scope="module")
def teacher_file(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(a_teacher("distilled").state_dict(), path)
    return str(path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("lesson", "mesh", "stage"),
    [
        (Lesson(smoothing=0.1, drop_path=0.3), "2x2", 1),
        (Lesson(smoothing=0.1, drop_path=0.3), "data 2, row 2", 3),
        (Lesson(pool="mean"), "2x2 heads", 3),
        (Lesson(pool="attention"), "col 2, tensor 2", 1),
        (Lesson(teacher="here", kind="hard"), "2x2", 3),
        (Lesson(teacher="here", kind="hard", smoothing=0.1), "data 2, row 2", 1),
        (Lesson(teacher="here", kind="soft", weight=0.8), "data 2, row 2", 3),
        (Lesson(teacher="here", kind="soft", drop_path=0.3), "2x2 heads", 1),
    ],
    ids=lambda value: (
        value.kind * bool(value.teacher) or value.pool if isinstance(value, Lesson) else str(value)
    ),
)
def test_training_takes_the_steps_of_one_process(lesson, mesh, stage, teacher_file):
    check(replace(lesson, teacher=teacher_file) if lesson.teacher else lesson, mesh, stage)


def test_the_comparison_is_not_an_empty_one():
    """Several classes in each step, and fillers on every mesh."""
    for step in range(STEPS):
        samples = torch.arange(IMAGES) + IMAGES * step
        assert len(targets_of(samples).unique()) > 2
    for mesh in MESHES.values():
        micro_batch = -(-IMAGES // (ACCUMULATION * mesh.data))
        assert micro_batch * ACCUMULATION * mesh.data > IMAGES
