"""A model that computes NaN: its requests end in an error that says so, and are counted."""

import dataclasses
import json
import math
from collections.abc import Iterator

import httpx
import pytest

from eda.backends.loading import load_target
from eda.models.fine_tune import FineTune
from eda.server.rendering import LOWEST_LOGPROB, chat_logprobs
from eda.speculation.verification import TokenLogprobs
from tests.server.serving import make_parts, serve
from tests.support.family import Family

BODY = {"model": "broken", "prompt": "the quick", "max_tokens": 4, "temperature": 0}


@pytest.fixture(scope="module")
def url(family: Family) -> Iterator[str]:
    model = load_target(family.directory / "full", weights="float32")
    model.embedding.data[:] = math.nan
    fine_tunes = {**family.fine_tunes, "broken": FineTune("broken", model)}
    parts = make_parts(dataclasses.replace(family, fine_tunes=fine_tunes))
    with serve(parts.services) as address:
        yield address
        parts.wait_until_idle()


@pytest.mark.parametrize("change", [{}, {"logprobs": 2}, {"temperature": 1}, {"temperature": 1, "seed": 3}])
def test_a_request_without_finite_logits_fails(url: str, change: dict[str, object]) -> None:
    with httpx.Client(base_url=url, timeout=60) as client:
        error = client.post("/v1/completions", json={**BODY, **change})
        assert error.status_code == 500
        assert error.json()["error"]["code"] == "non_finite_logits"
        assert "'broken'" in error.json()["error"]["message"]
        assert client.post("/v1/completions", json={**BODY, **change, "model": "base"}).status_code == 200


def test_a_stream_without_finite_logits_ends_in_an_error(url: str) -> None:
    response = httpx.post(f"{url}/v1/completions", json={**BODY, "stream": True}, timeout=60)
    events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert json.loads(events[0])["error"]["code"] == "non_finite_logits"


def test_they_are_counted_and_do_not_end_the_engine(url: str) -> None:
    def count() -> float:
        lines = httpx.get(f"{url}/metrics").text.splitlines()
        found = [line for line in lines if line.startswith("eda:non_finite_logits_total{")]
        return sum(float(line.rsplit(" ", 1)[1]) for line in found if 'model_name="broken"' in line)

    before = count()
    for _ in range(10):
        assert httpx.post(f"{url}/v1/completions", json=BODY, timeout=60).status_code == 500
    assert count() == before + 10
    assert httpx.get(f"{url}/health").status_code == 200


def test_a_probability_of_zero_is_written_and_nan_is_not(family: Family) -> None:
    def written(value: float) -> float:
        found: float = chat_logprobs(family.tokenizer, [TokenLogprobs(5, value, [])]).content[0].logprob
        return found

    assert written(-math.inf) == LOWEST_LOGPROB
    assert written(-1.5) == -1.5
    with pytest.raises(ValueError, match="NaN"):
        written(math.nan)
