"""POST /v1/interactions under stress: several first events of a year at once."""

from concurrent.futures import ThreadPoolExecutor
from typing import Any

from fastapi.testclient import TestClient

from polytower.postgres import connect


def test_first_events_of_a_year_at_once(own_client: TestClient, own: str) -> None:
    """Four senders for each of twenty years that have no partition yet: every event is taken."""

    with ThreadPoolExecutor(4) as senders:
        for year in range(1990, 2010):
            answers = list(senders.map(lambda sender, year=year: _send(own_client, sender, [year]), range(4)))
            assert answers == [(200, {"accepted": 1, "duplicates": 0})] * 4
    with connect(own) as connection:
        assert connection.execute("select count(*) from interactions").fetchone() == (4 + 80,)


def test_first_events_of_several_years_in_any_order(own_client: TestClient) -> None:
    """One year, the years around it, and these the other way round: nobody waits for somebody who waits for him."""
    with ThreadPoolExecutor(4) as senders:
        for year in range(1970, 2010, 2):
            years = [[year, year + 1], [year + 1], [year + 1, year], [year]]
            answers = list(senders.map(lambda sender, years=years: _send(own_client, sender, years[sender]), range(4)))
            assert [status for status, _ in answers] == [200] * 4, answers


def _send(client: TestClient, sender: int, years: list[int]) -> tuple[int, Any]:
    events = [{"user_id": f"u{sender}", "item_id": "i01", "occurred_at": f"{year}-06-01T00:00:00Z"} for year in years]
    answer = client.post("/v1/interactions", json={"interactions": events})
    return answer.status_code, answer.json()
