"""Tables of patches in HDF5, as CLAM and TRIDENT write them.

The only file that knows h5py. libhdf5 inflates a chunk to whatever it holds, and reads one that is
longer than it should be past the end of its buffer. So it only says where chunks lie; here they are
read, and decoded into memory of the size that they must have. No other file is opened: links to
others, virtual datasets and external storage are refused.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import h5py
import imagecodecs
import numpy as np
from h5py.h5z import FILTER_DEFLATE, FILTER_LZF, FILTER_SHUFFLE
from numpy.typing import NDArray

from axialtrain.data.readers.reader import one_line
from axialtrain.data.readers.table import (
    COORDS,
    FEATURES,
    NUMBERS,
    check_coords,
    check_features,
)

_MAX_CHUNK = 1 << 28  # bytes in memory, of all chunks that share rows
_MAX_CHUNKS = 1 << 22
_CACHE = 1 << 26  # bytes of chunks that are kept: tiles share them
_MAX_ATTRIBUTE = 64  # numbers
_FILTERS = {FILTER_DEFLATE: "gzip", FILTER_LZF: "lzf", FILTER_SHUFFLE: "shuffle"}
_REPACK = "convert it with `h5repack -f GZIP=4 -l CHUNK=1x1024`"
_ERRORS = (
    OSError,
    RuntimeError,
    ValueError,
    LookupError,
    TypeError,
    ArithmeticError,
    AttributeError,
    MemoryError,
    NotImplementedError,
)


class Hdf5Table:
    """The datasets `coords` and `features` of an HDF5 file. See `table.Table`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = h5py.File(path, "r", locking=False)
            self._bytes = path.open("rb")
        except _ERRORS as error:
            raise ValueError(
                f"{path}: not an HDF5 file that can be read ({one_line(error)})"
            ) from error
        try:
            self._open()
        except _ERRORS as error:
            self.close()
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise
            raise ValueError(f"{path}: a damaged HDF5 file ({one_line(error)})") from error

    def _open(self) -> None:
        path = self._path
        coords, features = (_dataset(path, self._file, name) for name in (COORDS, FEATURES))
        rows = check_coords(path, coords.shape, coords.dtype)
        self.width = check_features(path, features.shape, features.dtype, rows)
        self.numbers = _numbers((coords, features, self._file))
        self.coords = _Rows(path, coords, self._bytes.fileno()).read(0, rows)
        self._features = _Rows(path, features, self._bytes.fileno())

    def lines(self, start: int, stop: int) -> NDArray[Any]:
        try:
            return self._features.read(start, stop)
        except _ERRORS as error:
            raise ValueError(
                f"{self._path}: rows {start} to {stop} of its {FEATURES} cannot be read "
                f"({one_line(error)})"
            ) from error

    def close(self) -> None:
        self._bytes.close()
        self._file.close()


class _Rows:
    """Rows of a dataset [n, k] or [1, n, k], which has been checked, in its own dtype.

    file: the descriptor of the file that it lies in.
    """

    def __init__(self, path: Path, dataset: h5py.Dataset, file: int) -> None:
        self._dataset = dataset
        self._file = file
        self._batch = dataset.ndim - 2  # whether there is an axis of one in front
        self._count, self._width = dataset.shape[-2:]
        self._cached: OrderedDict[int, NDArray[Any]] = OrderedDict()
        itemsize = dataset.dtype.itemsize
        if dataset.chunks is None:  # which libhdf5 reads itself: its bytes lie there as they are
            stored = dataset.id.get_storage_size()
            if stored != self._count * self._width * itemsize:
                raise ValueError(
                    f"{path}: its {_name(dataset)} take {stored} bytes, which is not their size"
                )
            return
        self._chunk_bytes = math.prod(dataset.chunks) * itemsize
        self._deep, wide = dataset.chunks[-2:]
        across = -(-self._width // wide)
        if across * self._chunk_bytes > _MAX_CHUNK:
            raise ValueError(
                f"{path}: the chunks of its {_name(dataset)} are {dataset.chunks}, allowed is up "
                f"to {_MAX_CHUNK} bytes for a line of them: {_REPACK}"
            )
        if -(-self._count // self._deep) * across > _MAX_CHUNKS:
            raise ValueError(
                f"{path}: its {_name(dataset)} are in chunks of {dataset.chunks}, allowed is up to "
                f"{_MAX_CHUNKS} chunks: {_REPACK}"
            )
        self._kept = max(1, _CACHE // (across * self._chunk_bytes))
        self._filters = _filters(path, dataset)
        self._chunks = _chunks(dataset, -(-self._count // self._deep), across)

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """Rows start to stop, [stop - start, k]."""
        if self._dataset.chunks is None:
            rows = self._dataset[(0,) * self._batch + (slice(start, stop),)]
            return np.asarray(rows)
        found = np.empty((stop - start, self._width), self._dataset.dtype)
        for index in range(start // self._deep, -(-stop // self._deep)):
            top = index * self._deep
            low, high = max(start, top), min(stop, top + self._deep)
            found[low - start : high - start] = self._line(index)[low - top : high - top]
        return found

    def _line(self, index: int) -> NDArray[Any]:
        """The chunks that hold the rows from index * their depth on, side by side."""
        if index in self._cached:
            self._cached.move_to_end(index)
            return self._cached[index]
        while len(self._cached) >= self._kept:
            self._cached.popitem(last=False)
        chunks = [self._chunk(*chunk) for chunk in self._chunks[index].tolist()]
        line = chunks[0] if len(chunks) == 1 else np.concatenate(chunks, axis=1)
        self._cached[index] = line[:, : self._width]
        return self._cached[index]

    def _chunk(self, skipped: int, at: int, size: int) -> NDArray[Any]:
        """The chunk that takes `size` bytes from byte `at` on, [its rows, its channels].

        skipped: a bit for each filter that it did not go through.
        """
        if not 0 < size <= 2 * self._chunk_bytes + (1 << 12):  # it may have grown, by little
            raise ValueError(f"a chunk takes {size} bytes" if size else "a chunk was not written")
        raw: bytes | bytearray = os.pread(self._file, size, at)
        if len(raw) != size:
            raise ValueError("a chunk lies behind the end of the file")
        itemsize = self._dataset.dtype.itemsize
        for index, code in reversed(list(enumerate(self._filters))):
            if skipped >> index & 1:
                continue
            if code == FILTER_DEFLATE:
                raw = imagecodecs.zlib_decode(raw, out=self._chunk_bytes)
            elif code == FILTER_LZF:
                raw = imagecodecs.lzf_decode(raw, out=self._chunk_bytes)
            elif len(raw) == self._chunk_bytes:  # shuffled: all first bytes, all second bytes...
                raw = np.frombuffer(raw, np.uint8).reshape(itemsize, -1).T.tobytes()
        if len(raw) != self._chunk_bytes:
            raise ValueError(f"a chunk holds {len(raw)} bytes, not {self._chunk_bytes}")
        chunk = np.frombuffer(raw, self._dataset.dtype).reshape(self._dataset.chunks)
        return chunk[0] if self._batch else chunk


def _dataset(path: Path, file: h5py.File, name: str) -> h5py.Dataset:
    """The dataset `name`, whose numbers lie in this file, as numpy knows them."""
    if not file.id.links.exists(name.encode()):
        raise ValueError(f"{path}: has no dataset {name!r}, allowed are {COORDS} and {FEATURES}")
    link = file.get(name, getlink=True)
    if not isinstance(link, h5py.HardLink):
        raise ValueError(f"{path}: its {name!r} is a link, allowed is a dataset")
    dataset = file[name]
    if not isinstance(dataset, h5py.Dataset):
        raise ValueError(f"{path}: its {name!r} is no dataset")
    if dataset.is_virtual or dataset.external:
        raise ValueError(f"{path}: its {name!r} lies in other files, allowed is in this one")
    kind = dataset.id.get_type()
    if dataset.dtype.kind not in "iuf" or not kind.equal(h5py.h5t.py_create(dataset.dtype)):
        raise ValueError(f"{path}: its {name!r} is of {dataset.dtype}, allowed are plain numbers")
    return dataset


def _chunks(dataset: h5py.Dataset, down: int, across: int) -> NDArray[np.int64]:
    """Of each chunk its filters that were skipped, where it lies, and its bytes, [down, across, 3].

    Zeros where there is none.
    """
    found = np.zeros((down, across, 3), np.int64)
    deep, wide = dataset.chunks[-2:]

    def note(chunk: h5py.h5d.StoreInfo) -> None:
        *_, row, col = chunk.chunk_offset
        if row // deep < down and col // wide < across and chunk.byte_offset is not None:
            found[row // deep, col // wide] = chunk.filter_mask, chunk.byte_offset, chunk.size

    dataset.id.chunk_iter(note)
    return found


def _filters(path: Path, dataset: h5py.Dataset) -> list[int]:
    """The codes of the filters that its chunks went through, in this order."""
    made = dataset.id.get_create_plist()
    found = [made.get_filter(index) for index in range(made.get_nfilters())]
    for code, _, _, name in found:
        if code not in _FILTERS:
            words = name.decode("ascii", "replace")[:32]
            raise ValueError(
                f"{path}: its {_name(dataset)} went through the filter {words!r}, allowed are "
                f"{', '.join(_FILTERS.values())}: {_REPACK}"
            )
    return [code for code, *_ in found]


def _name(dataset: h5py.Dataset) -> str:
    return str(dataset.name).removeprefix("/")


def _numbers(objects: tuple[h5py.HLObject, ...]) -> dict[str, float]:
    """The attributes of `objects` that are in NUMBERS, of the first that has them.

    Of a pair (a downsample along x and y) the first.
    """
    numbers = {}
    for name in NUMBERS:
        for each in objects:
            if name not in each.attrs:
                continue
            attribute = each.attrs.get_id(name)
            if attribute.dtype.kind not in "iuf" or math.prod(attribute.shape) > _MAX_ATTRIBUTE:
                continue
            numbers[name] = float(np.ravel(each.attrs[name])[0])
            break
    return numbers
