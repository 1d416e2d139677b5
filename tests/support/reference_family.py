"""A tiny random family (base, two LoRA fine-tunes, one full fine-tune, a draft) with transformers as its reference."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor

from eda.backends.loading import load_fine_tune, load_target
from eda.models.draft import DraftConfig, DraftModel
from eda.models.fine_tune import FineTune
from eda.models.target import TargetModel

VOCAB_SIZE = 96
DRAFT_VOCAB_SIZE = 60


@dataclass
class Family:
    paths: dict[str, Path]
    base: TargetModel
    fine_tunes: dict[str, FineTune]
    draft: DraftModel
    vocab_size: int = VOCAB_SIZE

    def _load_reference(self, model: str, dtype: torch.dtype) -> Any:
        path = self.paths[model]
        if (path / "adapter_config.json").exists():
            base = transformers.AutoModelForCausalLM.from_pretrained(self.paths["base"], dtype=dtype)
            return peft.PeftModel.from_pretrained(base, path).eval()
        return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()

    def reference_model(self, model: str, dtype: torch.dtype = torch.float32) -> Any:
        """The same weights in transformers or peft."""
        key = (model, dtype)
        if key not in _REFERENCES.setdefault(id(self), {}):
            _REFERENCES[id(self)][key] = self._load_reference(model, dtype)
        return _REFERENCES[id(self)][key]

    @torch.no_grad()
    def references(self, model: str, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
        """Greedy continuations by ``generate``; none is shorter than ``max_tokens`` since there is no end token.

        Prompts of one length share a call, so that nothing is padded.
        """
        outputs: dict[int, list[int]] = {}
        for length in {len(prompt) for prompt in prompts}:
            places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
            batch = torch.tensor([prompts[place] for place in places])
            generated = self.reference_model(model).generate(
                input_ids=batch,
                attention_mask=torch.ones_like(batch),
                max_new_tokens=max_tokens,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
            )
            outputs |= dict(zip(places, generated[:, length:].tolist(), strict=True))
        return [outputs[place] for place in range(len(prompts))]

    @torch.no_grad()
    def reference_logits(
        self, model: str, token_ids: list[int], dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Float32 ``[len(token_ids), vocab_size]``."""
        return self.reference_model(model, dtype)(torch.tensor([token_ids])).logits[0].float()  # type: ignore[no-any-return]


_REFERENCES: dict[int, dict[tuple[str, torch.dtype], Any]] = {}


def _random_llama(seed: int) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,  # large, so that the greedy text depends on the prompt
    )
    return transformers.LlamaForCausalLM(config)


def _random_lora(base_path: Path, path: Path, seed: int, targets: list[str]) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(base_path)
    torch.manual_seed(seed)
    model = peft.get_peft_model(base, peft.LoraConfig(r=4, lora_alpha=16, target_modules=targets))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.2)
    model.save_pretrained(path, save_embedding_layers=False)


def make_family(directory: Path, *, seed: int = 0) -> Family:
    """Writes the family below ``directory`` and loads it in float32."""
    paths = {name: directory / name for name in ("base", "math", "code", "medical", "draft")}
    _random_llama(seed).save_pretrained(paths["base"])
    _random_llama(seed + 1).save_pretrained(paths["math"])
    _random_lora(paths["base"], paths["code"], seed + 2, ["q_proj", "v_proj", "down_proj"])
    _random_lora(
        paths["base"], paths["medical"], seed + 3, ["k_proj", "o_proj", "gate_proj", "up_proj", "lm_head"]
    )
    base = load_target(paths["base"], weights="float32")
    config = DraftConfig(
        hidden_size=32,
        intermediate_size=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        tap_layers=(0, 1, 3),
        vocab_size=VOCAB_SIZE,
        draft_vocab_size=DRAFT_VOCAB_SIZE,
        max_position_embeddings=256,
        target_fingerprint=base.fingerprint,
    )
    chosen = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(seed))[:DRAFT_VOCAB_SIZE]
    DraftModel.initialised(config, chosen.sort().values, seed=seed).save(paths["draft"])
    fine_tunes = {"base": FineTune("base", base)}
    fine_tunes |= {name: load_fine_tune(paths[name], base, name) for name in ("math", "code", "medical")}
    return Family(paths, base, fine_tunes, DraftModel.load(paths["draft"]))
