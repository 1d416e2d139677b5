"""Health, metrics, the tokenizer's routes, and what happens while a server starts, drains or breaks."""

import threading
from collections.abc import Callable, Sequence

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from eda.decoder import ScheduledRow
from eda.errors import CheckpointError
from eda.server.services import Services
from eda.server.settings import Settings
from tests.server.serving import make_parts, serve, wait_until_ready
from tests.support.family import Family
from tests.support.oracle import Oracle

COMPLETION = {"model": "base", "prompt": "x", "max_tokens": 2}


def test_health_and_version(client: httpx.Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ok"}
    assert client.get("/version").json()["version"]
    assert client.get("/docs").status_code == 200
    assert "422" not in client.get("/openapi.json").text


def test_tokenize_and_back(client: httpx.Client, family: Family) -> None:
    text = "the fox costs 5 €"
    answer = client.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert answer["tokens"] == family.tokenizer.encode(text)
    assert answer["count"] == len(answer["tokens"]) == len(answer["token_strs"])
    assert answer["max_model_len"] == 512
    assert client.post("/detokenize", json={"tokens": answer["tokens"]}).json() == {"prompt": text}
    chat = client.post(
        "/tokenize", json={"messages": [{"role": "user", "content": "hi"}], "model": "math"}
    ).json()
    assert chat["tokens"][0] in family.tokenizer.special_ids


@pytest.mark.parametrize("body", [{}, {"prompt": "x", "messages": []}, {"prompt": "x", "other": 1}])
def test_tokenize_takes_one_kind_of_input(client: httpx.Client, body: dict[str, object]) -> None:
    assert client.post("/tokenize", json=body).status_code == 400


def test_detokenize_refuses_foreign_ids(client: httpx.Client) -> None:
    assert client.post("/detokenize", json={"tokens": [5000]}).json()["error"]["param"] == "tokens"


def counters(client: httpx.Client) -> dict[tuple[str, str], float]:
    """Values by sample name and adapter, over all other labels."""
    found: dict[tuple[str, str], float] = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            key = (sample.name, sample.labels.get("adapter", ""))
            found[key] = found.get(key, 0.0) + sample.value
    return found


def test_metrics_have_the_names_and_labels_that_clients_read(client: httpx.Client, oracle: Oracle) -> None:
    oracle.text("math", "zz", 20)  # from now on its draft is right about this prompt now and then
    before = counters(client)
    answer = client.post(
        "/v1/completions",
        json={"model": "math", "prompt": "zz", "max_tokens": 20, "temperature": 0, "ignore_eos": True},
    ).json()
    after = counters(client)

    def grown(name: str) -> float:
        return after[name, "math"] - before.get((name, "math"), 0.0)

    assert grown("vllm:generation_tokens_total") == 20
    assert grown("vllm:prompt_tokens_total") == answer["usage"]["prompt_tokens"]
    assert grown("vllm:spec_decode_num_drafts_total") > 0
    drafted, accepted = (
        grown("vllm:spec_decode_num_draft_tokens_total"),
        grown("vllm:spec_decode_num_accepted_tokens_total"),
    )
    assert answer["metrics"]["draft_acceptance_rate"] == pytest.approx(accepted / drafted, abs=1e-3)
    assert grown("vllm:spec_decode_num_accepted_tokens_per_pos_total") == accepted > 0
    assert grown("vllm:request_success_total") == 1
    for name in ("time_to_first_token", "inter_token_latency", "e2e_request_latency"):
        assert grown(f"vllm:{name}_seconds_count") == 1
    assert ("vllm:num_requests_running", "") in after
    assert ("vllm:num_requests_waiting", "") in after
    text = client.get("/metrics").text
    assert 'adapter="math",adapter_version="1",draft="private",model_name="math"' in text


def test_a_server_is_alive_but_not_ready_while_it_loads(family: Family) -> None:
    may_load = threading.Event()
    parts = make_parts(family)
    runtime = parts.services.runtime

    def load(services: Services) -> object:
        may_load.wait(20)
        return runtime

    services = Services(Settings(), load=load)  # type: ignore[arg-type]
    with serve(services, ready=False) as url, httpx.Client(base_url=url) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/metrics").status_code == 200
        for response in (
            client.get("/ready"),
            client.get("/v1/models"),
            client.post("/v1/completions", json=COMPLETION),
        ):
            assert response.status_code == 503
            assert response.json()["error"]["code"] == "unavailable"
            assert int(response.headers["retry-after"]) > 0
        may_load.set()
        wait_until_ready(url)
        assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def test_a_server_that_cannot_load_says_so() -> None:
    failures: list[BaseException] = []

    def load(services: Services) -> object:
        raise CheckpointError("no such directory")

    services = Services(Settings(), load=load, on_failure=failures.append)  # type: ignore[arg-type]
    with serve(services, ready=False) as url:
        deadline = 200
        while httpx.get(f"{url}/health").status_code == 200 and deadline:
            deadline -= 1
        assert httpx.get(f"{url}/health").status_code == 503
        assert httpx.get(f"{url}/ready").status_code == 503
    assert isinstance(failures[0], CheckpointError)


def test_an_engine_that_dies_makes_health_fail_and_answers_everybody(family: Family) -> None:
    parts = make_parts(family)
    failures: list[BaseException] = []
    parts.services.on_failure = failures.append
    break_after(parts.decoder.step, 5, lambda step: setattr(parts.decoder, "step", step))
    with serve(parts.services) as url, httpx.Client(base_url=url, timeout=20) as client:
        response = client.post("/v1/completions", json={**COMPLETION, "max_tokens": 50})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "unavailable"
        assert client.get("/health").status_code == 503
        assert client.get("/ready").status_code == 503
        assert client.post("/v1/completions", json=COMPLETION).status_code == 503
    assert isinstance(failures[0], FatalError)


class FatalError(BaseException):
    """Not an ``Exception``: nothing may catch it as the failure of one request."""


def break_after(step: Callable[..., object], count: int, install: Callable[[object], None]) -> None:
    """Makes the decoder's step raise something fatal after ``count`` calls."""
    calls = 0

    def broken(rows: object) -> object:
        nonlocal calls
        calls += 1
        if calls > count:
            raise FatalError("the device is gone")
        return step(rows)

    install(broken)


def test_a_model_error_is_one_requests_own(family: Family) -> None:
    parts = make_parts(family)
    step = parts.decoder.step
    [marked] = family.tokenizer.encode("Q")

    def failing(rows: Sequence[ScheduledRow]) -> object:
        if any(row.state.token_ids[0] == marked for row in rows):
            raise RuntimeError("bad numbers")
        return step(rows)

    parts.decoder.step = failing  # type: ignore[method-assign,assignment]
    with serve(parts.services) as url, httpx.Client(base_url=url, timeout=20) as client:
        body = {**COMPLETION, "max_tokens": 60, "ignore_eos": True, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as good:
            lines = good.iter_lines()
            next(lines)
            bad = client.post("/v1/completions", json={**COMPLETION, "prompt": "Q"})
            rest = [line for line in lines if line]
        assert bad.status_code == 500
        assert bad.json()["error"]["code"] == "model_failure"
        assert "bad numbers" not in bad.text
        assert '"finish_reason":"length"' in rest[-2]
        with client.stream("POST", "/v1/completions", json={**body, "prompt": "Q"}) as streamed:
            told = [line for line in streamed.iter_lines() if line]
        assert "model_failure" in told[-2]
        assert client.get("/health").status_code == 200
        parts.wait_until_idle()


def test_a_stalled_engine_makes_health_fail_and_answers_everybody(family: Family) -> None:
    parts = make_parts(family, settings=Settings(stall_seconds=0.2))
    failures: list[BaseException] = []
    parts.services.on_failure = failures.append
    go_on = threading.Event()
    step = parts.decoder.step

    def stuck(rows: object) -> object:
        go_on.wait(30)
        return step(rows)  # type: ignore[arg-type]

    parts.decoder.step = stuck  # type: ignore[method-assign,assignment]
    with serve(parts.services) as url, httpx.Client(base_url=url, timeout=20) as client:
        assert client.get("/health").status_code == 200
        answer = client.post("/v1/completions", json=COMPLETION)  # comes although the step never ends
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
        assert client.get("/health").status_code == 503
        assert client.get("/ready").status_code == 503
        assert client.post("/v1/completions", json=COMPLETION).status_code == 503
    go_on.set()
    [failure] = failures
    assert "no step has ended" in str(failure)


def test_a_full_queue_and_a_deadline(family: Family) -> None:
    settings = Settings(max_running=1, max_waiting=2, max_sequences_per_request=2, request_timeout=0.5)
    parts = make_parts(family, settings=settings)
    step = parts.decoder.step
    slow = threading.Event()

    def slowly(rows: object) -> object:
        slow.wait(0.05)
        return step(rows)  # type: ignore[arg-type]

    parts.decoder.step = slowly  # type: ignore[method-assign,assignment]
    with serve(parts.services) as url, httpx.Client(base_url=url, timeout=20) as client:
        body = {**COMPLETION, "max_tokens": 400, "ignore_eos": True}
        answers: list[httpx.Response] = []
        threads = [
            threading.Thread(
                target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=20))
            )
            for _ in range(6)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        statuses = sorted(answer.status_code for answer in answers)
        assert set(statuses) == {429, 504}
        full = next(answer for answer in answers if answer.status_code == 429)
        assert full.json()["error"]["code"] == "queue_full"
        assert int(full.headers["retry-after"]) > 0
        late = next(answer for answer in answers if answer.status_code == 504)
        assert late.json()["error"]["code"] == "deadline_exceeded"
        with client.stream("POST", "/v1/completions", json={**body, "stream": True}) as response:
            lines = [line for line in response.iter_lines() if line]
        assert "deadline_exceeded" in lines[-2]
        assert lines[-1] == "data: [DONE]"
        parts.wait_until_idle()
