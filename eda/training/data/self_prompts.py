"""Prompts that the fine-tune writes for itself: sampled from the bare beginning of a chat (Magpie, arXiv 2406.08464).

A chat model that is given only the opening of a user's turn goes on with what users of its training data asked.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from eda.decoder import SpeculativeDecoder
from eda.errors import DataError, TrainingError
from eda.formats.json_files import parse_json
from eda.generation import Generation, GenerationRequest, generate
from eda.models.fine_tune import FineTune
from eda.sampling.params import SamplingParams
from eda.speculation.kinds import Off
from eda.training.data.prompts import ChatFormat, Prompt
from eda.training.files import LineWriter, read_json_if_present, write_json
from eda.training.progress import (
    OnProgress,
    ProgressEvent,
    ShouldStop,
    StageStoppedError,
    ignore_progress,
    never_stop,
)

ATTEMPTS_FILE = "attempts.jsonl"
SETTINGS_FILE = "self-prompts.json"
_ATTEMPTS_PER_PROMPT = 5
"""A fine-tune that writes fewer usable prompts than one in this many attempts is not asked further."""


@dataclass(frozen=True, slots=True)
class SelfPromptConfig:
    """How prompts are sampled.

    Attributes:
        max_tokens: length of a prompt, at most; longer ones are cut off and dropped.
        min_words: shorter ones are dropped.
        batch_size: prompts that are sampled at the same time.
    """

    max_tokens: int = 128
    min_words: int = 3
    temperature: float = 1.0
    top_p: float = 0.99
    batch_size: int = 32
    seed: int = 0


def write_own_prompts(
    decoder: SpeculativeDecoder,
    fine_tune: FineTune,
    chat: ChatFormat,
    count: int,
    directory: Path,
    config: SelfPromptConfig,
    *,
    on_progress: OnProgress = ignore_progress,
    should_stop: ShouldStop = never_stop,
) -> list[Prompt]:
    """``count`` distinct prompts, or fewer when the fine-tune repeats itself. Every attempt is kept in ``directory``.

    Each attempt has its own seed, so an interrupted call goes on and gives the same prompts.

    Raises:
        DataError: no attempt gave a usable prompt.
        TrainingError: ``directory`` holds attempts with other settings.
        StageStoppedError: ``should_stop`` said so.
    """
    settings = {"config": asdict(config), "fine_tune": fine_tune.fingerprint}
    present = read_json_if_present(directory / SETTINGS_FILE)
    if present is not None and present != settings:
        raise TrainingError(f"{directory} holds prompts that were sampled with other settings; remove it")
    write_json(directory / SETTINGS_FILE, settings)
    prefix = chat.user_prefix_ids()
    path = directory / ATTEMPTS_FILE
    with LineWriter(path) as writer:
        texts = _read_attempts(path)
        prompts = _distinct(texts, config.min_words)
        while len(prompts) < count and len(texts) < _ATTEMPTS_PER_PROMPT * count + config.batch_size:
            if should_stop():
                raise StageStoppedError(f"stopped after {len(prompts)} of {count} prompts")
            first = len(texts)
            requests = [_request(prefix, chat, config, first + number) for number in range(config.batch_size)]
            made = generate(decoder, fine_tune, requests, max_batch=config.batch_size)
            for generation in made:
                texts.append(_text(generation, chat))
                writer.write({"text": texts[-1]})
            prompts = _distinct(texts, config.min_words)
            on_progress(ProgressEvent("regenerate", min(len(prompts), count), count, "writing prompts"))
    if not prompts:
        raise DataError(f"{len(texts)} attempts gave no usable prompt; give prompts in a file instead")
    return [
        Prompt(f"self-{number}", ({"role": "user", "content": text},))
        for number, text in enumerate(prompts[:count])
    ]


def _request(
    prefix: Sequence[int], chat: ChatFormat, config: SelfPromptConfig, attempt: int
) -> GenerationRequest:
    sampling = SamplingParams(
        temperature=config.temperature, top_p=config.top_p, seed=config.seed * 1_000_003 + attempt
    )
    return GenerationRequest(prefix, config.max_tokens, chat.eos_ids, sampling, Off())


def _text(generation: Generation, chat: ChatFormat) -> str:
    """The prompt; empty when it did not come to an end."""
    return chat.decode(generation.token_ids).strip() if generation.finish_reason == "stop" else ""


def _distinct(texts: Sequence[str], min_words: int) -> list[str]:
    """Usable texts in their order, without those that differ from an earlier one in case or punctuation only."""
    seen: dict[str, str] = {}
    for text in texts:
        words = re.findall(r"\w+", text.lower())
        if len(words) >= min_words and len(set(words)) > len(words) // 4:  # the second: no stuttering
            seen.setdefault(" ".join(words), text)
    return list(seen.values())


def _read_attempts(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # splitlines() would also cut inside a text
        return [str(parse_json(line.encode())["text"]) for line in lines if line]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
