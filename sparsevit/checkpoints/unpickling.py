"""Pickles read without running anything in them: tensors, arrays, and a stub for every other class.

A pickle names what to call. Here a name leads to one of the few functions below, all of them ours, or to a
`Stub`, which takes whatever it is given and does nothing. torch's and NumPy's own functions are not in
reach: a pickle could change what they are (a function has attributes), or make a data type that lies about
its memory.
"""

import copyreg
import pickle
from collections.abc import Callable
from typing import IO, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

_STORAGES = {
    "DoubleStorage": torch.float64, "FloatStorage": torch.float32, "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16, "LongStorage": torch.int64, "IntStorage": torch.int32,
    "ShortStorage": torch.int16, "CharStorage": torch.int8, "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool, "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128, "UntypedStorage": torch.uint8,
}  # fmt: skip


class Storage(NamedTuple):
    """Bytes of a file that tensors are views of, and the type of one element."""

    content: torch.UntypedStorage
    dtype: torch.dtype


class Stub:
    """An object of a class that is not loaded: takes calls, state and items, and keeps none of it."""

    origin = ""
    """The class as the file names it, ``module.name``."""

    def __new__(cls, *arguments: Any, **named: Any) -> "Stub":
        """An empty object, whatever the arguments."""
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """Keep nothing."""

    def __call__(self, *arguments: Any, **named: Any) -> "Stub":
        """The stub itself: what a method would have returned is not known."""
        return self

    def __setstate__(self, *state: Any) -> None:
        """Keep nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Keep nothing."""

    def append(self, *item: Any) -> None:
        """Keep nothing."""

    extend = add = append

    def __repr__(self) -> str:
        """The class that it stands for."""
        return f"<{self.origin}>"


class Unpickler(pickle.Unpickler):
    """An unpickler that runs nothing of what it reads, and asks `load_storage` for a tensor's bytes.

    Strings of Python 2 are read as latin-1, which is how it wrote the bytes of arrays.
    """

    def __init__(self, file: IO[bytes], load_storage: Callable[[Any], Storage] | None = None) -> None:
        super().__init__(file, encoding="latin1")
        self._load_storage = load_storage

    def load(self) -> Any:
        """The object of the pickle that comes next in the file."""
        # Where a pickle names a class by a number (copyreg's extensions), Python asks this cache before
        # `find_class`, and keeps the answer in it for all.
        copyreg.clear_extension_cache()
        try:
            return super().load()
        finally:
            copyreg.clear_extension_cache()

    def persistent_load(self, key: Any) -> Any:
        """The storage of ``("storage", type, name, device, length, …)``, or the class of ``("module", …)``.

        torch before 1.6 writes the latter, with the class and its source, for a whole module.
        """
        if isinstance(key, tuple) and key[0] == "module":
            return key[1]
        if self._load_storage is None or not isinstance(key, tuple) or key[0] != "storage":
            raise pickle.UnpicklingError("a reference to something outside of the pickle")
        return self._load_storage(key)

    def find_class(self, module: str, name: str) -> Any:
        """Ours for the name, or a stub. A dotted name (protocol 4) is a name as any other, and unknown."""
        if module.split(".")[0] == "torch" and name in _STORAGES:
            return _STORAGES[name]
        if module == "torch" and isinstance(vars(torch).get(name), torch.dtype):
            return vars(torch)[name]
        known = _KNOWN.get((module.replace("numpy._core", "numpy.core"), name))
        if known is None:
            return type("Stub", (Stub,), {"origin": f"{module}.{name}"})
        # A pickle may set attributes of any object, so that each mention gets a function of its own.
        return lambda *arguments: known(*arguments)


class _Items(dict[Any, Any]):
    """A dictionary that ignores attributes, such as the `_metadata` of a state dict."""

    def __setstate__(self, *state: Any) -> None:
        """Keep nothing."""


class _DType:
    """A NumPy data type, from its name and byte order alone."""

    def __init__(self, name: str, *options: Any) -> None:
        self.numpy = np.dtype(str(name))

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.numpy = self.numpy.newbyteorder(state[1])


class _Array(np.ndarray[Any, Any]):
    """An array whose memory is what its data type says."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        version, shape, dtype, is_fortran, content = state
        super().__setstate__((version, shape, dtype.numpy, is_fortran, _bytes(content)))


def _bytes(content: Any) -> Any:
    return content.encode("latin1") if isinstance(content, str) else content


def _tensor(
    storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *others: Any
) -> Tensor:
    """A view of a storage. `set_` would enlarge one that is too small, with whatever is in memory."""
    content = storage.content
    dtype = next((each for each in others if isinstance(each, torch.dtype)), storage.dtype)
    last = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True))
    if min(*size, *stride, offset, 1) < 0 or (0 not in size and (last + 1) * dtype.itemsize > len(content)):
        raise pickle.UnpicklingError(f"a tensor of the shape {list(size)} that is larger than its storage")
    return torch.empty(0, dtype=dtype).set_(content, offset, size, stride)


def _tensor_of_type(rebuild: Any, kind: Any, arguments: tuple[Any, ...], state: Any) -> Any:
    """A tensor with attributes, without them; a stub of its class if it is built in a way of its own."""
    return kind() if isinstance(rebuild, type) else rebuild(*arguments)


def _scalar(dtype: _DType, content: Any) -> Any:
    return content if dtype.numpy.hasobject else np.frombuffer(_bytes(content), dtype.numpy)[0]


def _array_of_bytes(content: Any, dtype: _DType, shape: tuple[int, ...], order: str = "C") -> Any:
    return np.frombuffer(content, dtype.numpy).reshape(shape, order="F" if order == "F" else "C")


_KNOWN: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor_v3"): _tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_parameter_with_state"): lambda tensor, *_: tensor,
    ("torch._utils", "_rebuild_device_tensor_from_numpy"): lambda array, *_: array,
    ("torch._utils", "_rebuild_device_tensor_from_cpu_tensor"): lambda tensor, *_: tensor,
    ("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_type,
    ("torch", "Size"): torch.Size,
    ("collections", "OrderedDict"): _Items,
    ("collections", "defaultdict"): lambda *_: _Items(),
    ("_codecs", "encode"): lambda text, *_: _bytes(text),  # bytes, before protocol 3
    ("__builtin__", "bytes"): bytes,  # none of them
    ("numpy", "dtype"): _DType,
    ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array((0,), "b"),
    ("numpy.core.multiarray", "scalar"): _scalar,
    ("numpy.core.numeric", "_frombuffer"): _array_of_bytes,
}
"""What a name in a pickle leads to. Parameters become tensors; devices, hooks and subclasses are left out."""
