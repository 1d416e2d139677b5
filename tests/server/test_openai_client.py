"""The official `openai` client, unchanged, against the server."""

from collections.abc import Iterator

import openai
import pytest
from openai import OpenAI

from tests.support.family import Family
from tests.support.oracle import Oracle

MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the quick"}]


@pytest.fixture
def api(url: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{url}/v1", api_key="unused", max_retries=0) as api:
        yield api


def chat_reference(family: Family, oracle: Oracle, model: str, max_tokens: int) -> str:
    text = family.tokenizer.render_chat(MESSAGES)
    ids = family.tokenizer.encode(text, add_special_tokens=False)
    return family.tokenizer.decode(oracle.continuation(model, ids)[:max_tokens])


def test_models(api: OpenAI) -> None:
    models = list(api.models.list())
    assert [model.id for model in models] == ["base", "math", "code", "full"]
    math = api.models.retrieve("math")
    assert math.model_dump()["parent"] == "base"
    assert math.model_dump()["max_model_len"] == 512


def test_completion(api: OpenAI, oracle: Oracle) -> None:
    answer = api.completions.create(model="code", prompt="fox", max_tokens=20, temperature=0)
    assert answer.choices[0].text == oracle.text("code", "fox", 20)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 20


def test_completion_stream(api: OpenAI, oracle: Oracle) -> None:
    chunks = api.completions.create(model="code", prompt="fox", max_tokens=20, temperature=0, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == oracle.text("code", "fox", 20)


def test_chat(api: OpenAI, family: Family, oracle: Oracle) -> None:
    answer = api.chat.completions.create(
        model="math",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_completion_tokens=20,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
        extra_body={"draft": "shared"},
    )
    [choice] = answer.choices
    assert choice.message.role == "assistant"
    assert choice.message.content == chat_reference(family, oracle, "math", 20)
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content) == 20
    for entry in choice.logprobs.content:
        assert len(entry.top_logprobs) == 2
        assert entry.top_logprobs[0].logprob >= entry.top_logprobs[1].logprob
    # Special tokens are tokens, but no text.
    shown = [entry for entry in choice.logprobs.content if not entry.token.startswith("<|")]
    joined = b"".join(bytes(entry.bytes or []) for entry in shown)
    assert joined.decode(errors="replace") == choice.message.content
    # The shared draft alone was asked for, so no adapter had a part in it.
    assert answer.model_dump()["metrics"]["adapter"] is None


def test_chat_stream(api: OpenAI, family: Family, oracle: Oracle) -> None:
    chunks = list(
        api.chat.completions.create(
            model="math",
            messages=MESSAGES,  # type: ignore[arg-type]
            max_tokens=20,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == chat_reference(family, oracle, "math", 20)
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == ["length"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 20
    assert chunks[-1].model_dump()["metrics"]["num_target_passes"] > 0


def test_several_chat_choices_in_a_stream(api: OpenAI) -> None:
    chunks = api.chat.completions.create(
        model="base",
        messages=MESSAGES,  # type: ignore[arg-type]
        max_tokens=5,
        n=3,
        seed=1,
        stream=True,
    )
    finished = sorted(choice.index for chunk in chunks for choice in chunk.choices if choice.finish_reason)
    assert finished == [0, 1, 2]


def test_messages_may_have_text_parts_and_the_developer_role(
    api: OpenAI, family: Family, oracle: Oracle
) -> None:
    answer = api.chat.completions.create(
        model="math",
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "quick"}],
            },
        ],
        max_tokens=20,
        temperature=0,
    )
    assert answer.choices[0].message.content == chat_reference(family, oracle, "math", 20)


def test_errors_have_the_types_that_the_client_knows(api: OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        api.completions.create(model="nobody", prompt="x")
    assert (unknown.value.code, unknown.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError) as unsupported:
        api.completions.create(model="base", prompt="x", best_of=3)
    assert (unsupported.value.code, unsupported.value.param) == ("unsupported_parameter", "best_of")
    with pytest.raises(openai.BadRequestError) as long:
        api.completions.create(model="base", prompt="x" * 600, max_tokens=5)
    assert long.value.code == "context_length_exceeded"
