"""`/`, /docs and /redoc: they answer, and name no address of another machine."""

import re

import pytest
from fastapi.testclient import TestClient

from serving.http.app import create_app
from tests.conftest import as_server
from tests.serving.conftest import PATIENT


def test_the_root_says_where_to_go(client: TestClient) -> None:
    links = client.get("/").json()
    assert links.pop("name") == "polytower"
    assert {client.get(link).status_code for link in links.values()} == {200}


@pytest.mark.parametrize("page", ["/docs", "/redoc"])
def test_documentation_is_served_by_us(served: str, page: str) -> None:
    with TestClient(create_app(as_server(served), caps=PATIENT, require_keys=True)) as client:
        text = client.get(page).text
        assets = re.findall(r"""(?:src|href)=["']([^"']+)""", text)
        assert len(assets) >= 2
        for asset in assets:
            assert asset.startswith("/"), asset
            assert client.get(asset).status_code == 200, asset
        assert "//" not in re.sub(r"<!--.*?-->", "", text.replace("http://www.w3.org", ""), flags=re.DOTALL)
