"""A server without a draft model: it looks drafts up, says so, and refuses what could never be done."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families
from structlog.testing import capture_logs

from eda.adapters.database import Database, sqlite_url
from eda.adapters.worker.settings import DATABASE_FILE
from eda.decoder import SpeculativeDecoder
from eda.server.assembly import load_runtime
from eda.server.logs import configure_logs
from eda.server.services import Services
from eda.server.settings import Settings
from tests.adapters.helpers import Service as JobService
from tests.server.administration import Server
from tests.server.serving import serve


@pytest.fixture(scope="module")
def server(family_directory: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    directory = tmp_path_factory.mktemp("plain")
    settings = Settings(
        target=family_directory / "base",
        fine_tunes={"math": family_directory / "math"},
        data_dir=directory / "data",
        adapter_roots=(directory / "loras",),
        weights="float32",
        reserve_disk_mib=0,
    )
    services = Services(settings, load=load_runtime)
    with serve(services) as url:
        server = Server(url, services, directory)
        yield server
        server.client.close()


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error: dict[str, Any] = response.json()["error"]
    return error


REPETITIVE = {"prompt": "1 2 1 2 1 2 1 2", "max_tokens": 60, "logit_bias": {"20": 100, "21": 100}}
"""Of two tokens, what stood before comes again."""


def test_the_default_draft_is_a_look_up_and_is_counted_as_that(server: Server) -> None:
    plain = server.complete("math", draft="none", **REPETITIVE)
    assert (plain["metrics"]["draft"], plain["metrics"]["mean_acceptance_length"]) == ("none", 1.0)
    for asked in ({}, {"draft": "lookup"}):
        answer = server.complete("math", **REPETITIVE, **asked)
        metrics = answer["metrics"]
        assert answer["choices"] == plain["choices"]
        assert (metrics["draft"], metrics["adapter"]) == ("lookup", None)
        assert metrics["mean_acceptance_length"] > 1.5
        assert metrics["num_target_passes"] < plain["metrics"]["num_target_passes"]
    exposition = server.client.get("/metrics").text
    for draft in ("none", "lookup"):
        assert f'draft="{draft}",model_name="math"' in exposition
    assert 'draft="private"' not in exposition


def test_the_guard_of_private_modules_sees_no_look_ups(server: Server) -> None:
    assert server.complete("math", **REPETITIVE)["metrics"]["draft"] == "lookup"
    guard = server.adapters.registry.guard
    assert guard.live("math", None) is None


def test_a_seeded_text_is_that_of_plain_decoding(server: Server) -> None:
    texts = {
        draft: server.complete("math", draft=draft, **REPETITIVE | {"temperature": 1.5, "seed": 3})["choices"]
        for draft in ("none", "lookup")
    }
    assert texts["lookup"] == texts["none"]


@pytest.mark.parametrize("draft", ["private", "shared"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
def test_a_draft_that_is_asked_for_is_refused(server: Server, path: str, draft: str) -> None:
    prompt = (
        {"messages": [{"role": "user", "content": "fox"}]}
        if "chat" in path
        else {"prompt": "the quick brown"}
    )
    error = refusal(server.client.post(path, json={"model": "math", "draft": draft, **prompt}), 400)
    assert error["param"] == "draft"
    assert f'draft is "{draft}"' in error["message"]


def test_a_job_is_refused_when_it_is_asked_for(server: Server) -> None:
    assert "without a shared draft" in refusal(server.create("law"), 409)["message"]
    body = {"data": {"prompts": ["one", "two"]}}
    assert (
        "without a shared draft"
        in refusal(server.client.post("/adapters/math/jobs", json=body), 409)["message"]
    )
    assert server.client.get("/jobs").json()["data"] == []
    assert server.client.get("/adapters/law").status_code == 404


def test_jobs_of_an_earlier_run_are_spoken_of(family_directory: Path, tmp_path: Path) -> None:
    database = Database(sqlite_url(tmp_path / DATABASE_FILE))
    JobService(tmp_path, database).submit("law")
    database.close()
    settings = Settings(target=family_directory / "base", data_dir=tmp_path, weights="float32")
    configure_logs(Settings(log_level="warning"))
    try:
        with capture_logs() as lines:
            runtime = load_runtime(Services(settings))
    finally:
        configure_logs(Settings(log_level="error"))
    runtime.on_close()
    [line] = [line for line in lines if line["event"].startswith("jobs wait for a worker")]
    assert (line["jobs"], line["reason"]) == (1, "there is no draft to adapt")


def test_a_fine_tune_is_served_without_a_job(server: Server) -> None:
    body = {"lora_name": "law", "lora_path": server.lora("law")}
    assert server.client.post("/v1/load_lora_adapter", json=body).status_code == 200
    assert server.complete("law")["metrics"]["draft"] == "lookup"


def test_a_chat_without_a_limit_has_a_bounded_one(server: Server) -> None:
    runtime = server.services.loaded()
    body = {
        "model": "math",
        "messages": [{"role": "user", "content": "the quick brown fox"}],
        "ignore_eos": True,
        "temperature": 0,
    }
    given = runtime.chat_max_tokens
    runtime.chat_max_tokens = 20
    try:
        answer = server.client.post("/v1/chat/completions", json=body).json()
        longer = server.client.post("/v1/chat/completions", json=body | {"min_tokens": 25}).json()
    finally:
        runtime.chat_max_tokens = given
    assert answer["usage"]["completion_tokens"] == 20
    assert answer["choices"][0]["finish_reason"] == "length"
    assert longer["usage"]["completion_tokens"] == 25


def test_cache_slots_are_counted(server: Server) -> None:
    def slots() -> dict[str, float]:
        families = text_string_to_metric_families(server.client.get("/metrics").text)
        samples = [sample for family in families for sample in family.samples]
        return {s.labels["state"]: s.value for s in samples if s.name == "eda_cache_slots"}

    server.complete("math")
    idle = slots()
    assert idle["used"] == 0
    decoder = server.services.engine._engine._decoder
    assert isinstance(decoder, SpeculativeDecoder)
    extent = decoder.cache.allocator.allocate(100)
    try:
        assert slots() == {"used": 100, "free": idle["free"] - 100}
    finally:
        decoder.cache.allocator.release(extent)
    assert slots() == idle
