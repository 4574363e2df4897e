"""KernelBench problem files: loading, shrinking, verdicts, fast_p. The compilers are stood in for by eager."""

from __future__ import annotations

import json
from pathlib import Path

import benchmark_path  # noqa: F401
import kernelbench
import pytest
import torch

PROBLEMS = Path(__file__).parent / "kernelbench_problems"
SOFTMAX, NORM, MATMUL = (PROBLEMS / f"{name}.py" for name in ("1_scaled_softmax", "2_layer_norm", "3_matmul_with_index"))


@pytest.fixture
def eager_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernelbench, "CONTENDERS", {"eager": {}, "inductor": {"backend": "eager"}, "ours": {"backend": "eager"}})


def test_problems_come_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for name in ("10_b.py", "9_a.py", "notes.py"):
        (tmp_path / name).write_text("def get_inputs(): ..." if name != "notes.py" else "")
    assert [p.name for p in kernelbench.problems(tmp_path)] == ["9_a.py", "10_b.py"]
    assert [p.name for p in kernelbench.problems(tmp_path, ["10"])] == ["10_b.py"]
    assert [p.name for p in kernelbench.problems(tmp_path, ["*_a"])] == ["9_a.py"]
    with pytest.raises(SystemExit, match="holds no problem file"):
        kernelbench.problems(tmp_path, ["3"])


@pytest.mark.parametrize(
    ("path", "shapes"),
    [
        (SOFTMAX, [(4, 128)]),  # batch_size is changed before the inputs are made
        (NORM, [(8, 64)]),  # no batch size by name: the first dimension is cut
        (MATMUL, [(6, 16), (16, 8), (3,)]),  # only what the model still takes
    ],
)
def test_batch_scale_shrinks_the_batch_and_nothing_else(path: Path, shapes: list[tuple[int, ...]]) -> None:
    _, inputs = kernelbench.made(path, "cpu", 0.25)
    assert [tuple(t.shape) for t in inputs] == shapes


def test_a_model_that_cannot_shrink_keeps_its_inputs() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view(8, 4)

    inputs = [torch.zeros(16, 2)]
    assert kernelbench.shrunk(Fixed(), inputs, 0.5) is inputs


@pytest.mark.usefixtures("eager_only")
def test_a_run_writes_verdicts_speedups_and_misses(tmp_path: Path, capsys, monkeypatch) -> None:
    """Into the current directory: the problems are the user's, so their results are none of this project's."""
    monkeypatch.chdir(tmp_path)
    kernelbench.main([str(PROBLEMS), "--device", "cpu", "--quick", "--batch-scale", "0.5"])
    result = json.loads((tmp_path / "kernelbench.json").read_text())
    assert [row["verdict"] for row in result["rows"]] == ["correct"] * 3
    assert all(row["vs_eager"] > 0 and row["vs_inductor"] > 0 for row in result["rows"])
    assert result["summary"]["vs_eager"]["fast_p"]["0.0"] == 1.0
    assert {"device", "versions", "commit", "flags"} <= result.keys()
    assert "miss 1_scaled_softmax: no region was found" in capsys.readouterr().out


@pytest.mark.usefixtures("eager_only")
def test_a_problem_that_fails_is_a_row(tmp_path: Path) -> None:
    (tmp_path / "1_bad.py").write_text("def get_inputs(): ...\nraise ValueError('half a file')\n")
    row = kernelbench.measure(tmp_path / "1_bad.py", tmp_path, "cpu", 1.0, quick=True)
    assert "half a file" in row["verdict"]
    assert kernelbench.summary([row])["correct"] == 0


IN_PLACE = """
import torch

class Model(torch.nn.Module):
    def forward(self, x):
        return x.mul_(2.0)

def get_inputs():
    return [torch.rand(4, 8)]

def get_init_inputs():
    return []
"""


LARGE = """
import torch
batch_size = 64
class Model(torch.nn.Module):
    def forward(self, x):
        if len(x) > MOST:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return x + 1
def get_inputs(): return [torch.zeros(batch_size, 2)]
def get_init_inputs(): return []
"""


@pytest.mark.usefixtures("eager_only")
def test_a_problem_that_does_not_fit_is_measured_at_a_smaller_batch(tmp_path: Path) -> None:
    path = tmp_path / "1_large.py"
    path.write_text(LARGE.replace("MOST", "8"))
    row = kernelbench.measure(path, tmp_path, "cpu", 1.0, quick=True)
    assert row["verdict"] == "correct" and row["batch_scale"] == 1 / 16
    path.write_text(LARGE.replace("MOST", "0"))
    assert "OutOfMemoryError" in kernelbench.measure(path, tmp_path, "cpu", 1.0, quick=True)["verdict"]
    path.write_text(LARGE.replace("MOST", "64"))
    assert "batch_scale" not in kernelbench.measure(path, tmp_path, "cpu", 1.0, quick=True)


@pytest.mark.usefixtures("eager_only")
def test_a_problem_may_work_in_place(tmp_path: Path) -> None:
    (tmp_path / "1_in_place.py").write_text(IN_PLACE)
    row = kernelbench.measure(tmp_path / "1_in_place.py", tmp_path, "cpu", 1.0, quick=True)
    assert row["verdict"] == "correct"


def test_a_wrong_result_is_a_wrong_verdict_and_not_fast() -> None:
    row = {"contenders": {"eager": {"error": 1e-7, "ms": 2.0}, "inductor": {"error": 1e-7, "ms": 3.0},
                          "ours": {"error": 1e-3, "ms": 1.0, "swapped": ["softmax: sloppy"]}}}  # fmt: skip
    judged = kernelbench.judged(row, torch.float32, in_float64=True)
    assert judged["verdict"].startswith("wrong: error 0.001")
    assert kernelbench.summary([judged])["vs_eager"]["fast_p"]["1.0"] == 0


def test_fast_p_counts_correct_and_faster_problems() -> None:
    rows = [{"verdict": "correct", "vs_eager": s, "vs_inductor": s, "swaps": 1} for s in (0.9, 1.2, 2.5)] + [
        {"verdict": "failed: x"}
    ]
    found = kernelbench.summary(rows)
    assert [found["vs_eager"]["fast_p"][p] for p in ("0.0", "1.0", "2.0")] == [0.75, 0.5, 0.25]
    assert found["vs_eager"]["geomean"] == pytest.approx((0.9 * 1.2 * 2.5) ** (1 / 3))
