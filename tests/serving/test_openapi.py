"""The OpenAPI document is true: property tests drawn from it (schemathesis), and examples that the models accept."""

from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, assume, given, settings
from pydantic import TypeAdapter
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    missing_required_header,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
    use_after_free,
)

from polytower.postgres import connect
from serving import models
from serving.http import keys
from serving.http.app import create_app
from tests.conftest import cloned
from tests.generation_factory import write_generation
from tests.serving.conftest import listening, small_data

EXAMPLES = 8  # of each operation and mode

# Left out: positive_data_acceptance. What a generation knows (items, attributes, dimensions) is in no schema.
CHECKS = [
    not_a_server_error,
    content_type_conformance,
    ignored_auth,
    missing_required_header,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
    use_after_free,
]


@pytest.fixture(scope="module")
def api(server: str) -> Iterator[Any]:
    """The schema of a running server that requires keys."""
    with cloned(server, "test_openapi") as url:
        with connect(url) as connection:
            write_generation(connection, small_data())
            _, key = keys.create(connection, "test", ["admin"], rate=None, burst=1)
        with listening(url, "--require-keys") as address:
            schema = schemathesis.openapi.from_url(f"{address}/openapi.json")
            schema.config.update(headers={"Authorization": f"Bearer {key}"})
            # A body over the cap is refused before anybody looks at what is in it.
            schema.config.checks.negative_data_rejection.expected_statuses.append("413")
            yield schema


DOCUMENT = create_app("postgresql://nobody@127.0.0.1:1/nothing").openapi()
OPERATIONS = [(path, method.upper()) for path, methods in DOCUMENT["paths"].items() for method in methods]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
@pytest.mark.parametrize(("path", "method"), OPERATIONS)
def test_every_operation_keeps_to_the_document(api: Any, path: str, method: str, mode: GenerationMode) -> None:
    """positive: requests that the document allows; negative: requests that it does not."""
    operation = api[path][method]
    if mode is GenerationMode.NEGATIVE and not ("{" in path or method == "POST"):
        return  # nothing to get wrong

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: Any) -> None:
        # The HTTP parser refuses longer lines before the application sees them.
        assume(len(str(case.path_parameters)) + len(str(case.query)) < 5_000)
        case.call_and_validate(checks=CHECKS, timeout=60)

    check()


def _operations() -> Iterator[tuple[str, dict[str, Any]]]:
    for path, operations in DOCUMENT["paths"].items():
        for method, operation in operations.items():
            yield f"{method} {path}", operation


def _model(schema: dict[str, Any]) -> tuple[str, TypeAdapter[Any]]:
    name = schema["$ref"].rsplit("/", 1)[-1]
    return name, TypeAdapter(getattr(models, name))


def test_every_operation_has_examples_that_its_models_accept() -> None:
    schemas = DOCUMENT["components"]["schemas"]
    for name, operation in _operations():
        for parameter in operation.get("parameters", []):
            assert parameter.get("examples") or parameter["schema"].get("examples"), (name, parameter["name"])
        contents = [operation["responses"]["200"]["content"]]
        if "requestBody" in operation:
            contents.append(operation["requestBody"]["content"])
        for content in contents:
            if "application/json" not in content:
                assert content["text/plain"]["example"], name
                continue
            model, adapter = _model(content["application/json"]["schema"])
            assert schemas[model]["examples"], (name, model)
            for example in schemas[model]["examples"]:
                adapter.validate_python(example)


def test_operations_say_what_they_do() -> None:
    for name, operation in _operations():
        assert operation["summary"], name
        assert operation["description"], name


def test_a_wrong_method_names_the_right_one() -> None:
    with TestClient(create_app("postgresql://nobody@127.0.0.1:1/nothing")) as client:
        answer = client.get("/v1/retrieve")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
