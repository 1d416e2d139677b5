"""Which chat template, tokens and end tokens a model is served with, and what strangers' templates may cost."""

import json
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from eda.server.assembly import load_runtime
from eda.server.services import Services
from eda.server.settings import Settings
from tests.server.serving import serve
from tests.support.family import CHAT_TEMPLATE, Family, save_lora
from tests.support.oracle import Oracle

OWN = "{% for m in messages %}<|user|>Q: {{ m['content'] }}{% endfor %}<|assistant|>"
PARTS = "{% for m in messages %}{% for p in m['content'] %}{{ p['text'] }}{% endfor %}<|end|>{% endfor %}"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
SLOW_WHEN_LONG = CHAT_TEMPLATE + "{% if messages|length > 3 %}" + ENDLESS + "{% endif %}"


def lora(directory: Path, template: str | None, seed: int = 2, **generation: Any) -> Path:
    save_lora(directory, seed)
    if template is not None:
        (directory / "chat_template.jinja").write_text(template, encoding="utf-8")
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation), encoding="utf-8")
    return directory


@pytest.fixture(scope="module")
def end_token(family: Family, oracle: Oracle) -> int:
    """A token that "math" writes soon after the prompt of the test below."""
    tokens = oracle.continuation("math", family.tokenizer.encode("the fox"))[:20]
    place = next(place for place in range(3, 20) if tokens[place] not in tokens[:place])
    return tokens[place]


@pytest.fixture(scope="module")
def models(
    family_directory: Path, tmp_path_factory: pytest.TempPathFactory, end_token: int
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tuned")
    shutil.copytree(family_directory / "full", root / "full")
    (root / "full" / "chat_template.jinja").write_text(OWN, encoding="utf-8")
    return {
        "plain": lora(root / "plain", None),
        "own": lora(root / "own", OWN),
        "parts": lora(root / "parts", PARTS),
        "slow": lora(root / "slow", SLOW_WHEN_LONG),
        "ends": lora(root / "ends", None, eos_token_id=[0, end_token]),
        "full": root / "full",
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="module")
def client(family_directory: Path, models: dict[str, Path], directory: Path) -> Iterator[httpx.Client]:
    settings = Settings(
        target=family_directory / "base",
        draft=family_directory / "draft",
        fine_tunes=models,
        data_dir=directory / "data",
        adapter_roots=(directory / "posted",),
        weights="float32",
        cache_mib=16,
        reserve_disk_mib=0,
        worker=False,
    )
    with (
        serve(Services(settings, load=load_runtime)) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        yield client


def posted(client: httpx.Client, model: str, content: Any, turns: int = 1) -> httpx.Response:
    messages = [{"role": "user", "content": content}] * turns
    body = {"model": model, "messages": messages, "max_tokens": 3, "temperature": 0, "return_token_ids": True}
    return client.post("/v1/chat/completions", json=body)


def prompt_of(client: httpx.Client, model: str, content: Any) -> list[int]:
    response = posted(client, model, content)
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["prompt_token_ids"]
    return ids


@pytest.mark.parametrize(
    ("model", "text"),
    [
        ("base", "<|user|>hi fox<|end|><|assistant|>"),
        ("plain", "<|user|>hi fox<|end|><|assistant|>"),
        ("own", "<|user|>Q: hi fox<|assistant|>"),
        ("full", "<|user|>Q: hi fox<|assistant|>"),
        ("parts", "hi fox<|end|>"),
    ],
)
def test_a_fine_tunes_own_template_is_used_else_the_bases(
    client: httpx.Client, family: Family, model: str, text: str
) -> None:
    expected = family.tokenizer.encode(text, add_special_tokens=False)
    assert prompt_of(client, model, "hi fox") == expected
    assert prompt_of(client, model, [{"type": "text", "text": t} for t in ("hi", " fox")]) == expected
    tokenized = client.post(
        "/tokenize", json={"model": model, "messages": [{"role": "user", "content": "hi fox"}]}
    )
    assert tokenized.json()["tokens"] == expected


@pytest.mark.parametrize("model", ["base", "own", "parts"])
def test_other_words_give_other_tokens(client: httpx.Client, model: str) -> None:
    prompts = {tuple(prompt_of(client, model, words)) for words in ("one", "two", "three 4")}
    assert len(prompts) == 3


def test_a_loras_own_end_tokens_end_its_answers(
    client: httpx.Client, family: Family, oracle: Oracle, end_token: int
) -> None:
    tokens = oracle.continuation("math", family.tokenizer.encode("the fox"))[:20]
    body = {"prompt": "the fox", "max_tokens": 20, "temperature": 0, "return_token_ids": True}
    answers = {
        model: client.post("/v1/completions", json={**body, "model": model}).json()["choices"][0]
        for model in ("plain", "ends")
    }
    assert answers["plain"]["token_ids"] == tokens  # the same weights
    assert answers["ends"]["token_ids"] == tokens[: tokens.index(end_token) + 1]
    assert answers["ends"]["finish_reason"] == "stop"


def test_a_slow_template_costs_its_own_requests_only(client: httpx.Client) -> None:
    assert posted(client, "slow", "x").status_code == 200
    with ThreadPoolExecutor(8) as pool:
        slow = [pool.submit(posted, client, "slow", "x", 4) for _ in range(4)]
        time.sleep(0.1)
        longest = 0.0
        for _ in range(10):
            start = time.monotonic()
            assert client.get("/health").status_code == 200
            longest = max(longest, time.monotonic() - start)
            assert posted(client, "base", "x").status_code == 200
        assert not all(future.done() for future in slow)
        for future in slow:
            response = future.result()
            assert response.status_code == 400
            assert response.json()["error"]["param"] == "messages"
            assert "the chat template takes more than 1 s" in response.json()["error"]["message"]
    assert longest < 0.5
    assert posted(client, "slow", "x").status_code == 200


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"chat_template.jinja": ENDLESS}, "the chat template takes more than 1 s of processor time"),
        ({"chat_template.jinja": "{% for"}, "the chat template cannot be compiled: TemplateSyntaxError"),
        ({"chat_template.jinja": "fixed"}, "the chat template leaves out what users say"),
        ({"generation_config.json": '{"eos_token_id": 99999}'}, "no room for: the end token 99999"),
        ({"added_tokens.json": '{"<|new|>": 99999}'}, "gives the token '<|new|>' the id 99999"),
    ],
)
def test_a_posted_fine_tune_that_cannot_be_served_so_is_refused_by_name(
    client: httpx.Client, files: dict[str, str], message: str, directory: Path
) -> None:
    path = lora(directory / "posted" / f"lora-{len(list(directory.glob('posted/*')))}", None)
    for name, content in files.items():
        (path / name).write_text(content, encoding="utf-8")
    response = client.post(
        "/adapters", json={"name": "bad", "target": {"path": str(path)}, "data": {"prompts": ["a b", "c d"]}}
    )
    assert response.status_code == 400, response.text
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "target"
    assert "bad" not in [model["id"] for model in client.get("/v1/models").json()["data"]]


CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ({"role": "assistant", "content": None, "tool_calls": [CALL]}, "messages[1].tool_calls"),
        ({"role": "assistant", "tool_calls": [CALL]}, "messages[1].tool_calls"),
        ({"role": "assistant", "content": None, "function_call": {"name": "f"}}, "messages[1].function_call"),
        ({"role": "assistant", "content": None}, "messages[1].content"),
        ({"role": "user"}, "messages[1].content"),
    ],
)
def test_tool_history_is_blamed_on_the_tools(
    client: httpx.Client, message: dict[str, Any], param: str
) -> None:
    messages = [{"role": "user", "content": "x"}, message, {"role": "user", "content": "y"}]
    response = client.post("/v1/chat/completions", json={"model": "base", "messages": messages})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
