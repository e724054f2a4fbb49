"""The samples that shards are made of."""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from axialtrain.data.encode import members
from axialtrain.data.tar import file_header

NAMES = st.text("abcdefghijklmnopqrstuvwxyz0123456789_.-", min_size=1, max_size=60)


@given(
    st.text("abcdefghijklmnopqrstuvwxyz0123456789_/-ä", min_size=1, max_size=120),
    st.dictionaries(NAMES.filter(lambda name: name[0] != "_"), st.binary(max_size=1200)),
)
def test_members_are_what_webdataset_writes(key, sample):
    """Long names, too, which take a header of their own, and members that fill a block."""
    buffer = io.BytesIO()
    with webdataset.TarWriter(buffer, encoder=False, mtime=0) as tar:
        tar.write({"__key__": key, **sample})
        length = tar.tarstream.offset
    assert members(key, sample) == buffer.getvalue()[:length]


@given(st.text(max_size=110), st.integers(0, 8**12))
def test_headers_are_what_tarfile_makes(name, size):
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode, entry.uname, entry.gname = size, 0o444, "bigdata", "bigdata"
    try:
        expected = entry.tobuf()
    except UnicodeEncodeError:  # lone surrogates
        with pytest.raises(UnicodeEncodeError):
            file_header(name, size)
    else:
        assert file_header(name, size) == expected


def test_making_shards_does_not_import_torch():
    """It would cost more than copying 10,000 tiles."""
    code = (
        "import sys; import axialtrain.cli, axialtrain.data.shard, axialtrain.data.making; "
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], timeout=60, check=True)
