"""Turn an exhaustive search into the table that `samplers.py` replays.

    python pipelines/run.py +experiment=coco sampler=exhaustive 'backbone.choices=[0,0.2,0.4,0.6,0.8]' \\
        search.num_evaluations=4375 until=search
    python tests/benchmarks/search_table.py outputs/coco/runs/KEY

The table holds every vector of the space with its accuracies and its predicted latency; beside it
stands where it comes from.
"""

import argparse
import gzip
import json
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
from omegaconf import OmegaConf

from pipelines.compare import find_journal
from search.history import SearchHistory
from search.problem import ELAPSED
from search.study import read_study
from sparsevit import __version__
from sparsevit.sparsity import SparsitySpace

TABLES = Path(__file__).parent / "tables"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, help="outputs/…/runs/KEY")
    parser.add_argument("--name", default="swin_nano_coco")
    arguments = parser.parse_args()
    config = OmegaConf.to_container(OmegaConf.load(arguments.run / "config.yaml"))
    assert isinstance(config, dict)
    genes = list(read_study(find_journal(arguments.run)).user_attrs["search"]["genes"])
    history = SearchHistory.read(find_journal(arguments.run), arguments.name)
    rows = [
        {
            **dict(zip(genes, trial.vector, strict=True)),
            **{k: v for k, v in trial.values.items() if k != ELAPSED},
        }
        for trial in history.trials
        if trial is not None
    ]
    table = pd.DataFrame(rows).sort_values(genes)
    TABLES.mkdir(exist_ok=True)
    content = table.to_csv(index=False, float_format="%.6g").encode()
    path = TABLES / f"{arguments.name}.csv.gz"
    path.write_bytes(gzip.compress(content, mtime=0))
    provenance = {
        "vectors": len(table),
        "version": __version__,
        "date": datetime.now(UTC).date().isoformat(),
        "config": config,
        "calibration": json.loads((arguments.run / "calibrate" / "latency.json").read_text()),
    }
    path.with_name(f"{arguments.name}.json").write_text(json.dumps(provenance, indent=2))
    print(f"{len(table)} vectors in {path} ({path.stat().st_size / 1024:.0f} KiB)")


def load_table(name: str) -> tuple[SparsitySpace, dict[tuple[float, ...], dict[str, float]]]:
    """The space of a table, and the values of every vector."""
    provenance = json.loads((TABLES / f"{name}.json").read_text())
    table = pd.read_csv(TABLES / f"{name}.csv.gz")
    genes = [column for column in table.columns if column.startswith("stage")]
    values = table.drop(columns=genes).to_dict("records")
    vectors = [tuple(row) for row in table[genes].to_numpy().tolist()]
    per_stage = [sum(gene.startswith(f"stage{stage}.") for gene in genes) for stage in range(1, 5)]
    space = SparsitySpace(
        tuple(2 * count for count in per_stage), tuple(provenance["config"]["backbone"]["choices"])
    )
    return space, dict(zip(vectors, values, strict=True))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
