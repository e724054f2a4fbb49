"""Tables of images, globs, groups and splits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tifffile

from axialtrain.cli import main
from axialtrain.data.listing import Entry, images_of, table_of
from axialtrain.data.region import open_shards
from axialtrain.data.splits import dealt


def table(folder: Path, text: str) -> Path:
    path = folder / "images.csv"
    path.write_text(text)
    return path


def test_a_table_says_what_is_known(tmp_path: Path) -> None:
    path = table(
        tmp_path,
        "\ufeffimage, label,group,split,mpp,instances\n"
        "a.svs,3,p1,train,0.25,\n"
        "\n"
        '"b, c.svs",b.tif,p1,train,,b_parts.tif\n'
        "/abs/d.svs,,,,,\n",
    )
    assert table_of(path) == [
        Entry(tmp_path / "a.svs", label=3, group="p1", split="train", mpp=0.25),
        Entry(
            tmp_path / "b, c.svs",
            labels=tmp_path / "b.tif",
            instances=tmp_path / "b_parts.tif",
            group="p1",
            split="train",
        ),
        Entry(Path("/abs/d.svs")),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty, allowed is a header with image, label"),
        ("image,lable\na,1\n", "column is 'lable', allowed are image, label, instances, group"),
        ("label\n1\n", r"columns are \['label'\], allowed is image once"),
        ("image,image\na,b\n", "allowed is image once, others once"),
        ("image\n", "names no image"),
        ("image,label\na\n", "line 2 has 1 cells, allowed are 2"),
        ("image,mpp\na,0.5\nb,-1\n", "line 3: mpp is '-1', allowed is micrometres per px above 0"),
        ("image,mpp\na,nan\n", "line 2: mpp is 'nan', allowed"),
        ("image,mpp\na,1e-12\n", r"line 2: mpp is '1e-12', allowed .* \(1e-09 to 1e\+09\)"),
        ("image,mpp\na,0.5\nb,1e300\n", "line 3: mpp is '1e300', allowed"),
        ("image,mpp\na,wide\n", "line 2: mpp is 'wide', allowed"),
        ("image,label\na,70000\n", "line 2: label is '70000', allowed is a class from 0 to 65535"),
        ("image,split\na,../x\n", r"line 2: split is '\.\./x', allowed is a name"),
        ("image,label,instances\na,3,b.tif\n", "line 2: instances is 'b.tif', allowed is nothing"),
        ("image,label\n,3\n", "line 2: image is '', allowed is a path"),
        ('image\n"a\n', "cannot be read as a table"),
    ],
)
def test_what_a_table_may_not_say_is_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table_of(table(tmp_path, text))


def test_a_table_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "images.csv"
    path.write_bytes(b"image\n\xff\xfe\n")
    with pytest.raises(ValueError, match="cannot be read as a table"):
        table_of(path)
    with pytest.raises(ValueError, match=r"none\.csv: cannot be read as a table"):
        table_of(tmp_path / "none.csv")


def test_globs_go_into_folders_and_are_sorted(tmp_path: Path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    for name in ("b.svs", "a.svs", "in/c.svs", "odd[1].svs"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    assert images_of(["[ab].svs"]) == [Path("a.svs"), Path("b.svs")]
    assert images_of(["**/*.svs"]) == [
        Path(n) for n in ("a.svs", "b.svs", "in/c.svs", "odd[1].svs")
    ]
    assert images_of(["odd[1].svs", "x.svs"]) == [Path("odd[1].svs"), Path("x.svs")]


def test_groups_are_dealt_out_whole_and_near_their_shares() -> None:
    rng = np.random.default_rng(0)
    groups = [f"p{number}" for number in rng.integers(0, 60, 400)]
    shares = {"train": 0.7, "validation": 0.2, "test": 0.1}
    splits = dealt(groups, shares, seed=3)
    assert len({*zip(groups, splits, strict=True)}) == len({*groups})
    for split, share in shares.items():
        assert abs(splits.count(split) / len(groups) - share) < 0.03
    assert dealt(groups, shares, seed=3) == splits
    assert dealt(groups, shares, seed=4) != splits
    # Only names and sizes count, not the order in which images come.
    backwards = dealt(groups[::-1], shares, seed=3)
    assert backwards[::-1] == splits


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        (["train=0.8", "validation=0.3"], "split shares add up to 1.1, allowed is 1"),
        (["train=1.5"], "split train is 1.5, allowed is above 0, to 1"),
        (["../x=1"], r"split is '\.\./x', allowed is a name"),
        (["train"], "split is 'train', allowed is NAME=NUMBER"),
        (["train=0.5", "train=0.5"], "split has a name twice"),
    ],
)
def test_what_shares_may_not_be_is_named(tmp_path: Path, capsys, shares, message) -> None:  # type: ignore[no-untyped-def]
    import re

    out = str(tmp_path / "out")
    assert main(["shard", "a.tif", "--out", out, "--split", *shares]) == 2
    assert re.search(message, capsys.readouterr().err)


def images(folder: Path, names: list[str]) -> None:
    for number, name in enumerate(names):
        pixels = np.full((40, 50, 3), 10 * number, np.uint8)
        tifffile.imwrite(folder / name, pixels, tile=(16, 16), photometric="rgb")


def test_splits_are_folders_of_their_own(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    names = [f"p{number // 2}_{number}.tif" for number in range(12)]
    images(tmp_path, names)
    out = tmp_path / "out"
    given = [str(tmp_path / name) for name in names]
    shares = ["--split", "train=0.5", "validation=0.5", "--group", "^(p[0-9]+)_"]
    assert main(["shard", *given, "--out", str(out), *shares]) == 0
    train, validation = (open_shards(str(out / split)) for split in ("train", "validation"))
    groups = [{s.head(row.name).group for row in s.images} for s in (train, validation)]
    assert [len(each) for each in groups] == [3, 3]
    assert not groups[0] & groups[1]
    assert main(["verify", "--deep", str(out / "train"), str(out / "validation")]) == 0
    page = (out / "summary.md").read_text()
    assert "| train | 6 | 3 |" in page
    capsys.readouterr()
    assert main(["shard", *given, "--out", str(out), *shares]) == 2
    assert "out: has a shard.json already" in capsys.readouterr().err
    (out / "shard.json").unlink()
    assert main(["shard", *given, "--out", str(out), *shares]) == 2
    assert "out: has a train/manifest.json already" in capsys.readouterr().err
    shares = ["--split", "train=0.99", "validation=0.01"]
    assert main(["shard", *given[:3], "--out", str(tmp_path / "few"), *shares]) == 2
    assert "split validation gets none of the 3 groups" in capsys.readouterr().err


def test_a_table_deals_out_by_its_column(tmp_path: Path, capsys) -> None:  # type: ignore[no-untyped-def]
    images(tmp_path, ["a.tif", "b.tif", "c.tif"])
    path = table(
        tmp_path, "image,label,split,group\na.tif,1,train,p\nb.tif,0,test,q\nc.tif,1,train,p\n"
    )
    out = tmp_path / "out"
    assert main(["shard", str(path), "--out", str(out)]) == 0
    assert [row.name for row in open_shards(str(out / "train")).images] == ["a", "c"]
    assert [row.label for row in open_shards(str(out / "test")).images] == [0]
    for text, message in (
        (
            "image,split,group\na.tif,train,p\nb.tif,test,p\n",
            "its group 'p' is in the splits train",
        ),
        ("image,split\na.tif,train\nb.tif,\n", "b.tif: has no split, allowed is one for every"),
        ("image,group\na.tif,a/b\n", "group is 'a/b', allowed is a name"),
    ):
        capsys.readouterr()
        other = str(tmp_path / "other")
        assert main(["shard", str(table(tmp_path, text)), "--out", other]) == 2
        assert message in capsys.readouterr().err
    assert main(["shard", str(path), "--out", other, "--labels", "x.tif"]) == 2
    assert "labels is given, allowed with a table are its columns" in capsys.readouterr().err
