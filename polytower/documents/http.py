"""docs/reference/http.md: every route with its parameters and body, from the OpenAPI document."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from polytower.documents.markdown import bullets, paragraph

HEAD = """# HTTP routes

A running server shows the same at `/docs`, with types and examples. Every error is a problem document (RFC 9457).
[The guide](../http.md) shows how to use them.
"""


def page() -> str:
    """The page. Makes the application, but starts nothing."""
    from serving.http.app import create_app

    document = create_app("postgresql://nobody@nowhere/nothing", require_keys=True).openapi()
    routes = [
        _route(method.upper(), path, route, document)
        for path, methods in document["paths"].items()
        for method, route in methods.items()
    ]
    return HEAD + "".join(routes)


def _route(method: str, path: str, route: Mapping[str, Any], document: Mapping[str, Any]) -> str:
    text = paragraph(route.get("description", route.get("summary", "")))
    listed = bullets((f"`{name}`", told) for name, told in (*_parameters(route), *_body(route, document)))
    return f"\n## {method} {path}\n\n{text}\n" + (f"\n{listed}\n" if listed else "")


def _parameters(route: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for parameter in route.get("parameters", []):
        yield parameter["name"], _described(parameter["schema"], parameter.get("description", ""))


def _body(route: Mapping[str, Any], document: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    content = route.get("requestBody", {}).get("content", {}).get("application/json", {})
    reference = content.get("schema", {}).get("$ref", "")
    model = document["components"]["schemas"].get(reference.rsplit("/", 1)[-1], {})
    for name, schema in model.get("properties", {}).items():
        yield name, _described(schema, schema.get("description", ""))


def _described(schema: Mapping[str, Any], text: str) -> str:
    default = schema.get("default")
    told = f" (default: `{json.dumps(default)}`)" if default not in (None, [], {}, "") else ""
    return (text + told).strip()
