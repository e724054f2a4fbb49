"""What `axialtrain shard` will do, and what it has done: for people, and for machines."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict

from axialtrain.data.assemble import Image, Summary
from axialtrain.data.checked import plain
from axialtrain.data.destination import Destination
from axialtrain.data.shard import RECORD, Work, versions
from axialtrain.data.sharding import Sharding
from axialtrain.data.statistics import Statistics

PAGE, SKIPPED = "summary.md", "skipped.csv"
_LISTED = 500  # images that the page has a line for; the record has all


def write_summary(
    place: Destination, summary: Summary, how: Sharding, seconds: float, started: str
) -> list[str]:
    """Write page, record, and, where images were skipped, why; returns their names.

    seconds: that it took. started: when, in ISO 8601. The page is the same for the same shards.
    """
    names = [PAGE, RECORD]
    with place.file(PAGE) as file:
        file.write(page(summary, how).encode())
    record = {
        "started": started,
        "seconds": round(seconds, 3),
        "options": asdict(how),
        "versions": versions(),
        "shards": summary.shards,
        "bytes": summary.bytes,
        "images": [asdict(image) for image in summary.images],
        "skipped": [{"image": image, "reason": reason} for image, reason in summary.skipped],
    }
    with place.file(RECORD) as file:
        file.write((json.dumps(record, indent=1, allow_nan=False) + "\n").encode())
    if summary.skipped:
        names.append(SKIPPED)
        text = io.StringIO()
        rows = [(_formula_less(image), _formula_less(why)) for image, why in summary.skipped]
        csv.writer(text).writerows([("image", "reason"), *rows])
        with place.file(SKIPPED) as file:
            file.write(text.getvalue().encode())
    return names


def page(summary: Summary, how: Sharding) -> str:
    """The page of a set of shards, in Markdown."""
    lines = [f"# {_cell(summary.out)}", "", _cell(f"{summary}."), ""]
    splits = sorted({image.split for image in summary.images})
    lines += _table(
        ("split", "images", "groups", "gigapixels", "tiles", "empty", "MB"),
        [
            _sums(split, [image for image in summary.images if image.split == split])
            for split in splits
        ],
    )
    lines += ["", *_of_bands(summary)]
    chosen = Counter((image.reader, image.why) for image in summary.images)
    lines += ["", "Read with:", ""]
    lines += [f"- {reader}, {count}: {_cell(why)}" for (reader, why), count in chosen.items()]
    labels = Counter(image.labelled for image in summary.images)
    lines += ["", "Labels:", ""]
    lines += [f"- {count}: {_cell(what)}" for what, count in labels.items()]
    options = {k: v for k, v in asdict(how).items() if v != getattr(Sharding(), k)}
    given = ", ".join(f"{key} {value}" for key, value in options.items())
    lines += ["", f"Options: {given or 'as they are by default'}.", ""]
    lines += _table(
        ("image", "split", "group", "px", "um/px", "tiles", "empty", "class"),
        [_image(image) for image in summary.images[:_LISTED]],
    )
    if len(summary.images) > _LISTED:
        lines += ["", f"{len(summary.images) - _LISTED} more are in {RECORD}."]
    if summary.skipped:
        lines += ["", "Skipped:", ""]
        listed = summary.skipped[:_LISTED]
        lines += [f"- {_cell(image)}: {_cell(reason)}" for image, reason in listed]
    return "\n".join(lines) + "\n"


def plan(work: Work, out: str) -> str:
    """What would be made of `work`, for --dry-run."""
    rows = []
    for split, jobs in work.splits.items():
        for job in jobs:
            head = job.head
            stored = "copied" if job.copied else f"as {head.encoding}"
            rows.append(
                (
                    job.name,
                    split or "-",
                    head.group,
                    f"{head.height} x {head.width}",
                    "-" if head.mpp is None else f"{head.mpp:.4g}",
                    f"{job.tiles} of {head.tile} px, {stored}",
                    f"{job.reader}: {job.why}",
                    job.labelled if head.label is None else f"class {head.label}",
                )
            )
    header = ("image", "split", "group", "px", "um/px", "tiles", "read with", "labels")
    widths = [max(len(str(row[i])) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(str(cell).ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    pixels = sum(job.head.height * job.head.width for job in work.inputs)
    lines.append(
        f"{out}: {len(rows)} images of {pixels / 1e9:.3f} gigapixels would be stored, in "
        f"{sum(job.blocks for job in work.inputs)} blocks; nothing was written"
    )
    lines += [f"would be skipped: {image}: {reason}" for image, reason in work.refused]
    return "\n".join(map(plain, lines))


def _sums(split: str, images: Sequence[Image]) -> tuple[object, ...]:
    pixels = sum(image.row.height * image.row.width for image in images)
    return (
        split or "all",
        len(images),
        len({image.group for image in images}),
        f"{pixels / 1e9:.3f}",
        sum(image.tiles for image in images),
        sum(image.empty for image in images),
        f"{sum(image.bytes for image in images) / 1e6:.1f}",
    )


def _of_bands(summary: Summary) -> list[str]:
    """The statistics of all images of each kind of pixels."""
    kinds: dict[str, list[Statistics]] = {}
    for image in summary.images:
        if image.row.statistics is not None:
            kinds.setdefault(str(image.row.kind), []).append(image.row.statistics)
    lines = []
    for kind, parts in kinds.items():
        whole = Statistics.joined(parts)
        assert whole is not None, "there is at least one"
        lines.append(
            f"{kind}: mean {_numbers(whole.mean)}, standard deviation {_numbers(whole.std)}, of "
            f"{whole.count} pixels."
        )
    return lines or ["No statistics of bands were taken."]


def _numbers(values: Sequence[float]) -> str:
    shown = ", ".join(f"{value:.6g}" for value in values[:8])
    return f"[{shown}{', ...' if len(values) > 8 else ''}]"


def _image(image: Image) -> tuple[object, ...]:
    row = image.row
    return (
        row.name,
        image.split or "-",
        image.group,
        f"{row.height} x {row.width}",
        "-" if image.mpp is None else f"{image.mpp:.4g}",
        image.tiles,
        image.empty,
        "-" if row.label is None else row.label,
    )


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> list[str]:
    cells = [header, ["---"] * len(header), *rows]
    return [f"| {' | '.join(_cell(str(cell)) for cell in row)} |" for row in cells]


def _cell(text: str) -> str:
    """`text` in a table of Markdown: of a stranger's file name no markup is left."""
    return "".join(f"\\{c}" if c in r"\`*[]<>|" else c for c in plain(text))


def _formula_less(text: str) -> str:
    """`text` for a table that a spreadsheet may open, as text."""
    shown = plain(text)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@")) else shown
