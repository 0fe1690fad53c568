"""Compare searches: ``python pipelines/compare.py RUN RUN …``, a run being a folder or a study's journal.

Prints which search has the most accurate vector at which latency, and writes a page with the
hypervolume curves and all fronts in one plot. Latencies are those of the table that a search ended with.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from omegaconf import OmegaConf
from plotly.subplots import make_subplots

from pipelines.artifacts import write_text
from pipelines.stages.calibrate import PREDICTOR_FILE
from search.history import SearchHistory, common_reference
from search.pareto import FrontMember
from search.space import Vector
from sparsevit.latency import LatencyPredictor

NUM_LEVELS = 8
JOURNAL = "study.journal"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="outputs/…/runs/KEY, a search stage, or a journal")
    parser.add_argument("--output", type=Path, default=Path("compare.html"), help="the page to write")
    arguments = parser.parse_args()
    try:
        histories = read_runs(arguments.runs)
        reference = common_reference(histories)
    except ValueError as error:
        parser.error(str(error))
    accuracy, cost = (objective.name for objective in histories[0].objectives[:2])
    print(summary(histories, reference).to_string(index=False, float_format="{:.4g}".format))
    print(f"\nbest {accuracy} within {cost}, * the search that wins there")
    print(levels(histories, accuracy, cost).to_string(index=False))
    try:
        write_page(arguments.output, histories, reference, accuracy, cost)
    except OSError as error:
        parser.exit(2, f"error: --output {arguments.output} cannot be written: {error.strerror}\n")
    print(f"\npage: {arguments.output}")


def read_runs(paths: Sequence[Path]) -> list[SearchHistory]:
    """The searches of run folders, search stages or journals.

    Raises:
        ValueError: for a path that holds no search, or searches that cannot be compared.
    """
    histories: list[SearchHistory] = []
    for path in paths:
        journal = find_journal(path)
        name = name_of(path, len(histories) + 1)
        history = SearchHistory.read(journal, name, latency_of(path, journal))
        if len(history.objectives) < 2:
            raise ValueError(f"{journal} has one objective alone: there is no front to compare")
        histories.append(history)
    return histories


def find_journal(path: Path) -> Path:
    """The journal that a path stands for.

    Raises:
        ValueError: if there is none.
    """
    candidates = [path, path / JOURNAL, path / "search" / JOURNAL]
    config = path / "config.yaml"
    if config.is_file():
        storage = OmegaConf.select(OmegaConf.load(config), "search.storage")
        candidates += [Path(storage)] if storage else []
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise ValueError(f"{path} holds no search: name a folder below outputs/…/runs, or a study's journal")


def latency_of(path: Path, journal: Path) -> Callable[[Vector], Mapping[str, float]]:
    """Latency by the table that a run or search stage ended with; nothing where there is none.

    Raises:
        ValueError: for a table that cannot be read.
    """
    for folder in (path, path / "search", journal.parent):
        if (folder / PREDICTOR_FILE).is_file():
            predictor = LatencyPredictor.load(folder / PREDICTOR_FILE)
            return lambda vector: {"latency_ms": predictor.predict(predictor.space.canonicalize(vector))}
    return lambda vector: {}


def name_of(path: Path, number: int) -> str:
    """How a run is called in tables: its number, and its sampler and seed where it says them."""
    config = path / "config.yaml"
    if not config.is_file():
        return f"{number}: {path.name}"
    content = OmegaConf.load(config)
    sampler, seed = (OmegaConf.select(content, key) for key in ("sampler.name", "search.seed"))
    return f"{number}: {sampler}, seed {seed}"


def summary(histories: Sequence[SearchHistory], reference: dict[str, float]) -> pd.DataFrame:
    """A row per search: evaluations, failures, front members, hypervolume."""
    return pd.DataFrame(
        [
            {
                "search": history.name,
                "evaluations": len(history.trials),
                "failed or infeasible": sum(trial is None for trial in history.trials),
                "front members": len(history.front.members),
                "hypervolume": history.hypervolumes(reference)[-1] if history.trials else 0.0,
            }
            for history in histories
        ]
    )


def levels(histories: Sequence[SearchHistory], accuracy: str, cost: str) -> pd.DataFrame:
    """The best accuracy of every search within evenly spaced costs; the winner of a row has a star."""
    costs = [member.values[cost] for history in histories for member in history.front.members]
    low, high = min(costs), max(costs)
    rows = []
    for level in range(NUM_LEVELS):
        limit = low + (high - low) * (level + 1) / NUM_LEVELS
        best = [best_within(history, limit, accuracy, cost) for history in histories]
        values = [-1.0 if member is None else member.values[accuracy] for member in best]
        cells = {
            history.name: "–" if member is None else f"{value:.4f}{' *' if value == max(values) else ''}"
            for history, member, value in zip(histories, best, values, strict=True)
        }
        rows.append({f"{cost} ≤": f"{limit:.4g}", **cells})
    return pd.DataFrame(rows)


def best_within(history: SearchHistory, limit: float, accuracy: str, cost: str) -> FrontMember | None:
    members = [member for member in history.front.members if member.values[cost] <= limit]
    return max(members, key=lambda member: member.values[accuracy], default=None)


def write_page(
    path: Path, histories: Sequence[SearchHistory], reference: dict[str, float], accuracy: str, cost: str
) -> None:
    """Hypervolume over evaluations beside the fronts, interactive."""
    figure = make_subplots(rows=1, cols=2, subplot_titles=("Hypervolume", "Fronts"))
    colours = ("#1f77b4", "#ff7f0e", "#2ca02c", "#d62728", "#9467bd", "#8c564b", "#e377c2", "#7f7f7f")
    for index, history in enumerate(histories):
        style = {"color": colours[index % len(colours)]}
        volumes = history.hypervolumes(reference)
        figure.add_scatter(
            x=list(range(1, len(volumes) + 1)), y=volumes, name=history.name, line=style, row=1, col=1,
            legendgroup=history.name,
        )  # fmt: skip
        members = history.front.members
        figure.add_scatter(
            x=[member.values[cost] for member in members], y=[member.values[accuracy] for member in members],
            text=[str(list(member.vector)) for member in members], name=history.name, line=style,
            line_shape="hv", mode="lines+markers", row=1, col=2, legendgroup=history.name, showlegend=False,
        )  # fmt: skip
    for column, (x, y) in enumerate((("evaluations", "hypervolume"), (cost, accuracy)), start=1):
        figure.update_xaxes(title_text=x, row=1, col=column)
        figure.update_yaxes(title_text=y, row=1, col=column)
    figure.update_layout(height=520)
    write_text(path, go.Figure(figure).to_html(include_plotlyjs=True))


if __name__ == "__main__":
    main()
