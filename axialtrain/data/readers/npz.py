"""Tables of patches in .npz: `coords` and `features`, and numbers of `table.NUMBERS` beside them.

A zip of .npy members, read without pickle. Before memory is taken a member's header, and what the
zip says of its size, are compared with each other and with what is allowed.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from axialtrain.data.checked import shown
from axialtrain.data.readers.reader import one_line
from axialtrain.data.readers.table import (
    COORDS,
    FEATURES,
    NUMBERS,
    check_coords,
    check_features,
)

MAX_BYTES = 1 << 30  # of the features, which are held as a whole
_MAX_DIRECTORY = 1 << 16  # bytes, of what the zip lists
_DIRECTORY_END = struct.Struct("<4s4H2IH")  # with which a zip without a comment ends
_ZIP64 = b"PK\x06\x07"
_MAX_HEADER = 10_000  # bytes
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_PIECE = 1 << 24  # bytes that are read at a time
_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    RuntimeError,  # zipfile's, for what is encrypted
    NotImplementedError,
    LookupError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
    tokenize.TokenError,
    MemoryError,
    SyntaxError,
    TypeError,
)


class NpzTable:
    """The arrays `coords` and `features` of an .npz. See `table.Table`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._open()
        except _ERRORS as error:
            if isinstance(error, ValueError) and str(error).startswith(str(path)):
                raise
            raise ValueError(f"{path}: not an .npz that can be read ({one_line(error)})") from error

    def _open(self) -> None:
        path = self._path
        _check_directory(path)
        with zipfile.ZipFile(path) as file:
            shape, dtype = self._header(file, COORDS)
            rows = check_coords(path, shape, dtype)
            self.coords = self._array(file, COORDS).reshape(rows, 2)
            shape, dtype = self._header(file, FEATURES)
            self.width = check_features(path, shape, dtype, rows)
            taken = rows * self.width * dtype.itemsize
            if taken > MAX_BYTES:
                raise ValueError(
                    f"{path}: its {FEATURES} take {taken} bytes, allowed in an .npz is up to "
                    f"{MAX_BYTES}: store them as HDF5, which is read in parts"
                )
            self.numbers = self._numbers(file)
        self._features: NDArray[Any] | None = None

    def lines(self, start: int, stop: int) -> NDArray[Any]:
        if self._features is None:
            try:
                with zipfile.ZipFile(self._path) as file:
                    found = self._array(file, FEATURES)
            except _ERRORS as error:
                raise ValueError(
                    f"{self._path}: its {FEATURES} cannot be read ({one_line(error)})"
                ) from error
            self._features = found.reshape(-1, self.width)
        return self._features[start:stop]

    def close(self) -> None:
        self._features = None

    def _numbers(self, file: zipfile.ZipFile) -> dict[str, float]:
        numbers = {}
        for name in NUMBERS:
            if f"{name}.npy" not in file.NameToInfo:
                continue
            shape, dtype = self._header(file, name)
            if dtype.kind not in "iuf" or math.prod(shape) != 1:
                raise ValueError(
                    f"{self._path}: its {name} is {dtype} of shape {shape}, allowed is one number"
                )
            numbers[name] = float(self._array(file, name).item())
        return numbers

    def _header(self, file: zipfile.ZipFile, name: str) -> tuple[tuple[int, ...], np.dtype[Any]]:
        """(shape, dtype) of the array `name`; ValueError if it is not what the zip holds."""
        info = self._info(file, name)
        with file.open(info) as member:
            shape, _, dtype = _npy_header(member)
            size = math.prod(shape) * dtype.itemsize
            if dtype.hasobject or any(side < 0 for side in shape):
                raise ValueError(f"{self._path}: its {name} are {dtype}, allowed are numbers")
            if info.file_size - member.tell() != size:
                raise ValueError(
                    f"{self._path}: its {name} are of shape {shown(shape)}, which take {size} "
                    f"bytes, and it holds {info.file_size - member.tell()}"
                )
        return shape, dtype

    def _array(self, file: zipfile.ZipFile, name: str) -> NDArray[Any]:
        """The array `name`, whose header has been checked."""
        with file.open(self._info(file, name)) as member:
            shape, fortran, dtype = _npy_header(member)
            array = np.empty(math.prod(shape), dtype)
            memory = array.view(np.uint8)
            at = 0
            while at < len(memory):
                piece = member.read(min(_PIECE, len(memory) - at))
                if not piece:
                    raise ValueError(f"its {name} are cut short")
                memory[at : at + len(piece)] = np.frombuffer(piece, np.uint8)
                at += len(piece)
            if member.read(1):  # behind which the zip's checksum is looked at, too
                raise ValueError(f"its {name} hold more than they say")
        return array.reshape(shape[::-1]).T if fortran else array.reshape(shape)

    def _info(self, file: zipfile.ZipFile, name: str) -> zipfile.ZipInfo:
        info = file.NameToInfo.get(f"{name}.npy")
        if info is None:
            raise ValueError(
                f"{self._path}: has no array {name!r}, allowed are {COORDS} and {FEATURES}"
            )
        if info.compress_type not in _METHODS:
            raise ValueError(
                f"{self._path}: its {name} are compressed in another way than numpy does"
            )
        return info


def _npy_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """(shape, whether in Fortran's order, dtype) of an .npy."""
    version = npy.read_magic(member)
    if version == (1, 0):
        return npy.read_array_header_1_0(member, _MAX_HEADER)
    if version == (2, 0):
        return npy.read_array_header_2_0(member, _MAX_HEADER)
    raise ValueError(f"an .npy of version {version}, allowed is 1.0 and 2.0")


def _check_directory(path: Path) -> None:
    """ValueError unless the zip ends as numpy writes it, with a short list of what it holds.

    zipfile makes an object of each entry, and a large file may list millions.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - _DIRECTORY_END.size - 20))
        end = file.read()
    if len(end) < _DIRECTORY_END.size:
        raise ValueError(f"{path}: is no .npz, or cut short")
    magic, *_, listed, _, comment = _DIRECTORY_END.unpack(end[-_DIRECTORY_END.size :])
    if magic != b"PK\5\6" or comment:
        raise ValueError(f"{path}: is no .npz, or cut short")
    if listed > _MAX_DIRECTORY or _ZIP64 in end[: -_DIRECTORY_END.size]:
        raise ValueError(
            f"{path}: lists more than {_MAX_DIRECTORY} bytes of entries, or is over 4 GiB: store "
            "it as HDF5"
        )
