"""The ranks of a job decide alike: by one rank for all of them, and in a real job of two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed
from torch.testing._internal.distributed.fake_pg import FakeStore

from tests import tasks
from tests.records import decision_for
from torch_llmkernels import ranks
from torch_llmkernels.evaluation import Decision
from torch_llmkernels.settings import Settings

TESTS = Path(__file__).resolve().parent
SWAP, KEEP = decision_for(tasks.layer_norm_task()), Decision(None, "kept Inductor: it loses")


class Rank:
    """One rank of a job of threads: `agree` with its own decision, counted."""

    def __init__(self, store: Any, decision: Decision) -> None:
        self.store, self.decision, self.decided = store, decision, 0

    def agree(self, wait_s: float = 60.0) -> Decision:
        (found,) = ranks.agree(self.store, "graph", 1, self.decide, wait_s)
        return found

    def decide(self) -> list[Decision]:
        self.decided += 1
        return [self.decision]


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> distributed.HashStore:
    names = iter(range(100))
    monkeypatch.setattr(distributed, "get_rank", lambda: next(names))
    return distributed.HashStore()


def test_the_first_rank_decides_for_all(job: Any) -> None:
    first, second = Rank(job, SWAP), Rank(job, KEEP)
    assert first.agree() == SWAP and second.agree() == SWAP
    assert (first.decided, second.decided) == (1, 0)


def test_a_rank_waits_while_another_verifies(job: Any) -> None:
    verifying, may_finish = threading.Event(), threading.Event()
    slow, other = Rank(job, SWAP), Rank(job, KEEP)
    decide = slow.decide
    slow.decide = lambda: (verifying.set(), may_finish.wait(60), decide())[-1]
    found: dict[str, Decision] = {}
    threads = [threading.Thread(target=lambda: found.update(slow=slow.agree()))]
    threads[0].start()
    assert verifying.wait(60)
    threads.append(threading.Thread(target=lambda: found.update(other=other.agree())))
    threads[1].start()
    assert not found, "nobody goes on before the decision is there"
    may_finish.set()
    for thread in threads:
        thread.join(60)
    assert found == {"slow": SWAP, "other": SWAP} and other.decided == 0


def test_a_rank_that_takes_too_long_is_outvoted(job: Any) -> None:
    """Whoever gives up publishes Inductor, and the late one takes that over: still the same on every rank."""
    slow, other = Rank(job, SWAP), Rank(job, KEEP)
    given_up: list[Decision] = []
    decide = slow.decide
    slow.decide = lambda: (given_up.append(other.agree(wait_s=0.0)), decide())[-1]
    late = slow.agree()
    assert late.record is None and late == given_up[0] and "did not decide" in late.reason


def test_a_rank_that_fails_leaves_the_others_with_inductor(job: Any) -> None:
    broken, other = Rank(job, SWAP), Rank(job, SWAP)
    broken.decide = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        broken.agree()
    assert "ZeroDivisionError" in other.agree().reason and other.agree().record is None


def test_outside_a_job_nobody_is_asked() -> None:
    assert ranks.job_store() is None


def test_with_a_store_that_cannot_compare_each_rank_decides(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """torch's fake process group, which people size models with, has one; a real store is taken."""
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    for store, taken in ((FakeStore(), False), (FakeStore(), False), (distributed.HashStore(), True)):
        monkeypatch.setattr(distributed.distributed_c10d, "_get_default_store", lambda store=store: store)
        assert (ranks.job_store() is store) == taken
    assert caplog.text.count("cannot compare and set") == 1


def test_a_store_that_cannot_be_reached_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Deciding alone on one rank would be deciding otherwise than the others."""

    class Lost:
        def compare_set(self, *args: str) -> bytes:
            raise distributed.DistNetworkError("connection reset")

    with pytest.raises(distributed.DistNetworkError):
        ranks._can_agree(Lost())


def test_a_search_does_not_hold_up_a_job() -> None:
    assert ranks.settings_in_job(Settings(on_miss="search")).on_miss == "background"
    assert ranks.settings_in_job(Settings(on_miss="error")).on_miss == "error"


def train(folder: Path) -> dict[str, Any]:
    """One rank: three steps of DDP with the backend and eagerly; rank 0's library has a kernel for everything, rank 1's none."""
    import swapping
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from torch_llmkernels import backend, registry

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.softmax(self.norm(self.linear(x)), -1)

    distributed.init_process_group("gloo")
    rank, asked = distributed.get_rank(), []
    mine = swapping.swap_all if rank == 0 else swapping.swap_none

    def resolve(tasks, settings):
        asked.append(len(tasks))
        return mine(tasks, settings)

    def gradients(compiled: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        model = Model()
        wrapped = DistributedDataParallel(model)
        step = torch.compile(wrapped, backend=backend.llmkernels) if compiled else wrapped
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        torch.manual_seed(rank)
        for _ in range(3):
            optimizer.zero_grad()
            step(torch.randn(4, 16)).square().sum().backward()
            optimizer.step()
        return [p.grad for p in model.parameters()]

    with swapping.swapping(folder / f"store-{rank}", resolve) as kernels:
        for got, expected in zip(gradients(True), gradients(False), strict=True):
            torch.testing.assert_close(got, expected)
        swapped = [(r.key, r.kernel) for r in registry.report().swapped]
    distributed.destroy_process_group()
    return {"rank": rank, "asked": len(asked), "calls": kernels.calls.total(), "swapped": swapped}


def test_two_ranks_train_with_the_same_kernels(tmp_path: Path) -> None:
    """Their libraries differ on purpose: what one of them decided is what both run."""
    paths = os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path])
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__, str(tmp_path)]
    done = subprocess.run(torchrun, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = (json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in (0, 1))
    assert first["swapped"] == second["swapped"] and first["calls"] == second["calls"]
    assert first["asked"] + second["asked"] == 1, "one rank of the job looked the graph up"
    assert bool(first["swapped"]) == bool(first["asked"]), "its library is the job's"


if __name__ == "__main__":
    result = train(Path(sys.argv[1]))
    (Path(sys.argv[1]) / f"rank-{result['rank']}.json").write_text(json.dumps(result))
