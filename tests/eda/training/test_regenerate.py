"""Answers of the fine-tune: mix, resuming, what is counted, and prompts that it writes itself."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eda.decoder import SpeculativeDecoder
from eda.errors import DataError, TrainingError
from eda.models.fine_tune import FineTune
from eda.training.data.regenerate import RegenerationConfig, is_drawn, regenerate
from eda.training.data.samples import SAMPLES_FILE, read_samples
from eda.training.data.self_prompts import ATTEMPTS_FILE, SelfPromptConfig, write_own_prompts
from eda.training.progress import StageStoppedError
from tests.support.prompts import prompts_from_strings
from tests.support.toys import byte_chat, random_target

CONFIG = RegenerationConfig(max_tokens=8, max_prompt_tokens=60, sampled_share=0.5, batch_size=4)


@pytest.fixture(scope="module")
def fine_tune() -> FineTune:
    return FineTune("toy", random_target(1, vocab_size=258))


@pytest.fixture
def decoder(fine_tune: FineTune) -> SpeculativeDecoder:
    return SpeculativeDecoder.for_models(fine_tune.model, num_slots=1000)


PROMPTS = prompts_from_strings([f"say {number}" for number in range(10)])


def test_an_interrupted_run_gives_the_same_samples(
    fine_tune: FineTune, decoder: SpeculativeDecoder, tmp_path: Path
) -> None:
    chat = byte_chat(tmp_path / "tokenizer")
    whole, report = regenerate(decoder, fine_tune, PROMPTS, chat, tmp_path / "whole", CONFIG)
    assert [sample.id for sample in whole] == [prompt.id for prompt in PROMPTS]
    assert report.num_samples == 10
    assert 0 < report.num_greedy < 10
    calls = 0

    def stop() -> bool:
        nonlocal calls
        calls += 1
        return calls % 14 == 0

    part = tmp_path / "part"
    interruptions = 0
    while True:
        try:
            found, _ = regenerate(decoder, fine_tune, PROMPTS, chat, part, CONFIG, should_stop=stop)
            break
        except StageStoppedError:
            interruptions += 1
            assert interruptions < 20
            # A crash may leave half a line behind.
            with (part / SAMPLES_FILE).open("a") as stream:
                stream.write('{"id": "line-')
    assert interruptions > 1
    assert found == whole
    lines = (part / SAMPLES_FILE).read_text().splitlines()
    assert len(lines) == len({json.loads(line)["id"] for line in lines}) == 10


def test_finished_work_is_not_done_again(
    fine_tune: FineTune, decoder: SpeculativeDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = byte_chat(tmp_path / "tokenizer")
    first, _ = regenerate(decoder, fine_tune, PROMPTS, chat, tmp_path / "out", CONFIG)
    monkeypatch.setattr(
        "eda.training.data.regenerate.generate", lambda *a, **k: pytest.fail("generated again")
    )
    assert regenerate(decoder, fine_tune, PROMPTS, chat, tmp_path / "out", CONFIG)[0] == first


def test_long_prompts_are_counted_and_passed_over(
    fine_tune: FineTune, decoder: SpeculativeDecoder, tmp_path: Path
) -> None:
    chat = byte_chat(tmp_path / "tokenizer")
    prompts = prompts_from_strings(["short", "x" * 100])
    samples, report = regenerate(decoder, fine_tune, prompts, chat, tmp_path / "out", CONFIG)
    assert [sample.id for sample in samples] == ["line-1"]
    assert (report.num_prompts, report.num_too_long, report.too_long_ids) == (2, 1, ("line-2",))


def test_answers_of_another_run_are_not_mixed_in(
    fine_tune: FineTune, decoder: SpeculativeDecoder, tmp_path: Path
) -> None:
    chat = byte_chat(tmp_path / "tokenizer")
    regenerate(decoder, fine_tune, PROMPTS[:2], chat, tmp_path / "out", CONFIG)
    with pytest.raises(TrainingError, match="other prompts, of another fine-tune or with other settings"):
        regenerate(decoder, fine_tune, PROMPTS[:2], chat, tmp_path / "out", replace(CONFIG, max_tokens=9))
    with pytest.raises(TrainingError, match="other prompts"):
        regenerate(decoder, fine_tune, PROMPTS[:3], chat, tmp_path / "out", CONFIG)


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    path.write_text('{"id": "a", "prompt_ids": [1], "response_ids": "oops"}\n{"id": ')
    with pytest.raises(DataError, match="line 1 is no sample"):
        read_samples(path)


def test_the_mix_is_about_what_was_asked_for() -> None:
    config = replace(CONFIG, sampled_share=0.3)
    share = sum(is_drawn(f"p{number}", config) for number in range(2000)) / 2000
    assert 0.25 < share < 0.35


def test_own_prompts_are_distinct_and_resumable(
    fine_tune: FineTune, decoder: SpeculativeDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = byte_chat(tmp_path / "tokenizer")
    texts = iter([f"please tell number {n // 2} now" + "!" * (n % 2) for n in range(100)])
    monkeypatch.setattr("eda.training.data.self_prompts._text", lambda *_: next(texts))
    config = SelfPromptConfig(max_tokens=4, batch_size=4)

    def write(count: int, stop: bool = False) -> list[str]:
        prompts = write_own_prompts(
            decoder, fine_tune, chat, count, tmp_path / "own", config, should_stop=lambda: stop
        )
        return [prompt.messages[0]["content"] for prompt in prompts]

    assert write(3) == [f"please tell number {n} now" for n in range(3)]
    assert len((tmp_path / "own" / ATTEMPTS_FILE).read_text().splitlines()) == 8
    assert write(3, stop=True) == [f"please tell number {n} now" for n in range(3)]
    with pytest.raises(StageStoppedError, match="stopped after 4 of 6 prompts"):
        write(6, stop=True)
    assert write(6)[5] == "please tell number 5 now"


def test_a_fine_tune_that_writes_nothing_is_an_error(
    fine_tune: FineTune, decoder: SpeculativeDecoder, tmp_path: Path
) -> None:
    chat = byte_chat(tmp_path / "tokenizer")
    config = SelfPromptConfig(max_tokens=2, batch_size=8)
    with pytest.raises(DataError, match="gave no usable prompt"):
        write_own_prompts(decoder, fine_tune, chat, 2, tmp_path / "own", config)
