"""Bodies of strangers, damaged at random: no 5xx, no error in a foreign shape, and the server goes on."""

import itertools
import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mutations import damaged, mutated, written

from eda.server.assembly import load_runtime
from eda.server.logs import configure_logs
from eda.server.services import Services
from eda.server.settings import Settings
from tests.server.serving import serve
from tests.support.family import save_family

PROFILE = settings.get_profile("files")
SECONDS = 30.0
NUMBERS = itertools.count()

BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {
        "model": "math",
        "prompt": ["the quick", "brown"],
        "max_tokens": 3,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 5,
        "seed": 3,
        "n": 2,
        "stop": ["x", "yz"],
        "logprobs": 2,
        "logit_bias": {"5": -3, "9": 10},
        "presence_penalty": 0.5,
        "min_tokens": 1,
        "stop_token_ids": [4],
        "draft": "shared",
        "stream": False,
    },
    "/v1/chat/completions": {
        "model": "base",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Who?"}]},
        ],
        "max_tokens": 3,
        "logprobs": True,
        "top_logprobs": 2,
        "stream": True,
        "stream_options": {"include_usage": True},
    },
    "/tokenize": {"model": "base", "prompt": "the quick", "add_special_tokens": True},
    "/detokenize": {"model": "base", "tokens": [5, 6, 7]},
    "/adapters": {
        "name": "posted",
        "target": {"path": "code", "kind": "lora"},
        "data": {"prompts": ["One", [{"role": "user", "content": "Two"}], "Three"]},
        "training": {"max_prompts": 8, "held_out": 1, "max_tokens": 8},
        "activate": "if_better",
        "margin": 0.1,
    },
}


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_family(tmp_path_factory.mktemp("family"))


@pytest.fixture(scope="module")
def client(family: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    configure_logs(Settings(log_level="error"))
    configured = Settings(
        target=family / "base",
        draft=family / "draft",
        fine_tunes={"math": family / "math"},
        data_dir=tmp_path_factory.mktemp("data"),
        adapter_roots=(family,),
        weights="float32",
        cache_mib=8,
        max_model_len=64,
        max_body_bytes=1 << 20,
        reserve_disk_mib=0,
        worker=False,
    )
    with (
        serve(Services(configured, load=load_runtime)) as url,
        httpx.Client(base_url=url, timeout=SECONDS) as client,
    ):
        yield client


def check(response: httpx.Response, start: float) -> None:
    assert time.monotonic() - start < SECONDS
    assert response.status_code < 500 or response.status_code == 507, response.text
    if response.status_code >= 400:
        body = response.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}


@settings(PROFILE)
@given(data=st.data())
@pytest.mark.parametrize("path", BODIES)
def test_bodies(client: httpx.Client, path: str, data: st.DataObject) -> None:
    content = written(data.draw(mutated(BODIES[path])))
    if data.draw(st.integers(0, 3)) == 0:
        content = data.draw(damaged(content))
    start = time.monotonic()
    check(client.post(path, content=content, headers={"content-type": "application/json"}), start)
    assert client.get("/health").status_code == 200


def posted(client: httpx.Client, name: str, response: httpx.Response, start: float) -> None:
    """Asks what was taken, and takes it out again."""
    check(response, start)
    if response.status_code == 202:
        body = {"model": name, "prompt": "x", "max_tokens": 2}
        check(client.post("/v1/completions", json=body), time.monotonic())
        client.delete(f"/adapters/{name}")
    assert client.get("/health").status_code == 200


@settings(PROFILE)
@given(data=st.data())
def test_posted_fine_tunes(client: httpx.Client, family: Path, data: st.DataObject) -> None:
    number = next(NUMBERS)
    directory = shutil.copytree(family / "code", family / f"damaged-{number}")
    file = directory / data.draw(st.sampled_from(("adapter_config.json", "adapter_model.safetensors")))
    content = file.read_bytes()
    if file.suffix == ".json" and data.draw(st.integers(0, 3)):
        file.write_bytes(written(data.draw(mutated(json.loads(content)))))
    else:
        file.write_bytes(data.draw(damaged(content)))
    body = {
        "name": f"d{number}",
        "target": {"path": directory.name},
        "data": {"prompts": ["a", "b", "c"]},
    }
    start = time.monotonic()
    posted(client, f"d{number}", client.post("/adapters", json=body), start)
    shutil.rmtree(directory)


@settings(PROFILE)
@given(data=st.data())
def test_uploaded_prompts(client: httpx.Client, data: st.DataObject) -> None:
    name = f"u{next(NUMBERS)}"
    rows = [{"prompt": "What?"}, {"messages": [{"role": "user", "content": "Who?"}]}, {"prompt": "Why?"}]
    lines = b"\n".join(written(data.draw(mutated(row) | st.just(row))) for row in rows)
    content = data.draw(damaged(lines) | st.just(lines))
    request = json.dumps({"name": name, "target": {"path": "code"}})
    start = time.monotonic()
    response = client.post("/adapters/upload", data={"request": request}, files={"file": content})
    posted(client, name, response, start)
