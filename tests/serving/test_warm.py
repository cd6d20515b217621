"""What is slow to load keeps nobody waiting: a served process before, while and after it loads torch and an encoder."""

import time
from typing import Any

import httpx
import pytest

from serving.loaded.loader import RETRY_AFTER
from tests.serving.conftest import listening

PATIENCE = 120  # seconds until the loads must be done, on however busy a machine


@pytest.fixture
def encoder(text_encoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("POLYTOWER_TEXT_ENCODER", text_encoder)
    monkeypatch.setenv("POLYTOWER_DEVICE", "cpu")


def _ask(client: httpx.Client, **question: Any) -> httpx.Response:
    return client.post("/v1/retrieve", json={"k": 5, **question})


def _newer_event(client: httpx.Client) -> None:
    """User 186 does something that came after the generation: only the user tower knows what it means."""
    event = {"user_id": "186", "item_id": "60"}
    assert client.post("/v1/interactions", json={"interactions": [event]}).status_code == 200


def _until_answered(client: httpx.Client, **question: Any) -> dict[str, Any]:
    """Asks again for as long as the server says that it is loading."""
    end = time.monotonic() + PATIENCE
    while True:
        answer = _ask(client, **question)
        body: dict[str, Any] = answer.json()
        if answer.status_code == 200 and not body["degraded"]:
            return body
        assert "is being loaded" in answer.text
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.usefixtures("encoder")
def test_a_cold_server_answers_at_once_and_loads_meanwhile(documented: str) -> None:
    with listening(documented) as address, httpx.Client(base_url=address) as client:
        _newer_event(client)
        stored = _ask(client, user_id="186").json()
        assert (stored["interests"], len(stored["candidates"])) == ("stored", 5)
        assert "torch is being loaded" in stored["degraded"]
        for question in ({"history": ["50", "51"]}, {"text": "a heist"}):
            refused = _ask(client, **question)
            assert (refused.status_code, refused.json()["type"]) == (503, "/problems/loading")
            assert refused.headers["retry-after"] == str(RETRY_AFTER)
        assert _until_answered(client, user_id="186")["interests"] == "online"
        assert _until_answered(client, history=["50", "51"])["interests"] == "online"
        assert _until_answered(client, text="a heist")["interests"] == "content"
        assert "deadline-exceeded" not in client.get("/metrics").text


@pytest.mark.usefixtures("encoder")
def test_a_warm_server_says_when_it_is_ready_and_then_answers_first_questions(documented: str) -> None:
    with listening(documented, "--warm", ready=False) as address, httpx.Client(base_url=address) as client:
        waiting = client.get("/readyz")
        assert (waiting.status_code, waiting.json()["type"]) == (503, "/problems/not-ready")
        assert _ask(client, vectors=[[1.0] + [0.0] * 7]).status_code == 200
        end = time.monotonic() + PATIENCE
        while client.get("/readyz").status_code != 200:
            assert time.monotonic() < end
            time.sleep(0.05)
        _newer_event(client)
        for question in ({"user_id": "186"}, {"history": ["50", "51"]}, {"text": "a heist"}):
            answer = _ask(client, **question)
            assert (answer.status_code, answer.json()["degraded"]) == (200, None), answer.text


def test_a_failed_load_is_told_once_and_tried_again() -> None:
    import asyncio

    from serving.loaded.loader import Loader

    attempts: list[int] = []

    def load() -> int:
        attempts.append(1)
        if len(attempts) == 1:
            raise FileNotFoundError("weights")
        return len(attempts)

    async def ask() -> None:
        loader = Loader(patience=PATIENCE)
        with pytest.raises(FileNotFoundError):
            await loader.get("it", load)
        assert await asyncio.gather(loader.get("it", load), loader.get("it", load)) == [2, 2]
        loader.close()

    asyncio.run(ask())


def test_each_generation_is_loaded_once() -> None:
    import asyncio

    from serving.retrieve.warmer import Warmer

    seen = iter([None, 1, 1, None, 2, 2, 1])
    loads: list[int | None] = []

    async def run() -> None:
        async def live() -> int | None:
            return next(seen, 1)

        async def load(generation: int | None) -> None:
            loads.append(generation)

        warmer = Warmer(live, load, interval=0)
        assert not warmer.done
        running = asyncio.create_task(warmer.run())
        for _ in range(20):
            await asyncio.sleep(0)
        assert warmer.done
        running.cancel()

    asyncio.run(run())
    assert loads == [None, 1, 2, 1]
