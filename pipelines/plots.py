"""The report's pictures: interactive HTML by plotly, PNG by matplotlib."""

import base64
import html
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd
import plotly.graph_objects as go
from matplotlib.figure import Figure
from plotly.subplots import make_subplots
from torch import Tensor

from pipelines.artifacts import write_text

matplotlib.use("Agg")
from matplotlib import pyplot as plt

HTML_FILE = "report.html"
PNG_FILE = "pareto.png"
PICTURES_FILE = "pictures.png"
PICTURE_INCHES = 3.2


def write_report(
    folder: Path,
    table: pd.DataFrame,
    metric: str,
    front: Collection[str],
    hypervolumes: Sequence[float],
    *,
    header: Mapping[str, Any],
    by_class: pd.DataFrame,
    error_bar: float,
) -> None:
    """Write the report's HTML page, with what `write_pictures` left, and the picture of the front.

    Args:
        table: the Pareto table, the dense model first.
        metric: name of the accuracy.
        front: the vectors of the table that no other dominates.
        hypervolumes: after every evaluation of the search.
        header: what was measured, on what.
        by_class: parts of the metrics, a row each.
        error_bar: of the predicted latencies, relative.
    """
    figure = _interactive(table, metric, front, hypervolumes, error_bar)
    plot = figure.to_html(full_html=False, include_plotlyjs=True)
    facts = "".join(
        f"<tr><th>{html.escape(key)}</th><td>{html.escape(str(value))}</td></tr>"
        for key, value in header.items()
    )
    rows = table.to_html(index=False, float_format="{:.3f}".format, na_rep="")
    style = (
        "body{font-family:sans-serif;margin:2em} table{border-collapse:collapse} "
        "td,th{padding:.2em .8em;text-align:left}"
    )
    write_text(
        folder / HTML_FILE,
        f"<!doctype html><meta charset='utf-8'><title>SparseViT report</title><style>{style}</style>"
        f"<h1>Pareto front</h1><table>{facts}</table>{plot}{rows}"
        f"<h2>Classes</h2>{by_class.to_html(float_format='{:.3f}'.format, na_rep='')}"
        f"<h2>Pictures</h2><p>A window is darker, the fewer blocks of a stage computed it.</p>"
        f"<img style='max-width:100%' alt='predictions' src='{_inline(folder / PICTURES_FILE)}'>",
    )
    _static(folder / PNG_FILE, table, metric, front, header)


def write_pictures(folder: Path, rows: Sequence[Mapping[str, Tensor]]) -> None:
    """A sheet of pictures, a row for every sample.

    Args:
        rows: [3, H, W] uint8 by title, as many in every row.
    """
    height, width = max(
        (picture.shape[1:] for picture in rows[0].values()), key=lambda size: size[0] / size[1]
    )
    size = PICTURE_INCHES * len(rows[0]), (PICTURE_INCHES * height / width + 0.3) * len(rows)
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=size, squeeze=False)
    for row, places in zip(rows, axes, strict=True):
        for (title, picture), place in zip(row.items(), places, strict=True):
            place.imshow(picture.permute(1, 2, 0).numpy())
            place.set_title(title, fontsize=8)
            place.axis("off")
    _save(figure, folder / PICTURES_FILE)


def _inline(picture: Path) -> str:
    """A picture as part of a page."""
    return f"data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}"


def plot_front(page: Path, picture: Path, table: pd.DataFrame, x: str, y: str) -> None:
    """The front of a search as an interactive page and as a picture.

    Args:
        table: a row per member: the vector, and every quantity by name.
        x, y: the quantities to plot.
    """
    figure = go.Figure(
        go.Scatter(
            x=table[x], y=table[y], text=table["vector"], mode="lines+markers", line_shape="hv",
            hovertemplate=f"%{{text}}<br>{x} %{{x:.4g}}<br>{y} %{{y:.4g}}<extra></extra>",
        )
    )  # fmt: skip
    figure.update_layout(title="Front of the search", xaxis_title=x, yaxis_title=y, height=480)
    write_text(page, figure.to_html(include_plotlyjs=True))
    drawing, axes = plt.subplots(figsize=(7, 4.5))
    axes.step(table[x], table[y], "o-", where="post")
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    _save(drawing, picture)


def _interactive(
    table: pd.DataFrame,
    metric: str,
    front: Collection[str],
    hypervolumes: Sequence[float],
    error_bar: float,
) -> go.Figure:
    figure = make_subplots(
        rows=1, cols=3, subplot_titles=("measured front", "predicted against measured", "hypervolume")
    )
    members = table[table["vector"] != "dense"].sort_values("measured ms")
    on_front = members[members["vector"].isin(front)]
    for name, rows, column in (
        ("dense", table[table["vector"] == "dense"], f"{metric} before"),
        ("members of the search", members, f"{metric} before"),
        ("measured front", on_front, f"{metric} before"),
        ("finetuned", members[members["chosen"] == "*"], f"{metric} after"),
    ):
        figure.add_scatter(
            x=rows["measured ms"],
            y=rows[column],
            text=rows["vector"],
            name=name,
            mode="lines+markers" if name == "measured front" else "markers",
            line_shape="hv",
            row=1,
            col=1,
        )
    figure.add_scatter(
        x=table["predicted ms"], y=table["measured ms"], text=table["vector"], mode="markers",
        name="latency", error_x={"type": "percent", "value": 100 * error_bar}, row=1, col=2,
    )  # fmt: skip
    ends = [table["measured ms"].min(), table["measured ms"].max()]
    figure.add_scatter(x=ends, y=ends, mode="lines", name="equal", row=1, col=2)
    evaluations = list(range(1, len(hypervolumes) + 1))
    figure.add_scatter(x=evaluations, y=list(hypervolumes), mode="lines", name="hypervolume", row=1, col=3)
    for place, (x, y) in enumerate(
        (("measured ms", metric), ("predicted ms", "measured ms"), ("evaluations", "hypervolume")), start=1
    ):
        figure.update_xaxes(title_text=x, row=1, col=place)
        figure.update_yaxes(title_text=y, row=1, col=place)
    return figure.update_layout(height=480)


def _static(
    path: Path, table: pd.DataFrame, metric: str, front: Collection[str], header: Mapping[str, Any]
) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.5))
    members = table[table["vector"] != "dense"].sort_values("measured ms")
    on_front = members[members["vector"].isin(front)]
    dense = table[table["vector"] == "dense"]
    chosen = members[members["chosen"] == "*"]
    axes.plot(
        members["measured ms"], members[f"{metric} before"], "o", mfc="none", label="members of the search"
    )
    axes.step(
        on_front["measured ms"],
        on_front[f"{metric} before"],
        "o-",
        where="post",
        label="measured front, supernet",
    )
    axes.plot(dense["measured ms"], dense[f"{metric} before"], "ks", label="dense")
    axes.plot(
        chosen["measured ms"], chosen[f"{metric} after"], "r*", markersize=13, label="chosen, finetuned"
    )
    axes.set_xlabel(f"measured latency of {header['latency of']} (ms)", fontsize=8)
    axes.set_ylabel(f"{metric} on {header['accuracy on']}", fontsize=8)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    partial = path.with_name("partial." + path.name)
    figure.savefig(partial, dpi=130)
    partial.replace(path)
    plt.close(figure)
