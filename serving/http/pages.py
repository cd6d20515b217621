"""Pages for people: what `/` answers, and the documentation at /docs and /redoc, which reads nothing from elsewhere.

The scripts are those that the package fastapi-offline brings; nothing else of it is used.
"""

from importlib.util import find_spec
from pathlib import Path

from fastapi import FastAPI
from fastapi.openapi.docs import get_redoc_html, get_swagger_ui_html
from fastapi.responses import HTMLResponse
from fastapi.staticfiles import StaticFiles

ASSETS = "/docs-assets"
LINKS = {"docs": "/docs", "redoc": "/redoc", "openapi": "/openapi.json", "ready": "/readyz", "metrics": "/metrics"}


def add_pages(app: FastAPI) -> None:
    """Adds them; the application is made without FastAPI's own, whose scripts come from the internet."""
    app.mount(ASSETS, StaticFiles(directory=_folder()), name="docs-assets")

    @app.get("/", include_in_schema=False)
    async def root() -> dict[str, str]:
        return {"name": "polytower", **LINKS}

    @app.get("/docs", include_in_schema=False)
    async def docs() -> HTMLResponse:
        return get_swagger_ui_html(
            openapi_url="/openapi.json",
            title=app.title,
            swagger_js_url=f"{ASSETS}/swagger-ui-bundle.js",
            swagger_css_url=f"{ASSETS}/swagger-ui.css",
            swagger_favicon_url=f"{ASSETS}/favicon.png",
        )

    @app.get("/redoc", include_in_schema=False)
    async def redoc() -> HTMLResponse:
        return get_redoc_html(
            openapi_url="/openapi.json",
            title=app.title,
            redoc_js_url=f"{ASSETS}/redoc.standalone.js",
            redoc_favicon_url=f"{ASSETS}/favicon.png",
            with_google_fonts=False,
        )


def _folder() -> Path:
    found = find_spec("fastapi_offline")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent / "static"
