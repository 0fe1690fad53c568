"""Files of `torch.save`, and pickles of NumPy arrays, read by the restricted unpickler.

`torch.load` is not used for it: for other classes than tensors it needs an unpickler that runs code, its
old format writes files when a pickle asks for that, and an environment variable turns its safe way on or off.
"""

import struct
from io import BufferedReader
from pathlib import Path
from typing import Any
from zipfile import ZIP_STORED, ZipFile, ZipInfo, is_zipfile

import torch

from sparsevit.checkpoints.unpickling import Storage, Unpickler

_MAGIC_NUMBER = 0x1950A86A20F9469CFC6C
"""First object of a file that torch wrote before version 1.6."""
_DAMAGED = "ends before its contents do: it was not downloaded or copied whole. Download it again"


class NotWeightsError(ValueError):
    """A file that holds no weights; the message goes after the file's name, and says what would do."""


def read_torch_file(path: Path) -> Any:
    """Read what `torch.save` or `pickle.dump` wrote; a stub stands for any object but tensors and arrays.

    The tensors of a zip archive, torch's format since 1.6, are mapped from disk.

    Raises:
        NotWeightsError: for an archive of another kind, and a file that was cut off.
        Exception: of any kind, for a file that is corrupt.
    """
    with path.open("rb") as file:
        if file.read(4) == b"PK\3\4":
            if not is_zipfile(path):  # its table of contents stands at the end
                raise NotWeightsError(_DAMAGED)
            return _read_archive(path)
        file.seek(0)
        try:
            content = Unpickler(file).load()
            return _read_old_format(file) if content == _MAGIC_NUMBER else content
        except EOFError as error:
            raise NotWeightsError(_DAMAGED) from error


def _read_archive(path: Path) -> Any:
    with ZipFile(path) as archive:
        members = {info.filename: info for info in archive.infolist()}
        root = next((name.removesuffix("data.pkl") for name in members if name.endswith("/data.pkl")), None)
        if f"{root}constants.pkl" in members:
            raise NotWeightsError(
                "is a TorchScript archive, which is a program: load it where you trust it with "
                "torch.jit.load, and save its state_dict(), best as .safetensors"
            )
        if root is None:
            raise NotWeightsError(
                "is a zip archive without weights of torch.save: unpack it, name a file in it"
            )
        if f"{root}byteorder" in members and archive.read(f"{root}byteorder") != b"little":
            raise NotWeightsError("was written on a big-endian machine: save it there as .safetensors")
        mapped = torch.UntypedStorage.from_file(str(path), False, path.stat().st_size)
        storages: dict[str, torch.UntypedStorage] = {}

        def load_storage(key: Any) -> Storage:
            _, dtype, name, _, length = key
            if name not in storages:
                storages[name] = _member(archive, mapped, members[f"{root}data/{name}"], dtype.itemsize)
            if len(storages[name]) < length * dtype.itemsize:
                raise NotWeightsError(_DAMAGED)
            return Storage(storages[name], dtype)

        with archive.open(f"{root}data.pkl") as file:
            return Unpickler(file, load_storage).load()


def _member(archive: ZipFile, mapped: Any, info: ZipInfo, itemsize: int) -> Any:
    """The bytes of a member: a part of the mapped file, if they stand there as they are."""
    if info.file_size == 0:
        return mapped[:0]
    header = bytes(mapped[info.header_offset : info.header_offset + 30])
    name_length, extra_length = struct.unpack("<HH", header[26:])  # the local header's own lengths count
    start = info.header_offset + 30 + name_length + extra_length
    if info.compress_type != ZIP_STORED or start % itemsize:
        return torch.frombuffer(bytearray(archive.read(info)), dtype=torch.uint8).untyped_storage()
    return mapped[start : start + info.file_size]


def _read_old_format(file: BufferedReader) -> Any:
    """The format before torch 1.6, after its magic number: pickles, then the bytes of all storages."""
    Unpickler(file).load()  # version of the format
    Unpickler(file).load()  # of the machine: byte order, and sizes of C's types
    storages: dict[str, Storage] = {}

    def load_storage(key: Any) -> Storage:
        _, dtype, name, _, length, view = key
        if name not in storages:
            zeros = torch.zeros(length * dtype.itemsize, dtype=torch.uint8)
            storages[name] = Storage(zeros.untyped_storage(), dtype)
        if view is None:
            return storages[name]
        _, offset, length = view
        part = storages[name].content[offset * dtype.itemsize : (offset + length) * dtype.itemsize]
        return Storage(part, dtype)

    content = Unpickler(file, load_storage).load()
    for name in Unpickler(file).load():
        length = int.from_bytes(file.read(8), "little")
        storage, dtype = storages[name]
        as_bytes = torch.empty(0, dtype=torch.uint8).set_(storage)
        num_bytes = file.readinto(as_bytes.numpy().data) if length else 0
        if not num_bytes == len(storage) == length * dtype.itemsize:
            raise NotWeightsError(_DAMAGED)
    return content
