"""Base training and fine-tuning on a tiny model: they learn, resume exactly, and write what others can load."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from recipes import fine_tune, pretrain
from recipes.attention import causal_attention, use_blocked_attention
from recipes.evaluate import greedy_answers, load_model, loops
from recipes.hardware import Hardware, choose_hardware
from recipes.head_loss import head_loss
from recipes.held_out import mean_loss
from recipes.optimizer import orthogonalize, rate_scale
from recipes.text import EncodedRow, encode_rows, pack_rows, train_rows
from recipes.training_state import LossLog


@pytest.fixture
def encoded(data: Path, tokenizer: PreTrainedTokenizerFast) -> list[EncodedRow]:
    return encode_rows(tokenizer.backend_tokenizer, train_rows(data, "general"))


@pytest.fixture
def sequences(encoded: list[EncodedRow]) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]":
    return pack_rows((row.token_ids for row in encoded), 48)


def _pretrain_settings(num_steps: int) -> pretrain.PretrainSettings:
    return pretrain.PretrainSettings(
        max_tokens=num_steps * 4 * 48,
        micro_batch_size=2,
        num_micro_batches=2,
        log_every=2,
        sequence_length=48,
    )


def _parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_head_loss_equals_cross_entropy() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(1100, 8, requires_grad=True)
    weight = torch.randn(30, 8, requires_grad=True)
    labels = torch.randint(0, 30, (1100,))
    labels[::3] = -100
    loss = head_loss(hidden, weight, labels)
    gradients = torch.autograd.grad(loss * 2, (hidden, weight))
    expected = functional.cross_entropy(hidden @ weight.T, labels)
    expected_gradients = torch.autograd.grad(expected * 2, (hidden, weight))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients)


def test_orthogonalize_brings_singular_values_near_one() -> None:
    torch.manual_seed(0)
    for shape in ((3, 16, 24), (2, 24, 16), (1, 16, 16)):
        values = torch.linalg.svdvals(orthogonalize(torch.randn(shape)))
        assert values.max() < 1.3
        assert values.median() > 0.6


def test_rate_warms_up_stays_and_decays() -> None:
    assert rate_scale(0.0) < 0.2
    assert rate_scale(0.3) == rate_scale(0.59) == 1.0
    assert rate_scale(0.8) == pytest.approx(0.5)
    assert rate_scale(1.0) == pytest.approx(0.02)


def test_bfloat16_is_used_only_where_it_is_fast() -> None:
    hardware = choose_hardware()
    has_units = torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
    fast = hardware.device == "cuda" or has_units
    assert hardware.compute_dtype == ("bfloat16" if fast else "float32")


@pytest.mark.parametrize("length", [5, 300])
def test_blocked_attention_equals_plain_attention(length: int) -> None:
    torch.manual_seed(0)
    queries, keys, values = (torch.randn(2, 3, length, 16) for _ in range(3))
    expected = functional.scaled_dot_product_attention(queries, keys, values, is_causal=True)
    torch.testing.assert_close(causal_attention(queries, keys, values, 0.25), expected)


def test_a_model_with_blocked_attention_gives_the_same_logits(tiny_config: LlamaConfig) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(tiny_config)
    ids = torch.randint(0, tiny_config.vocab_size, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits
        use_blocked_attention(model)
        torch.testing.assert_close(model(ids).logits, expected)


def test_pretraining_learns(
    tiny_config: LlamaConfig,
    sequences: "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]",
    hardware: Hardware,
    tmp_path: Path,
    encoded: list[EncodedRow],
) -> None:
    model = pretrain.initial_model(tiny_config, seed=0)
    before = mean_loss(model, encoded, responses_only=False)
    assert before == pytest.approx(math.log(tiny_config.vocab_size), abs=0.1)
    log = LossLog(tmp_path / "log.jsonl")
    position = pretrain.train(
        model, sequences, _pretrain_settings(30), hardware, tmp_path / "state.safetensors", log
    )
    assert position.step == 30
    assert position.num_tokens == 30 * 4 * 48
    assert mean_loss(model, encoded, responses_only=False) < before - 1.5
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert records[0]["event"] == "start"
    assert records[0]["compute_dtype"] == "float32"
    assert [record["step"] for record in records[1:]] == list(range(2, 31, 2))


def test_resumed_pretraining_equals_an_uninterrupted_run(
    tiny_config: LlamaConfig,
    sequences: "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]",
    hardware: Hardware,
    tmp_path: Path,
) -> None:
    # Enough steps for more than one pass over the text, so that the order of the second pass counts too.
    settings = _pretrain_settings(len(sequences) // 4 + 4)
    log = LossLog(tmp_path / "log.jsonl")
    whole = pretrain.initial_model(tiny_config, seed=0)
    pretrain.train(whole, sequences, settings, hardware, tmp_path / "whole.safetensors", log)
    for stop in (3, len(sequences) // 4 + 1, None):
        # Later parts start from other weights: what counts must come from the checkpoint.
        parts = pretrain.initial_model(tiny_config, seed=0 if stop == 3 else 7)
        pretrain.train(
            parts, sequences, settings, hardware, tmp_path / "parts.safetensors", log, stop_after_steps=stop
        )
    torch.testing.assert_close(_parameters(parts), _parameters(whole), rtol=0, atol=0)


def test_growing_in_depth_keeps_the_outputs(tiny_config: LlamaConfig) -> None:
    deep = LlamaConfig.from_dict(tiny_config.to_dict() | {"num_hidden_layers": 5})
    torch.manual_seed(0)
    shallow = LlamaForCausalLM(tiny_config)
    grown = pretrain.grown_model(shallow, deep, seed=0)
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        torch.testing.assert_close(grown(ids).logits, shallow(ids).logits, rtol=0, atol=0)
    assert len(grown.model.layers) == 5


def test_growing_run_resumes_in_either_part(
    tiny_config: LlamaConfig,
    encoded: list[EncodedRow],
    hardware: Hardware,
    tmp_path: Path,
) -> None:
    settings = replace(_pretrain_settings(12), num_shallow_layers=1, shallow_share=0.5, long_share=0.25)
    lengths = []

    def sequences_of(length: int) -> "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]":
        lengths.append(length)
        return pack_rows((row.token_ids for row in encoded), length)

    log = LossLog(tmp_path / "log.jsonl")
    model, position = pretrain.train_growing(tiny_config, sequences_of, settings, hardware, tmp_path, log)
    assert (position.step, len(model.model.layers)) == (12, 2)
    assert lengths == [48, 48, 96]
    # Both parts are complete, so a second call only restores the result.
    again, position = pretrain.train_growing(tiny_config, sequences_of, settings, hardware, tmp_path, log)
    assert position.step == 12
    torch.testing.assert_close(_parameters(again), _parameters(model), rtol=0, atol=0)
    # Without the second part's checkpoint, it starts where the first part ended.
    (tmp_path / "base_state.safetensors").unlink()
    repeated, _ = pretrain.train_growing(tiny_config, sequences_of, settings, hardware, tmp_path, log)
    torch.testing.assert_close(_parameters(repeated), _parameters(model), rtol=0, atol=0)


def test_pretraining_ends_at_the_time_limit(
    tiny_config: LlamaConfig,
    sequences: "np.ndarray[tuple[int, ...], np.dtype[np.uint16]]",
    hardware: Hardware,
    tmp_path: Path,
) -> None:
    settings = pretrain.PretrainSettings(
        max_tokens=10**12, max_seconds=0.5, micro_batch_size=2, sequence_length=48
    )
    model = pretrain.initial_model(tiny_config, seed=0)
    position = pretrain.train(
        model, sequences, settings, hardware, tmp_path / "state.safetensors", LossLog(tmp_path / "log.jsonl")
    )
    assert 0.5 <= position.seconds < 5


def test_saved_checkpoint_loads_in_plain_transformers(
    tiny_config: LlamaConfig, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    model = pretrain.initial_model(tiny_config, seed=0)
    pretrain.save_checkpoint(model, tokenizer, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert loaded.generation_config.temperature == 0.7
    assert AutoTokenizer.from_pretrained(tmp_path).chat_template == tokenizer.chat_template
    torch.testing.assert_close(_parameters(loaded), _parameters(model))


def test_only_responses_are_labels() -> None:
    rows = [EncodedRow([5, 6, 7, 8, 9], 3), EncodedRow([5, 6, 7], 1)]
    token_ids, labels = fine_tune.collate(rows, max_length=4)
    assert token_ids.tolist() == [[5, 6, 7, 8], [5, 6, 7, 0]]
    assert labels.tolist() == [[-100, -100, -100, 8], [-100, 6, 7, -100]]


def test_response_loss_equals_the_mean_over_response_tokens(
    tiny_config: LlamaConfig, encoded: list[EncodedRow]
) -> None:
    model = LlamaForCausalLM(tiny_config)
    rows = encoded[:5]
    token_ids, labels = fine_tune.collate(rows, max_length=512)
    loss = fine_tune.response_loss(model.model, model.lm_head.weight, token_ids, labels)
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            ids = torch.tensor([row.token_ids])
            log_probs = model(ids).logits[0, :-1].log_softmax(-1)
            picked = log_probs.gather(1, ids[0, 1:, None])[row.num_prompt_tokens - 1 :]
            total -= float(picked.sum())
            count += len(picked)
    assert float(loss.detach()) == pytest.approx(total / count, rel=1e-4)
    assert mean_loss(model, rows, responses_only=True) == pytest.approx(total / count, rel=1e-4)


def _fine_tune_settings(kind: str) -> fine_tune.FineTuneSettings:
    matrix_rate = 0.01 if kind == "full" else None
    return fine_tune.FineTuneSettings(
        max_tokens=3000, matrix_rate=matrix_rate, other_rate=1e-2, tokens_per_step=256, max_length=128
    )


def _fresh(kind: str, config: LlamaConfig) -> "LlamaForCausalLM | PeftModel":
    torch.manual_seed(0)
    base = LlamaForCausalLM(config)
    return base if kind == "full" else fine_tune.add_lora(base, "base", seed=0, rank=4)


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_resumed_fine_tune_equals_an_uninterrupted_run(
    kind: str, tiny_config: LlamaConfig, encoded: list[EncodedRow], hardware: Hardware, tmp_path: Path
) -> None:
    settings = _fine_tune_settings(kind)
    log = LossLog(tmp_path / "log.jsonl")
    whole = _fresh(kind, tiny_config)
    before = mean_loss(whole, encoded, responses_only=True)
    fine_tune.train(whole, encoded, settings, hardware, tmp_path / "whole.safetensors", log)
    # A LoRA cannot do much to a model whose embeddings are random and frozen.
    assert mean_loss(whole, encoded, responses_only=True) < before - (0.3 if kind == "full" else 0.05)
    for stop in (4, None):
        parts = _fresh(kind, tiny_config)
        fine_tune.train(
            parts, encoded, settings, hardware, tmp_path / "parts.safetensors", log, stop_after_steps=stop
        )
    torch.testing.assert_close(_parameters(parts), _parameters(whole), rtol=0, atol=0)


def test_lora_leaves_the_base_alone_and_loads_in_peft(
    tiny_config: LlamaConfig,
    encoded: list[EncodedRow],
    tokenizer: PreTrainedTokenizerFast,
    hardware: Hardware,
    tmp_path: Path,
) -> None:
    torch.manual_seed(0)
    base = LlamaForCausalLM(tiny_config)
    pretrain.save_checkpoint(base, tokenizer, tmp_path / "base")
    model = fine_tune.add_lora(load_model(tmp_path / "base", tmp_path / "base"), "base", seed=0, rank=4)
    frozen = {name: value for name, value in _parameters(model).items() if "lora_" not in name}
    fine_tune.train(
        model,
        encoded,
        _fine_tune_settings("lora"),
        hardware,
        tmp_path / "state",
        LossLog(tmp_path / "log.jsonl"),
    )
    torch.testing.assert_close(
        {name: value for name, value in _parameters(model).items() if name in frozen}, frozen
    )

    fine_tune.save_fine_tune(model, tokenizer, tmp_path / "code")
    assert sorted(path.name for path in (tmp_path / "code").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "code" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base"
    assert sorted(config["target_modules"]) == sorted(fine_tune.LORA_MODULES)
    weights = load_file(tmp_path / "code" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}

    loaded = load_model(tmp_path / "code", tmp_path / "base")
    ids = torch.tensor([encoded[0].token_ids])
    with torch.no_grad():
        adapted = loaded.eval()(ids).logits
        merged = loaded.merge_and_unload()(ids).logits
        plain = load_model(tmp_path / "base", tmp_path / "base")(ids).logits
    torch.testing.assert_close(merged, adapted, rtol=1e-4, atol=1e-4)
    assert (adapted - plain).abs().max() > 0.1


def test_greedy_answers_do_not_depend_on_the_batch(
    tiny_config: LlamaConfig, tokenizer: PreTrainedTokenizerFast
) -> None:
    torch.manual_seed(1)
    model = LlamaForCausalLM(tiny_config)
    prompts = ["the sum of two numbers is", "a", "return the value of the blood"]
    together = greedy_answers(model, tokenizer, prompts, max_new_tokens=6)
    alone = [greedy_answers(model, tokenizer, [prompt], max_new_tokens=6)[0] for prompt in prompts]
    assert together == alone


def test_loops_are_runs_that_occur_three_times() -> None:
    assert loops([1, 2, 3, 4, 5, 6, 7, 8] * 3)
    assert loops([7] * 10)
    assert not loops([1, 2, 3, 4, 5, 6, 7, 8] * 2)
    assert not loops(list(range(100)))
