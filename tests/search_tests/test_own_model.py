"""The page docs/own-model.md is a program; it must run as it stands and find what is there."""

import re
import subprocess
import sys
from pathlib import Path

from search.study import counted_trials, read_study

PAGE = Path(__file__).parents[2] / "docs" / "own-model.md"


def test_the_page_runs_as_it_stands(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "own.py").write_text(program)
    outputs = []
    for _ in range(2):  # the second time everything is known already
        result = subprocess.run(
            [sys.executable, "own.py"], capture_output=True, text=True, check=False, cwd=tmp_path
        )
        assert result.returncode == 0, result.stderr
        outputs.append(result.stdout)
    assert outputs[0] == outputs[1]
    rows = re.findall(r"\((\d+), (\d+), (\d+)\) +(\d+) (\d\.\d+)", outputs[0])
    assert len(rows) >= 3
    accuracies = [float(row[4]) for row in rows]
    assert accuracies == sorted(accuracies)  # the front is ordered by weights
    assert accuracies[-1] > 0.95
    assert all(int(first) <= int(second) for first, second, *_ in rows)
    trials = counted_trials(read_study(tmp_path / "own.journal"))
    assert len(trials) == 30
