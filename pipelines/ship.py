"""Turn a finished train stage into weights that the project ships, with their provenance.

python pipelines/run.py +experiment=coco init=scratch until=train
python pipelines/ship.py outputs/coco/runs/<key>
"""

import sys
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from pipelines.artifacts import METRICS_FILE, RESULT_FILE, read_json, write_json
from pipelines.build import SHIPPED_WEIGHTS
from pipelines.context import WEIGHTS_FILE
from sparsevit import __version__
from sparsevit.checkpoints import read_weights, write_weights


def ship(run_folder: Path) -> Path:
    """Write the dense weights of a run in half precision, and beside them how they were made."""
    config = OmegaConf.load(run_folder / "config.yaml")
    assert isinstance(config, DictConfig)
    stage = run_folder / "train"
    result = read_json(stage / RESULT_FILE)
    target = SHIPPED_WEIGHTS / f"{config.experiment}_{config.scale}.safetensors"
    target.parent.mkdir(exist_ok=True)
    write_weights(target, read_weights(stage / WEIGHTS_FILE), dtype=torch.float16)
    write_json(
        target.with_suffix(".json"),
        {
            "command": f"python pipelines/run.py +experiment={config.experiment} init=scratch until=train",
            "version": __version__,
            "torch": torch.__version__,
            "seed": config.seed,
            "metrics": read_json(run_folder / METRICS_FILE)["train"],
            "seconds": result["seconds"],
            "config": {
                name: OmegaConf.to_container(config[name], resolve=True)
                for name in ("task", "backbone", "data", "train")
            },
        },
    )
    return target


if __name__ == "__main__":
    print(ship(Path(sys.argv[1])))
