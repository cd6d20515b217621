"""Two processes are one with the same rows a step: gloo on the CPU, started as torchrun starts them."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from encoders.training import checkpoint
from encoders.training.distributed import processes
from encoders.training.train import train
from polytower.errors import UserError
from tests.encoders.data import tiny_catalogue, tiny_histories
from tests.encoders.together import CASES

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that two processes have filled."""
    out = tmp_path_factory.mktemp("together")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    surroundings = os.environ | {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }  # fmt: skip
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.encoders.together", str(out)], cwd=ROOT, stderr=subprocess.PIPE, text=True,
            env=surroundings | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        for process in started:
            _, errors = process.communicate(timeout=240)
            assert process.returncode == 0, errors
    finally:
        for process in started:
            process.kill()
            process.communicate()
    return out


@pytest.mark.parametrize("name", CASES)
def test_two_processes_train_like_one(together: Path, tmp_path: Path, name: str) -> None:
    alone = train(tiny_catalogue(content=False), tiny_histories(), CASES[name], directory=tmp_path)
    found = [checkpoint.read_json(together / f"{name}-{rank}.json") for rank in range(2)]
    weights = [checkpoint.read_tensors(together / f"{name}-{rank}.safetensors") for rank in range(2)]
    assert found[0]["losses"] == found[1]["losses"]
    assert found[0]["metrics"] == found[1]["metrics"] != {}
    for key, value in weights[0].items():
        torch.testing.assert_close(weights[1][key], value, rtol=0, atol=0)
    # the negatives of two processes are the same for both, but others than those of one
    exact = CASES[name].negatives == 0
    assert found[0]["losses"] == pytest.approx([point.loss for point in alone.curves], rel=1e-5 if exact else 0.1)
    if exact:
        assert found[0]["metrics"]["ndcg@10"] == pytest.approx(alone.metrics["ndcg@10"], rel=0.05)
    towers, _, metrics = checkpoint.load(together / name, tiny_catalogue(content=False))
    torch.testing.assert_close(towers.item_tower.table, weights[0]["item_tower.table"])
    assert metrics == found[0]["metrics"]
    assert not list((together / name).glob("state.*"))


def test_without_torchrun_it_says_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(UserError, match="torchrun --nproc-per-node"), processes():
        pass
