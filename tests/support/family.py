"""A tiny random family on disk: a target, a draft, two LoRA fine-tunes and a full one, with a byte-level tokenizer."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from eda.backends.loading import load_fine_tune, load_target
from eda.formats.tokenizer import TextTokenizer
from eda.formats.tokenizer_files import load_tokenizer
from eda.models.draft import DraftConfig, DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule
from eda.models.target import TargetModel

transformers_logging.disable_progress_bar()

SPECIAL_TOKENS = ["<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
MAX_LENGTH = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
TEXT = [
    "the quick brown fox jumps over the lazy dog",
    "Wörter und Zeichen: ä ö ü € 漢字 🙂",
    "1 + 2 = 3, and so on. ",
]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", chat_template=CHAT_TEMPLATE
    )


def save_target(directory: Path, seed: int) -> None:
    """A Llama of about 50,000 parameters. Large weights make its greedy output vary instead of repeating itself."""
    torch.manual_seed(seed)
    tokenizer = tiny_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        initializer_range=0.3,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def save_lora(directory: Path, seed: int) -> None:
    directory.mkdir(parents=True)
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(4):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        weights[f"{prefix}.lora_A.weight"] = torch.randn(4, 32, generator=generator)
        weights[f"{prefix}.lora_B.weight"] = torch.randn(32, 4, generator=generator)
    save_file(weights, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": ["q_proj"],
        "bias": "none",
        "base_model_name_or_path": "",
    }
    (directory / "adapter_config.json").write_text(json.dumps(config), encoding="utf-8")


def save_family(directory: Path) -> Path:
    """The layout of ``models/``: base, draft, and one directory for each fine-tune."""
    save_target(directory / "base", seed=1)
    save_lora(directory / "math", seed=2)
    save_lora(directory / "code", seed=3)
    save_target(directory / "full", seed=4)
    target = load_target(directory / "base", weights="float32")
    vocab_size = target.config.vocab_size
    config = DraftConfig(
        hidden_size=32,
        intermediate_size=64,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        tap_layers=(0, 1, 3),
        vocab_size=vocab_size,
        draft_vocab_size=vocab_size - 20,
        max_position_embeddings=MAX_LENGTH,
        target_fingerprint=target.fingerprint,
    )
    DraftModel.initialised(config, torch.arange(20, vocab_size)).save(directory / "draft")
    return directory


def random_private(draft: DraftModel, seed: int) -> PrivateModule:
    """A private module that proposes nonsense: outputs must not depend on it."""
    module = PrivateModule(draft.config.private_config(16, 2))
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.5, generator=generator)
    return module.requires_grad_(False)


@dataclass
class Family:
    """The loaded family, in float32."""

    directory: Path
    target: TargetModel
    draft: DraftModel
    fine_tunes: dict[str, FineTune]
    privates: dict[str, PrivateModule]
    tokenizer: TextTokenizer

    @classmethod
    def load(cls, directory: Path) -> "Family":
        target = load_target(directory / "base", weights="float32")
        draft = DraftModel.load(directory / "draft")
        fine_tunes = {"base": FineTune("base", target)}
        for name in ("math", "code", "full"):
            fine_tunes[name] = load_fine_tune(directory / name, target, name)
        privates = {
            "math": random_private(draft, 1),
            "code": random_private(draft, 2),
            "full": random_private(draft, 3),
        }
        return cls(directory, target, draft, fine_tunes, privates, load_tokenizer(directory / "base"))
