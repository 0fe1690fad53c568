"""Reading weight files: nothing in them is run, what they wrap is found, and what is none says what it is."""

import copyreg
import functools
import importlib
import io
import json
import operator
import os
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.optim.swa_utils import AveragedModel

from sparsevit.checkpoints import CheckpointError, read_weights, write_weights
from sparsevit.checkpoints.files import check_finite, read_checkpoint
from sparsevit.checkpoints.unpickling import Stub

REAL_FILE = Path("../shared/data/mmdet_mask_rcnn/epoch_1.pth")


class Call:
    """An object whose pickle is a call."""

    def __init__(self, function: Any, *arguments: Any, state: Any = None) -> None:
        self.function, self.arguments, self.state = function, arguments, state

    def __call__(self) -> None:
        """Pickle wants what it calls to be callable, and a call may return a function."""

    def __reduce__(self) -> tuple[Any, ...]:
        return self.function, self.arguments, self.state


class Armed:
    """A class that acts however it is rebuilt; `Armed.fire` is a dotted name in protocol 4."""

    @staticmethod
    def fire(marker: str) -> None:
        Path(marker).touch()

    def __init__(self, marker: str) -> None:
        self.marker = marker

    def __setstate__(self, state: dict[str, str]) -> None:
        self.fire(state["marker"])


class ArmedWhenMade(dict[str, Any]):
    """A dictionary of one's own, as training code keeps its settings in."""

    def __new__(cls, marker: str = "") -> "ArmedWhenMade":
        if marker:
            Armed.fire(marker)
        return super().__new__(cls)

    def __getnewargs__(self) -> tuple[str]:
        return (self["marker"],)


def armed_when_made(marker: str) -> ArmedWhenMade:
    made = ArmedWhenMade()
    made["marker"] = marker
    return made


def bytes_of_plain_pickle(marker: str) -> bytes:
    file = io.BytesIO()
    torch.save(Call(os.system, f"touch {marker}"), file)
    return file.getvalue()


@contextmanager
def extension_registry() -> Iterator[None]:
    copyreg.add_extension("posix", "system", 0x70)
    try:
        yield
    finally:
        copyreg.remove_extension("posix", "system", 0x70)


ATTACKS: dict[str, Callable[[str], Any]] = {
    "command": lambda marker: Call(os.system, f"touch {marker}"),
    "eval": lambda marker: Call(eval, f"open({marker!r}, 'w').close()"),
    "exec": lambda marker: Call(exec, f"open({marker!r}, 'w').close()"),
    "state": Armed,
    "new object": armed_when_made,
    "plain pickle inside": lambda marker: Call(torch.storage._load_from_bytes, bytes_of_plain_pickle(marker)),
    "partial": lambda marker: Call(Call(functools.partial, os.system, f"touch {marker}")),
    "method of a module": lambda marker: Call(
        operator.methodcaller("system", f"touch {marker}"), Call(importlib.import_module, "os")
    ),
    "attribute": lambda marker: Call(
        Call(getattr, Call(importlib.import_module, "os"), "system"), f"touch {marker}"
    ),
    "dotted name": lambda marker: Call(Armed.fire, marker),
    "through a tensor's function": lambda marker: Call(
        torch._tensor._rebuild_from_type_v2, os.system, Tensor, (f"touch {marker}",), None
    ),
    "extension": lambda marker: Call(os.system, f"touch {marker}"),
}


def save_zip(content: Any, path: Path, protocol: int) -> None:
    torch.save(content, path, pickle_protocol=protocol)


def save_old(content: Any, path: Path, protocol: int) -> None:
    torch.save(content, path, pickle_protocol=protocol, _use_new_zipfile_serialization=False)


def save_plain(content: Any, path: Path, protocol: int) -> None:
    path.write_bytes(pickle.dumps(arrays(content), protocol))


def arrays(content: Any) -> Any:
    """The same with NumPy arrays in place of tensors."""
    if isinstance(content, Tensor):
        return content.detach().numpy()
    return {key: arrays(value) for key, value in content.items()} if type(content) is dict else content


@pytest.mark.parametrize("save", [save_zip, save_old, save_plain])
@pytest.mark.parametrize("attack", ATTACKS)
def test_nothing_in_a_file_is_run(
    tmp_path: Path, attack: str, save: Callable[[Any, Path, int], None]
) -> None:
    marker, path = tmp_path / "fired", tmp_path / "weights.pth"
    weight = torch.arange(3.0)
    with extension_registry() if attack == "extension" else nullcontext():
        for protocol in (2, 4):
            payload = ATTACKS[attack](str(marker))
            with suppress(AttributeError):  # of torch's function, once the command has run
                pickle.loads(pickle.dumps(payload, protocol))
            assert marker.exists(), "the attack itself does not work"
            marker.unlink()
            content = {"optimizer": payload, "model": {"weight": weight}, "meta": {"hooks": [payload]}}
            save(content, path, protocol)
            marker.unlink(missing_ok=True)  # what is saved is not always inert
            checkpoint = read_checkpoint(path)
            assert not marker.exists()
            assert torch.equal(checkpoint.weights["weight"], weight)
            assert isinstance(checkpoint.meta["hooks"][0], Stub)


def test_a_pickle_cannot_change_the_functions_that_read_it(tmp_path: Path) -> None:
    """The opcode BUILD sets attributes of anything, also of a function."""
    rename = b"N}(X\x08\0\0\0__name__X\x08\0\0\0poisonedu\x86b"
    name = torch._utils._rebuild_tensor_v2.__name__
    for function in (b"ctorch._utils\n_rebuild_tensor_v2\n", b"cposix\nsystem\n"):
        (tmp_path / "odd.pkl").write_bytes(b"\x80\x02" + function + rename + b".")
        with pytest.raises(CheckpointError, match="odd.pkl holds"):
            read_weights(tmp_path / "odd.pkl")
    assert torch._utils._rebuild_tensor_v2.__name__ == name


def test_a_data_type_cannot_lie_about_its_memory(tmp_path: Path) -> None:
    """Flags that make numbers pointers to Python objects are not taken over."""
    pointers = Call(np.dtype, "f8", False, True, state=(3, "<", None, None, None, -1, -1, 63))
    reconstruct: Any = np.zeros(2).__reduce__()[0]
    array = Call(reconstruct, np.ndarray, (0,), b"b", state=(1, (2,), pointers, False, b"\1" * 16))
    (tmp_path / "odd.pkl").write_bytes(pickle.dumps({"model": {"a": np.zeros(1)}, "meta": {"array": array}}))
    read = read_checkpoint(tmp_path / "odd.pkl").meta["array"]
    assert read.dtype.flags == np.dtype("f8").flags
    assert read.tobytes() == b"\1" * 16


@pytest.mark.parametrize("save", [save_zip, save_old])
def test_a_tensor_larger_than_its_storage(tmp_path: Path, save: Callable[[Any, Path, int], None]) -> None:
    storage = torch.zeros(4)._typed_storage()  # type: ignore[no-untyped-call]
    for offset, size, stride in ((0, (5,), (1,)), (3, (2,), (1,)), (0, (2, 2), (3, 1)), (0, (2,), (-1,))):
        tensor = Call(torch._utils._rebuild_tensor_v2, storage, offset, size, stride, False, OrderedDict())
        save({"a": tensor}, tmp_path / "odd.pth", 2)
        with pytest.raises(CheckpointError, match="larger than its storage"):
            read_weights(tmp_path / "odd.pth")


class Patching(nn.Module):
    """A module whose source torch's old format compares, to write what has changed into a file."""

    dump_patches = True


@pytest.mark.filterwarnings("ignore")
def test_an_old_file_of_a_whole_module_writes_no_patch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(Patching(), "module.pth", _use_new_zipfile_serialization=False)
    content = Path("module.pth").read_bytes()
    assert content.count(b"A module whose source") == 1
    Path("module.pth").write_bytes(content.replace(b"A module whose source", b"A module whose SOURCE"))
    torch.load("module.pth", weights_only=False)
    assert list(tmp_path.glob("*.patch")), "the attack itself does not work"
    Path("Patching.patch").unlink()
    with pytest.raises(
        CheckpointError, match=r"an object of tests\.\S*\.Patching, .* save its whole state_dict"
    ):
        read_weights(Path("module.pth"))
    assert list(tmp_path.glob("*.patch")) == []


def many_kinds() -> dict[str, Tensor]:
    """Tensors of every sort that a state dict has."""
    generator = torch.Generator().manual_seed(0)
    return {
        "plain": torch.randn(3, 4, generator=generator),
        "parameter": nn.Parameter(torch.randn(2, generator=generator)),
        "half": torch.randn(5, generator=generator).half(),
        "whole": torch.arange(7),
        "unsigned": torch.tensor([1, 2**16 - 1], dtype=torch.uint16),
        "truth": torch.tensor([True, False]),
        "part": torch.arange(12.0).view(3, 4).t()[1:],
        "none": torch.empty(0, 3),
        "single": torch.tensor(3.0, dtype=torch.float64),
    }


def same(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype, name
        assert torch.equal(weights[name], value), name
        assert not weights[name].requires_grad, name


@pytest.mark.parametrize("save", [save_zip, save_old])
@pytest.mark.parametrize("protocol", [2, 4])
def test_every_kind_of_tensor(tmp_path: Path, protocol: int, save: Callable[[Any, Path, int], None]) -> None:
    expected = many_kinds() | {"brain": torch.randn(3).bfloat16(), "complex": torch.ones(2) * 1j}
    expected["with attribute"] = torch.ones(2)
    expected["with attribute"].note = "kept by torch"  # type: ignore[attr-defined]
    expected["tied"] = expected["plain"]
    save(OrderedDict(expected), tmp_path / "weights.pth", protocol)
    weights = read_weights(tmp_path / "weights.pth")
    same(weights, expected)
    assert weights["tied"].data_ptr() == weights["plain"].data_ptr()


@pytest.mark.parametrize("protocol", range(6))
def test_pickle_of_arrays(tmp_path: Path, protocol: int) -> None:
    """Detectron2's model zoo."""
    expected = many_kinds()
    content = {"model": arrays(expected), "__author__": "somebody", "matching_heuristics": True}
    content["model"]["big-endian"] = np.arange(4, dtype=">f4")
    content["model"]["text"] = np.array(["no", "weight"])
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, protocol))
    same(read_weights(tmp_path / "model.pkl"), expected | {"big-endian": torch.arange(4.0)})


def test_pickle_of_arrays_by_python_2(tmp_path: Path) -> None:
    """Written as Python 2 does: the bytes of names and arrays are strings of that time."""
    raw = np.array([1.5, -2.0], dtype="<f4").tobytes()
    assert len(raw) == 8
    (tmp_path / "model.pkl").write_bytes(
        b"\x80\x02}U\x05model}U\x06weight"
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\nK\x00\x85U\x01b\x87R"
        b"(K\x01K\x02\x85cnumpy\ndtype\nU\x02f4K\x00K\x01\x87R"
        b"(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x08" + raw + b"tbss."
    )
    assert read_weights(tmp_path / "model.pkl")["weight"].tolist() == [1.5, -2.0]


def test_archive_that_was_packed_anew(tmp_path: Path) -> None:
    expected = many_kinds()
    torch.save(expected, tmp_path / "weights.pth")
    with ZipFile(tmp_path / "weights.pth") as old, ZipFile(tmp_path / "new.pth", "w", ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, old.read(name))
    same(read_weights(tmp_path / "new.pth"), expected)


def test_a_file_is_what_it_holds_not_what_it_is_called(tmp_path: Path) -> None:
    expected = {"a": torch.arange(3.0)}
    write_weights(tmp_path / "weights.safetensors", expected)
    (tmp_path / "weights.safetensors").rename(tmp_path / "weights.pth")
    torch.save(expected, tmp_path / "weights.safetensors")
    same(read_weights(tmp_path / "weights.pth"), expected)
    same(read_weights(tmp_path / "weights.safetensors"), expected)


class HistoryBuffer:
    """In the shape of mmengine's: arrays, and methods of the class by name."""

    def __init__(self) -> None:
        self.history = np.array([0.5, 0.25])
        self.statistics = {"mean": self.mean}

    def mean(self) -> float:
        return float(self.history.mean())


def file_of_mmengine() -> dict[str, Any]:
    return {
        "meta": {"epoch": 1, "lr": np.float64(0.5), "dataset_meta": {"classes": ("cat", "dog")}},
        "message_hub": {"log_scalars": OrderedDict(loss=HistoryBuffer()), "runtime_info": OrderedDict()},
        "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []},
        "state_dict": OrderedDict(weight=torch.full((2,), 1.0)),
        "ema_state_dict": OrderedDict({"module.weight": torch.full((2,), 2.0), "steps": torch.tensor(5)}),
    }


def test_file_of_mmengine(tmp_path: Path) -> None:
    torch.save(file_of_mmengine(), tmp_path / "epoch_1.pth")
    checkpoint = read_checkpoint(tmp_path / "epoch_1.pth")
    assert checkpoint.path == tmp_path / "epoch_1.pth"
    same(checkpoint.weights, {"weight": torch.full((2,), 1.0)})  # mmengine saves the averaged as state_dict
    assert dict(checkpoint.meta) == file_of_mmengine()["meta"]


@pytest.mark.skipif(not REAL_FILE.exists(), reason="needs a checkpoint that mmengine wrote")
def test_file_that_mmengine_wrote() -> None:
    checkpoint = read_checkpoint(REAL_FILE)
    assert checkpoint.meta["mmengine_version"] == "0.10.7"
    assert checkpoint.meta["dataset_meta"]["classes"] == ("thing0", "thing1", "thing2")
    assert len(checkpoint.weights) == 231
    assert all(value.isfinite().all() for value in checkpoint.weights.values())


PLAIN, AVERAGED = {"a.weight": torch.zeros(2)}, {"a.weight": torch.ones(2)}
RAW_EMA = {"ema_a_weight": torch.zeros(2), "ema_momentum": torch.tensor(3.0)}


@pytest.mark.parametrize(
    "content",
    [
        AVERAGED,
        *({key: AVERAGED, "epoch": 3} for key in ("state_dict", "model", "model_state_dict", "module")),
        *({key: AVERAGED, "step": torch.tensor(3)} for key in ("network", "net", "weights", "params")),
        {"generator": AVERAGED, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        {"model": {"state_dict": AVERAGED, "ema": {"decay": 0.9}}},
        *({"state_dict": PLAIN, key: AVERAGED} for key in ("state_dict_ema", "ema_state_dict", "ema")),
        *({"model": PLAIN, key: AVERAGED} for key in ("model_ema", "ema_model")),
        {"params": PLAIN, "params_ema": AVERAGED},
        {"model": PLAIN, "ema": {"module": AVERAGED, "updates": 7}},
        {"model": PLAIN, "model_ema": {"module.a.weight": torch.ones(2), "n_averaged": torch.tensor(2)}},
        {"state_dict": AVERAGED, "ema": {"decay": torch.tensor(0.9)}},
        {"state_dict": AVERAGED, "current_model_state": PLAIN, "averaging_state": {"n": torch.tensor(2)}},
        {"state_dict": PLAIN | {"a.weight": torch.ones(2), "ema_a_weight": torch.zeros(2)}},
        {"module.a.weight": torch.ones(2)},
        {"module.module.a.weight": torch.ones(2)},
        {"_orig_mod.module.a._orig_mod.weight": torch.ones(2)},
        {"module._fsdp_wrapped_module.a._checkpoint_wrapped_module.weight": torch.ones(2)},
    ],
)  # fmt: skip
def test_wrapped_weights_are_found(tmp_path: Path, content: dict[str, Any]) -> None:
    torch.save(content, tmp_path / "weights.pth")
    same(read_weights(tmp_path / "weights.pth"), AVERAGED)


def test_what_was_not_averaged_is_taken_as_it_is(tmp_path: Path) -> None:
    norm = nn.BatchNorm1d(2)
    shadow = {name: torch.full_like(value, 7) for name, value in norm.named_parameters()}
    torch.save({"model": norm.state_dict(), "ema": shadow}, tmp_path / "weights.pth")
    same(read_weights(tmp_path / "weights.pth"), norm.state_dict() | shadow)


def test_names_that_only_look_like_a_wrapper_stay(tmp_path: Path) -> None:
    names = ("model.a.weight", "net.b", "my_orig_mod.c", "steps", "n_averaged", "ema_momentum", "a.module.d")
    expected = {name: torch.zeros(1) for name in names}
    torch.save({"state_dict": expected}, tmp_path / "weights.pth")
    same(read_weights(tmp_path / "weights.pth"), expected)


def test_averaged_model_of_torch(tmp_path: Path) -> None:
    torch.save(AveragedModel(nn.Linear(2, 3)).state_dict(), tmp_path / "weights.pth")
    assert read_weights(tmp_path / "weights.pth").keys() == {"weight", "bias"}


def test_compiled_module(tmp_path: Path) -> None:
    compiled = torch.compile(nn.Sequential(nn.Linear(2, 3)))
    assert "_orig_mod.0.weight" in compiled.state_dict()  # type: ignore[attr-defined]
    torch.save(compiled.state_dict(), tmp_path / "weights.pth")  # type: ignore[attr-defined]
    assert read_weights(tmp_path / "weights.pth").keys() == {"0.weight", "0.bias"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "holds a list, not a state dict"),
        ({"epoch": 3}, "holds no tensors: save a state dict"),
        ({"state_dict": {}}, "holds no tensors: save a state dict"),
        (nn.Linear(1, 1), r"an object of torch\.nn\.modules\.linear\.Linear, .* its whole state_dict\(\)"),
        ({"model": nn.Linear(1, 1), "epoch": 3}, r"modules\.linear\.Linear, .* its whole state_dict\(\)"),
        ({"model": {"a": Call(os.getcwd)}}, r"an object of posix\.getcwd, which is not read"),
        ({"d": {"a": torch.zeros(1)}, "g": {"a": torch.zeros(1)}}, r"several state dicts \(d, g\): save one"),
        ({"module.a": torch.zeros(1), "a": torch.zeros(1)}, "holds a twice once the prefixes"),
    ],
)  # fmt: skip
def test_file_without_a_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match=rf"odd\.pth {message}" if message[:5] == "holds" else message):
        read_weights(tmp_path / "odd.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty: .* Download or save it again"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a pointer of .*`git lfs pull`"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page, .* download it again, by"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>', "is a web page"),
        (b'{"error": "not found"}', r'is text \(\{"error": "not found"\} …\), not a weight file'),
        (b'{\n  "message": "rate limit"\n}', "is text .* download it again"),
        (b"\x1f\x8b\x08" + bytes(600), "is a packed archive: unpack it"),
        (b"this is not a checkpoint" * 10, "is corrupt or no weight file .* download it again"),
        (bytes(100), "is corrupt or no weight file"),
        (b"PK\x03\x04" + bytes(100), "ends before its contents do: .* Download it again"),
    ],
)  # fmt: skip
def test_file_that_is_something_else(tmp_path: Path, content: bytes, message: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"weights\{suffix} {message}"):
        read_weights(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no\.pth does not exist"):
        read_weights(tmp_path / "no.pth")


@pytest.mark.parametrize("kind", ["zip", "old", "pkl", "safetensors"])
def test_file_that_was_cut_off(tmp_path: Path, kind: str) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    weights = {"a": torch.randn(20), "b": torch.randn(30)}
    if kind == "safetensors":
        write_weights(tmp_path / "whole.safetensors", weights)
        (tmp_path / "whole.safetensors").rename(whole)
    else:
        {"zip": save_zip, "old": save_old, "pkl": save_plain}[kind](weights, whole, 2)
    content = whole.read_bytes()
    for length in sorted({1, 5, 12, 100, *range(7, len(content), len(content) // 30), len(content) - 1}):
        cut.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match="cut .*ownload it again"):
            read_weights(cut)
    same(read_weights(whole), weights)


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_archive(tmp_path: Path) -> None:
    torch.jit.script(nn.Linear(1, 1)).save(str(tmp_path / "script.pt"))  # type: ignore[no-untyped-call]
    with pytest.raises(CheckpointError, match=r"script\.pt is a TorchScript archive, .* save its state_dict"):
        read_weights(tmp_path / "script.pt")


def test_archive_of_something_else(tmp_path: Path) -> None:
    np.savez(tmp_path / "arrays.npz", a=np.zeros(1))
    with pytest.raises(CheckpointError, match=r"arrays\.npz is a zip archive without weights .* unpack it"):
        read_weights(tmp_path / "arrays.npz")


def test_archive_of_a_big_endian_machine(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(1)}, tmp_path / "weights.pth")
    content = (tmp_path / "weights.pth").read_bytes()
    with ZipFile(tmp_path / "big.pth", "w") as new, ZipFile(io.BytesIO(content)) as old:
        for name in old.namelist():
            new.writestr(name, b"big" if name.endswith("byteorder") else old.read(name))
    with pytest.raises(CheckpointError, match=r"big\.pth was written on a big-endian machine"):
        read_weights(tmp_path / "big.pth")


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoint_says_the_command_that_joins_it(tmp_path: Path) -> None:
    expected = {"a": torch.arange(3.0)}
    save_distributed({"model": expected}, checkpoint_id=tmp_path / "pieces")
    with pytest.raises(
        CheckpointError, match=r"pieces is a distributed checkpoint.* dcp_to_torch .*pieces.pth"
    ):
        read_weights(tmp_path / "pieces")
    dcp_to_torch_save(tmp_path / "pieces", tmp_path / "pieces.pth")  # what the command does
    same(read_weights(tmp_path / "pieces.pth"), expected)


def test_header_of_safetensors_that_promises_too_much(tmp_path: Path) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
    (tmp_path / "odd.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(8))
    with pytest.raises(CheckpointError, match=r"odd\.safetensors is corrupt .* download it again"):
        read_weights(tmp_path / "odd.safetensors")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_that_are_no_numbers(dtype: torch.dtype) -> None:
    weights = {f"{index}.weight": torch.ones(2, 3, dtype=dtype) for index in range(6)}
    weights |= {"count": torch.tensor(3), "none": torch.empty(0)}
    check_finite(weights, Path("weights.pth"))
    weights["2.weight"][0, 1] = float("nan")
    weights["4.weight"][0] = float("-inf")
    message = (
        r"weights\.pth holds NaN or infinity: 2\.weight \(1 of 6 values\), 4\.weight \(3 of 6 values\) "
        r"\(in 2 of 8 tensors\)\. The training that wrote it diverged: take an earlier checkpoint"
    )
    with pytest.raises(CheckpointError, match=message):
        check_finite(weights, Path("weights.pth"))


def test_large_numbers_are_numbers() -> None:
    limits = torch.finfo(torch.float64)
    check_finite({"a": torch.tensor([limits.min, limits.max], dtype=torch.float64)}, Path("weights.pth"))
    check_finite({"a": torch.ones(3).to(torch.float8_e4m3fn)}, Path("weights.pth"))
