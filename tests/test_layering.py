"""The layers `sparsevit ← search ← pipelines`, and the public names, are rules; these tests hold them."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FORBIDDEN = {
    "sparsevit": {"search", "pipelines", "hydra", "omegaconf", "optuna", "ray", "mlflow"},
    "search": {"pipelines", "hydra", "omegaconf", "mlflow"},
}


def imports_of(path: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, inside functions too."""
    packages = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            packages |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            packages.add((node.module or "").split(".")[0])
    return packages


@pytest.mark.parametrize("package", sorted(FORBIDDEN))
def test_no_layer_imports_what_is_above_it(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    leaks = {str(path): leak for path in files if (leak := imports_of(path) & FORBIDDEN[package])}
    assert not leaks


def test_the_walk_sees_lazy_imports(tmp_path: Path) -> None:
    (tmp_path / "leak.py").write_text("def f():\n    from ray import tune\n    return tune\n")
    assert imports_of(tmp_path / "leak.py") == {"ray"}


@pytest.mark.parametrize(
    ("library", "allowed"),
    [("mlflow", {"pipelines/tracking_sender.py"}), ("ray", {"search/engine.py", "search/lane.py"})],
)
def test_engines_are_imported_in_few_files(library: str, allowed: set[str]) -> None:
    packages = ("sparsevit", "search", "pipelines")
    importing = {
        str(path.relative_to(ROOT))
        for package in packages
        for path in (ROOT / package).rglob("*.py")
        if library in imports_of(path)
    }
    assert importing == allowed


def test_sparsevit_imports_without_the_rest() -> None:
    """On a device there may be torch, torchvision, numpy and safetensors, and nothing else of ours."""
    blocked = sorted(FORBIDDEN["sparsevit"] | {"pycocotools", "pandas", "matplotlib", "tqdm", "scipy"})
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "import sparsevit, sparsevit.latency, sparsevit.latency.calibration\n"
        "from sparsevit import SparsityVector, SparsitySpace, SparseSwin, create_backbone\n"
        "from sparsevit import load_backbone_weights, load_exported\n"
        "from sparsevit.latency import LatencyPredictor\n"
        "import torch\n"
        "backbone = create_backbone('swin_nano')\n"
        "print(len(backbone(torch.zeros(1, 3, 64, 64), SparsityVector((0.5,) * 6))))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "4"


def test_a_device_is_measured_with_torch_and_numpy_alone(tmp_path: Path) -> None:
    installed = {"torchvision", "safetensors", "PIL", "transformers"} | FORBIDDEN["sparsevit"]
    blocked = sorted(installed | {"pycocotools", "pandas", "matplotlib", "tqdm", "scipy"})
    arguments = ["calibrate", "swin_nano", str(tmp_path / "latency.json"), "--image-size", "32", "32"]
    arguments += ["--num-vectors", "10", "--num-held-out", "2", "--max-rounds", "3"]
    program = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({blocked!r}))\n"
        "from sparsevit.latency.__main__ import main\n"
        f"sys.exit(main({arguments!r}))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    # On a busy machine the measurements of so few may contradict each other, which is an answer too.
    assert result.returncode == 0 or "contradict each other" in result.stderr, result.stderr
    assert "ModuleNotFoundError" not in result.stderr


def test_public_names_of_search() -> None:
    from search import ParetoFront

    assert all(hasattr(ParetoFront, name) for name in ("hypervolume", "to_json", "of"))
    assert "members" in ParetoFront.__dataclass_fields__


def test_no_entry_script_shadows_a_package() -> None:
    """`python pipelines/run.py` puts pipelines/ first on sys.path."""
    names = {path.stem for path in (ROOT / "pipelines").iterdir()}
    assert not names & ({"search", "sparsevit"} | set(sys.stdlib_module_names))
