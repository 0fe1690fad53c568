"""Vectors to begin with, from every kind of source, and what is said of bad ones."""

import json
from pathlib import Path

import pytest

from search.dispatch import Budget, Dispatcher
from search.samplers import SamplerConfig, create_sampler
from search.study import open_study, read_study
from search.warm_start import PUBLISHED, warm_start
from sparsevit.sparsity import SparsitySpace, SparsityVector
from tests.search_tests.problems import SPACE, problem, run_alone

SWIN_T = SparsitySpace((2, 2, 6, 2))


def test_published_vectors_files_and_fronts_each_once(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text(json.dumps([[0] * 6, [0.8] * 6]))
    members = [{"vector": [0.8] * 6, "ap": 0.3}, {"vector": list(PUBLISHED["coco_34ms"])}]
    (tmp_path / "front.json").write_text(json.dumps({"members": members}))
    sources = ["coco_41ms", "coco_34ms", str(tmp_path / "list.json"), str(tmp_path / "front.json")]
    vectors = warm_start(sources, SWIN_T)
    assert vectors == [
        SparsityVector(PUBLISHED["coco_41ms"]), SparsityVector(PUBLISHED["coco_34ms"]), SWIN_T.dense,
        SWIN_T.sparsest,
    ]  # fmt: skip


def test_a_former_study_gives_its_best_trials(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    with open_study(path, problem(), create_sampler(problem(), SamplerConfig("random"))) as study:
        run_alone(Dispatcher(study, problem(), Budget(30)))
    vectors = warm_start([str(path)], SPACE)
    best = {tuple(trial.params.values()) for trial in read_study(path).best_trials}
    assert {tuple(vector) for vector in vectors} == best
    assert 1 < len(best) < 30


def test_a_former_study_of_other_genes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "study.journal"
    with open_study(path, problem(), create_sampler(problem(), SamplerConfig("random"))) as study:
        run_alone(Dispatcher(study, problem(), Budget(3)))
    with pytest.raises(ValueError, match=r"its genes are stage1.pair1, .*, not stage1.pair1, .*stage3.pair3"):
        warm_start([str(path)], SWIN_T)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file, and not one of the published coco_41ms, coco_34ms, coco_33ms"),
        ("[[0, 0]]", "has 2 values, but there are 6 genes"),
        ("[[0, 0, 0.8, 0.1, 0, 0]]", "may not decrease inside a group"),
        ("[[0, 0, 0, 0, 0, 0.55]]", r"stage4.pair1 is 0.55, which is not one of the choices"),
        ('{"vectors": []}', "neither a list of vectors nor a front"),
        ("not json", "neither a list of vectors nor a front"),
    ],
)
def test_bad_sources_are_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "vectors.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=message):
        warm_start([str(path)], SWIN_T)


def test_published_vectors_are_legal_and_in_order_of_their_latency() -> None:
    names = ["coco_41ms", "coco_34ms", "coco_33ms"]
    vectors = warm_start(names, SWIN_T)
    assert list(PUBLISHED) == names
    assert [sum(vector) for vector in vectors] == sorted(sum(vector) for vector in vectors)


@pytest.mark.parametrize("content", ["[1, 2]", "[[null]]", '[["a"]]', '{"members": [{"values": []}]}', "3"])
def test_json_of_another_shape_is_named_with_the_reason(tmp_path: Path, content: str) -> None:
    path = tmp_path / "vectors.json"
    path.write_text(content)
    with pytest.raises(ValueError, match="neither a list of vectors nor a front") as caught:
        warm_start([str(path)], SWIN_T)
    assert str(caught.value).startswith(f"search.warm_start={path}: ")
    assert repr(caught.value.__cause__) in str(caught.value)
