"""`POST /v1/completions` over HTTP, on real (tiny) models with long accepted runs."""

import json
from typing import Any

import httpx
import pytest
import torch

from eda.decoder import SpeculativeDecoder
from eda.generation import GenerationRequest, generate
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Off
from tests.support.family import MAX_LENGTH, Family
from tests.support.oracle import Oracle

PROMPT = "the quick brown fox"
DRAFTS = ("private", "shared", "lookup", "none")


def complete(client: httpx.Client, **body: Any) -> dict[str, Any]:
    body = {"model": "math", "prompt": PROMPT, "temperature": 0, "max_tokens": 12, **body}
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    answer: dict[str, Any] = response.json()
    return answer


def stream(client: httpx.Client, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """All chunks of a stream, after its end was checked."""
    body = {"model": "math", "prompt": PROMPT, "temperature": 0, "max_tokens": 12, "stream": True, **body}
    with client.stream("POST", path, json=body) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines.pop() == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.mark.parametrize("model", ["base", "math", "code", "full"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_greedy_answer_is_the_targets_own(
    client: httpx.Client, oracle: Oracle, model: str, draft: str
) -> None:
    expected = oracle.text(model, PROMPT, 40)
    answer = complete(client, model=model, draft=draft, max_tokens=40)
    [choice] = answer["choices"]
    assert choice["text"] == expected
    assert choice["finish_reason"] == "length"
    assert answer["object"] == "text_completion"
    assert answer["id"].startswith("cmpl-")
    assert answer["model"] == model
    assert answer["usage"]["completion_tokens"] == 40
    assert answer["usage"]["total_tokens"] == answer["usage"]["prompt_tokens"] + 40


def test_metrics_tell_how_the_draft_did(client: httpx.Client, oracle: Oracle) -> None:
    oracle.text("math", PROMPT, 40)
    plain = complete(client, draft="none", max_tokens=40)["metrics"]
    assert plain["num_target_passes"] == 39
    assert plain["mean_acceptance_length"] == 1.0
    assert plain["draft_acceptance_rate"] is None
    drafted = complete(client, max_tokens=40)["metrics"]
    assert drafted["num_target_passes"] < 39
    assert drafted["mean_acceptance_length"] == pytest.approx(39 / drafted["num_target_passes"], abs=1e-3)
    assert 0 < drafted["draft_acceptance_rate"] < 1
    assert (drafted["adapter"], drafted["adapter_version"]) == ("math", 1)
    for draft in ("shared", "lookup", "none"):  # nothing of the adapter was used
        metrics = complete(client, model="math", draft=draft)["metrics"]
        assert (metrics["draft"], metrics["adapter"], metrics["adapter_version"]) == (draft, None, None)
    assert drafted["draft"] == "private"
    # A model without a private module is served with the shared draft, and says so.
    assert complete(client, model="base", draft="private")["metrics"]["draft"] == "shared"
    assert drafted["tokens_per_second"] > 0
    assert drafted["time_to_first_token_ms"] > 0


def test_prompts_may_be_token_ids_and_lists(client: httpx.Client, family: Family) -> None:
    texts = [PROMPT, "1 + 2 = 3", "lazy"]
    ids = [family.tokenizer.encode(text) for text in texts]
    singles = [complete(client, prompt=text)["choices"][0]["text"] for text in texts]
    assert [choice["text"] for choice in complete(client, prompt=texts)["choices"]] == singles
    assert [choice["text"] for choice in complete(client, prompt=ids)["choices"]] == singles
    assert complete(client, prompt=ids[1])["choices"][0]["text"] == singles[1]


def test_n_completions_of_each_prompt(client: httpx.Client) -> None:
    answer = complete(client, prompt=["a", "b"], n=3, temperature=1, seed=5, return_token_ids=True)
    choices = answer["choices"]
    assert [choice["index"] for choice in choices] == list(range(6))
    assert [choice["prompt_token_ids"] for choice in choices[:3]] == [choices[0]["prompt_token_ids"]] * 3
    assert choices[0]["prompt_token_ids"] != choices[3]["prompt_token_ids"]
    assert len({choice["text"] for choice in choices}) == 6
    # Each prompt counts once.
    assert answer["usage"]["prompt_tokens"] == 2
    assert answer["usage"]["completion_tokens"] == sum(len(choice["token_ids"]) for choice in choices)


def test_echo_begins_with_the_prompt(client: httpx.Client, family: Family) -> None:
    plain = complete(client)["choices"][0]["text"]
    assert complete(client, echo=True)["choices"][0]["text"] == PROMPT + plain
    ids = family.tokenizer.encode(PROMPT)
    assert complete(client, echo=True, prompt=ids)["choices"][0]["text"] == PROMPT + plain
    streamed = "".join(chunk["choices"][0]["text"] for chunk in stream(client, echo=True))
    assert streamed == PROMPT + plain


@pytest.mark.parametrize("draft", DRAFTS)
def test_logprobs_are_the_targets(client: httpx.Client, family: Family, oracle: Oracle, draft: str) -> None:
    prompt_ids = family.tokenizer.encode(PROMPT)
    oracle.continuation("base", prompt_ids)
    answer = complete(client, model="base", logprobs=3, max_tokens=20, draft=draft, return_token_ids=True)
    [choice] = answer["choices"]
    token_ids, logprobs = choice["token_ids"], choice["logprobs"]
    expected = reference_logprobs(family, prompt_ids, token_ids)
    assert len(logprobs["tokens"]) == 20
    for place, token_id in enumerate(token_ids):
        assert logprobs["token_logprobs"][place] == pytest.approx(float(expected[place, token_id]), abs=1e-4)
        top = expected[place].topk(3)
        assert sorted(logprobs["top_logprobs"][place].values(), reverse=True)[:3] == pytest.approx(
            top.values.tolist(), abs=1e-4
        )
    assert logprobs["text_offset"][0] == 0
    assert logprobs["text_offset"] == sorted(logprobs["text_offset"])


def reference_logprobs(family: Family, prompt_ids: list[int], token_ids: list[int]) -> torch.Tensor:
    """One row of log-probabilities for each token, from one pass over everything."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(family.directory / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = model(torch.tensor([prompt_ids + token_ids])).logits[0]
    return logits[len(prompt_ids) - 1 : -1].float().log_softmax(-1)


def test_offsets_point_at_the_text_of_each_token(client: httpx.Client) -> None:
    [choice] = complete(client, logprobs=0, max_tokens=30)["choices"]
    logprobs = choice["logprobs"]
    ends = [*logprobs["text_offset"][1:], len(choice["text"])]
    for token, start, end in zip(logprobs["tokens"], logprobs["text_offset"], ends, strict=True):
        if not token.startswith(("bytes:", "<|")):
            # Bytes before it that never became a character are shown with the token that proved it.
            assert choice["text"][start:end].lstrip("\ufffd") == token


def find_stop(family: Family, tokens: list[int], earliest: int) -> tuple[str, int, int]:
    """A stop string that begins inside one token and ends inside a later one: it, its start, and the tokens taken."""
    whole = family.tokenizer.decode(tokens)
    for end in range(earliest, len(tokens)):
        text = family.tokenizer.decode(tokens[:end])
        stop = text[-3:]
        shorter = family.tokenizer.decode(tokens[: end - 1])
        if (
            "\ufffd" not in stop
            and len(stop) == 3
            and whole.find(stop) == len(text) - 3
            and stop not in shorter
        ):
            return stop, len(text) - 3, end
    raise AssertionError("the random text has no place for a stop")


@pytest.mark.parametrize("model", ["base", "math", "code"])
@pytest.mark.parametrize("draft", DRAFTS)
def test_a_stop_string_inside_an_accepted_run(
    client: httpx.Client, family: Family, oracle: Oracle, model: str, draft: str
) -> None:
    prompt = "aaaa " + model
    tokens = oracle.continuation(model, family.tokenizer.encode(prompt))[:40]
    stop, start, count = find_stop(family, tokens, 6)
    body = {"model": model, "prompt": prompt, "draft": draft, "max_tokens": 40, "stop": ["never", stop]}
    answer = complete(client, **body, logprobs=1, return_token_ids=True)
    [choice] = answer["choices"]
    assert choice["text"] == family.tokenizer.decode(tokens)[:start]
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", stop)
    assert choice["token_ids"] == tokens[:count]
    assert len(choice["logprobs"]["tokens"]) == count
    assert answer["usage"]["completion_tokens"] == count
    chunks = stream(client, **body, logprobs=1, return_token_ids=True, stream_options={"include_usage": True})
    choices = [chunk["choices"][0] for chunk in chunks if chunk["choices"]]
    assert "".join(part["text"] for part in choices) == choice["text"]
    assert [i for part in choices for i in part.get("token_ids", [])] == choice["token_ids"]
    assert [o for part in choices if part["logprobs"] for o in part["logprobs"]["text_offset"]] == choice[
        "logprobs"
    ]["text_offset"]
    assert chunks[-1]["usage"]["completion_tokens"] == count
    included = complete(client, **body, include_stop_str_in_output=True)["choices"][0]
    assert included["text"] == choice["text"] + stop


@pytest.mark.parametrize("draft", DRAFTS)
def test_a_stop_id_inside_an_accepted_run(
    client: httpx.Client, family: Family, oracle: Oracle, draft: str
) -> None:
    tokens = oracle.continuation("math", family.tokenizer.encode(PROMPT))[:40]
    place = next(i for i in range(5, 40) if tokens[i] not in tokens[:i])
    answer = complete(
        client, draft=draft, max_tokens=40, stop_token_ids=[tokens[place]], return_token_ids=True
    )
    [choice] = answer["choices"]
    assert choice["token_ids"] == tokens[: place + 1]
    assert choice["text"] == family.tokenizer.decode(tokens[:place])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", tokens[place])
    # min_tokens forbids the id until then, so another token comes instead of the first one.
    later = complete(
        client,
        draft=draft,
        max_tokens=40,
        stop_token_ids=[tokens[place]],
        min_tokens=30,
        return_token_ids=True,
    )
    assert later["usage"]["completion_tokens"] >= 30


@pytest.mark.parametrize("draft", DRAFTS)
def test_the_end_of_text_stops_unless_it_is_ignored(client: httpx.Client, family: Family, draft: str) -> None:
    [eos] = family.tokenizer.eos_ids
    body = {"draft": draft, "logit_bias": {str(eos): 100}, "return_token_ids": True}
    stopped = complete(client, **body)
    assert stopped["choices"][0] == stopped["choices"][0] | {
        "text": "",
        "finish_reason": "stop",
        "token_ids": [eos],
    }
    assert "stop_reason" not in stopped["choices"][0]
    ignored = complete(client, **body, ignore_eos=True)
    assert ignored["choices"][0]["token_ids"] == [eos] * 12
    assert complete(client, **body, min_tokens=5)["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    "options", [{}, {"top_p": 0.8, "top_k": 30}, {"frequency_penalty": 1.0}, {"min_p": 0.1}]
)
def test_a_seed_gives_the_same_text_with_any_draft(client: httpx.Client, options: dict[str, Any]) -> None:
    body = {"temperature": 0.9, "seed": 11, "max_tokens": 30, **options}
    texts = {complete(client, **body, draft=draft)["choices"][0]["text"] for draft in DRAFTS}
    assert len(texts) == 1
    assert complete(client, **body | {"seed": 12})["choices"][0]["text"] not in texts


def test_sampling_settings_reach_the_model(client: httpx.Client, family: Family) -> None:
    params = SamplingParams(
        temperature=0.0, repetition_penalty=1.5, presence_penalty=0.7, logit_bias={40: 3.0}
    )
    request = GenerationRequest(family.tokenizer.encode(PROMPT), 20, sampling=params, speculation=Off())
    decoder = SpeculativeDecoder.for_models(family.target, num_slots=256)
    [expected] = generate(decoder, family.fine_tunes["math"], [request])
    answer = complete(
        client,
        max_tokens=20,
        repetition_penalty=1.5,
        presence_penalty=0.7,
        logit_bias={"40": 3.0},
        return_token_ids=True,
    )
    assert answer["choices"][0]["token_ids"] == expected.token_ids


@pytest.mark.parametrize(
    "options", [{}, {"n": 2, "temperature": 1, "seed": 3}, {"logprobs": 2}, {"prompt": ["a", "b"]}]
)
@pytest.mark.parametrize("usage", [True, False])
def test_a_stream_tells_the_same_as_a_body(
    client: httpx.Client, options: dict[str, Any], usage: bool
) -> None:
    body = {"max_tokens": 25, "return_token_ids": True, **options}
    whole = complete(client, **body)
    chunks = stream(client, **body, **({"stream_options": {"include_usage": True}} if usage else {}))
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    for choice in whole["choices"]:
        parts = [part for chunk in chunks for part in chunk["choices"] if part["index"] == choice["index"]]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [i for part in parts for i in part.get("token_ids", [])] == choice["token_ids"]
        assert [part["finish_reason"] for part in parts if part["finish_reason"]] == [choice["finish_reason"]]
        if choice["logprobs"]:
            tokens = [t for part in parts if part["logprobs"] for t in part["logprobs"]["tokens"]]
            assert tokens == choice["logprobs"]["tokens"]
    assert chunks[-1]["metrics"]["num_target_passes"] > 0
    assert all("metrics" not in chunk for chunk in chunks[:-1])
    if usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"] == whole["usage"]
    assert all("usage" not in chunk for chunk in chunks[:-1])


def test_max_tokens_defaults_to_sixteen_and_may_fill_the_model(client: httpx.Client) -> None:
    assert complete(client, max_tokens=None, ignore_eos=True)["usage"]["completion_tokens"] == 16
    ids = [40] * (MAX_LENGTH - 3)
    filled = complete(client, prompt=ids, max_tokens=3, ignore_eos=True)
    assert filled["usage"]["total_tokens"] == MAX_LENGTH
