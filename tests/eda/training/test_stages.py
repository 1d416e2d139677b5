"""Whole stages on random models: shared draft, triage, private module and evaluation, with their files."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from eda.decoder import SpeculativeDecoder
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.speculation.kinds import Chain
from eda.training.data.prompts import ChatFormat
from eda.training.data.regenerate import RegenerationConfig, regenerate
from eda.training.data.samples import Sample
from eda.training.data.vocabulary import choose_draft_vocabulary
from eda.training.evaluate import EvaluationConfig, Variant, evaluate, loops
from eda.training.learning.trainer import TrainingConfig
from eda.training.private_module import PrivateTrainingConfig, train_private_module
from eda.training.progress import ProgressEvent, StageStoppedError
from eda.training.shared_draft import SharedDraftConfig, text_samples, train_shared_draft
from eda.training.triage import TriageConfig, triage
from tests.support.prompts import prompts_from_strings
from tests.support.toys import byte_chat, new_draft, random_target, weights_of

PROMPTS = prompts_from_strings([f"tell {number}" for number in range(14)])
ANSWERS = RegenerationConfig(max_tokens=12, max_prompt_tokens=60, sampled_share=0.0, batch_size=4)
TRAINING = TrainingConfig(num_steps=6, batch_size=4, unroll_steps=2, learning_rate=5e-3, evaluate_every=3)
SHARED = SharedDraftConfig(
    draft_vocab_size=100, num_prompts=8, held_out=4, regeneration=ANSWERS, training=TRAINING
)


@pytest.fixture(scope="module")
def base() -> FineTune:
    return FineTune("base", random_target(1, vocab_size=258))


@pytest.fixture(scope="module")
def fine_tune() -> FineTune:
    return FineTune("other", random_target(2, vocab_size=258))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    return byte_chat(tmp_path_factory.mktemp("tokenizer"))


def test_a_shared_draft_is_trained_saved_and_found_finished(
    base: FineTune, chat: ChatFormat, tmp_path: Path
) -> None:
    events: list[ProgressEvent] = []
    draft, report = train_shared_draft(
        base.model,
        chat,
        PROMPTS,
        tmp_path / "draft",
        SHARED,
        texts=["a text to learn from"],
        vocabulary_texts=["zzz"],
        on_progress=events.append,
    )
    assert {event.stage for event in events} == {"regenerate", "train"}
    assert report.best_score >= report.first_score
    loaded = DraftModel.load(tmp_path / "draft")
    assert loaded.fingerprint() == draft.fingerprint()
    assert loaded.config.draft_vocab_size == 100
    assert loaded.config.target_fingerprint == base.model.fingerprint
    assert {257, ord("z")} <= set(loaded.draft_token_ids.tolist())
    recorded = json.loads((tmp_path / "draft" / "config.json").read_text())["training"]
    assert {"command", "versions", "data_hash", "target_fingerprint", "created"} <= set(recorded)
    again, _ = train_shared_draft(
        base.model,
        chat,
        PROMPTS,
        tmp_path / "draft",
        SHARED,
        texts=["a text to learn from"],
        vocabulary_texts=["zzz"],
    )
    assert again.fingerprint() == draft.fingerprint()


def test_triage_tells_a_harmless_fine_tune_from_a_harmful_one(
    base: FineTune, fine_tune: FineTune, chat: ChatFormat, tmp_path: Path
) -> None:
    config = replace(SHARED, training=replace(TRAINING, num_steps=40))
    draft, report = train_shared_draft(base.model, chat, PROMPTS, tmp_path / "draft", config)
    assert report.best_score > 1.0

    decoder = SpeculativeDecoder.for_models(base.model, num_slots=1000)

    def run(model: FineTune, name: str) -> tuple[bool, float, str]:
        report = triage(
            base, model, draft, decoder, PROMPTS[:6], chat, tmp_path / name, TriageConfig(ANSWERS)
        )
        assert (
            json.loads((tmp_path / name / "triage.json").read_text())["report"]["retention"]
            == report.retention
        )
        return report.worthwhile, report.retention, report.reason

    assert run(base, "same")[:2] == (False, 1.0)
    worthwhile, retention, reason = run(fine_tune, "other")
    assert worthwhile
    assert retention < 0.95
    assert "threshold 95%" in reason


def test_a_private_module_is_trained_saved_and_resumed(
    fine_tune: FineTune, chat: ChatFormat, tmp_path: Path
) -> None:
    draft = new_draft(fine_tune.model, draft_vocab_size=120)
    decoder = SpeculativeDecoder.for_models(fine_tune.model, num_slots=1000)
    samples, _ = regenerate(decoder, fine_tune, PROMPTS, chat, tmp_path / "samples", ANSWERS)
    before = weights_of(draft)
    config = PrivateTrainingConfig(intermediate_size=8, fc_rank=2, training=TRAINING)
    private, report = train_private_module(
        fine_tune, draft, samples[4:], samples[:4], tmp_path / "out", config
    )
    assert report.num_parameters == private.num_parameters
    assert all(torch.equal(tensor, before[name]) for name, tensor in draft.state_dict().items())
    loaded = PrivateModule.load(tmp_path / "out" / "private.safetensors", private.config)
    assert loaded.fingerprint() == private.fingerprint()
    recorded = json.loads((tmp_path / "out" / "train.json").read_text())
    assert recorded["draft"] == draft.fingerprint()
    assert recorded["fine_tune"] == fine_tune.fingerprint
    other = tmp_path / "other"
    with pytest.raises(StageStoppedError):
        train_private_module(
            fine_tune,
            draft,
            samples[4:],
            samples[:4],
            other,
            config,
            should_stop=iter([False, False, True]).__next__,
        )
    resumed, _ = train_private_module(fine_tune, draft, samples[4:], samples[:4], other, config)
    assert resumed.fingerprint() == private.fingerprint()


def test_evaluation_measures_every_variant_at_every_temperature(
    fine_tune: FineTune, chat: ChatFormat, tmp_path: Path
) -> None:
    draft = new_draft(fine_tune.model)
    private = PrivateModule.initialised(draft.config.private_config(8))
    with_draft = SpeculativeDecoder.for_models(fine_tune.model, draft, num_slots=400, seed=0)
    variants = {
        "plain": Variant(with_draft, speculates=False),
        "shared": Variant(with_draft),
        "adapted": Variant(with_draft, private),
    }
    config = EvaluationConfig(max_tokens=10, max_prompt_tokens=60, speculation=Chain(3))
    output = tmp_path / "evaluation.json"
    found = evaluate(fine_tune, variants, PROMPTS[:3], chat, config, output=output)
    assert set(found) == set(variants)
    for by_temperature in found.values():
        assert set(by_temperature) == {"0.0", "1.0"}
    assert found["plain"]["0.0"].mean_acceptance_length == 1.0
    assert found["plain"]["0.0"].speed_up == 1.0
    # A private module that was not trained is the shared draft, so greedy rounds are the same.
    assert found["adapted"]["0.0"].mean_acceptance_length == found["shared"]["0.0"].mean_acceptance_length
    assert len({m["0.0"].num_tokens for m in found.values()}) == 1, "greedy texts are the same"
    assert json.loads(output.read_text())["variants"]["adapted"]["1.0"]["num_prompts"] == 3
    with pytest.raises(StageStoppedError):
        evaluate(fine_tune, variants, PROMPTS[:3], chat, config, should_stop=lambda: True)


def test_loops_are_found() -> None:
    assert loops(list(range(8)) * 3)
    assert not loops(list(range(8)) * 2 + list(range(10, 50)))
    assert not loops([1] * 9)
    assert loops([1] * 10)
    assert not loops([])


def test_the_draft_vocabulary_holds_the_frequent_and_the_necessary() -> None:
    samples = [Sample("a", (30, 31), (5, 5, 5, 7, 7, 9)), Sample("b", (30,), (5, 11))]
    chosen = choose_draft_vocabulary(samples, 40, 3, always=[20])
    assert chosen.token_ids.tolist() == [5, 7, 20]
    assert chosen.coverage == pytest.approx(6 / 8)
    filled = choose_draft_vocabulary(samples, 40, 8, extra_texts=[[33]])
    assert filled.token_ids.tolist() == [0, 1, 2, 5, 7, 9, 11, 33]
    with pytest.raises(ValueError, match="size is 41"):
        choose_draft_vocabulary(samples, 40, 41)


def test_texts_are_samples_from_their_first_token_on(chat: ChatFormat) -> None:
    [sample] = text_samples(chat, ["abcdef", "x"], 4)
    assert sample.prompt_ids + sample.response_ids == tuple(chat.text_ids("abcd"))
    assert len(sample.prompt_ids) == 1
