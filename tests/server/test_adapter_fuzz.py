"""Random requests to the administrative routes: no 5xx, no error in a foreign shape, no undocumented body."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode

from eda.server.assembly import load_runtime
from eda.server.services import Services
from eda.server.settings import Settings
from tests.server.serving import serve
from tests.server.test_fuzz import send_and_check

OPERATIONS = [
    ("GET", "/adapters"),
    ("POST", "/adapters"),
    ("GET", "/adapters/{name}"),
    ("PATCH", "/adapters/{name}"),
    ("POST", "/adapters/{name}/activate"),
    ("POST", "/adapters/{name}/jobs"),
    ("POST", "/adapters/{name}/jobs/upload"),
    ("POST", "/adapters/upload"),
    ("DELETE", "/adapters/{name}"),
    ("DELETE", "/adapters/{name}/traffic"),
    ("GET", "/jobs"),
    ("GET", "/jobs/{job_id}"),
    ("POST", "/jobs/{job_id}/cancel"),
    ("POST", "/jobs/{job_id}/retry"),
    ("POST", "/v1/load_lora_adapter"),
    ("POST", "/v1/unload_lora_adapter"),
]


@pytest.fixture(scope="module")
def api(family_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    configured = Settings(
        target=family_directory / "base",
        draft=family_directory / "draft",
        data_dir=tmp_path_factory.mktemp("fuzzed"),
        adapter_roots=(family_directory,),
        weights="float32",
        cache_mib=8,
        reserve_disk_mib=0,
        worker=False,
    )
    with serve(Services(configured, load=load_runtime)) as url:
        yield schemathesis.openapi.from_url(f"{url}/openapi.json")


def test_every_operation_is_fuzzed(api: Any) -> None:
    """But the stream of events, which has no end while its job waits."""
    described = {(r.ok().method.upper(), r.ok().path) for r in api.get_all_operations()}
    admin = ("/adapters", "/jobs", "/v1/load_lora_adapter", "/v1/unload_lora_adapter")
    expected = {operation for operation in described if operation[1].startswith(admin)}
    assert set(OPERATIONS) == expected - {("GET", "/jobs/{job_id}/events")}


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_breaks_administration(api: Any, method: str, path: str, mode: GenerationMode) -> None:
    operation = api[path][method]
    takes_no_input = path == "/adapters" or "{" in path
    if (
        mode is GenerationMode.NEGATIVE
        and takes_no_input
        and (method in ("GET", "DELETE") or path.endswith(("retry", "cancel")))
    ):
        pytest.skip("there is nothing to get wrong")

    @settings(max_examples=15, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=operation.as_strategy(generation_mode=mode))
    def check(case: schemathesis.Case) -> None:
        send_and_check(case)
        if "name" in (case.path_parameters or {}):
            case.path_parameters["name"] = "base"  # nearly every random name is unknown
            send_and_check(case)

    check()
