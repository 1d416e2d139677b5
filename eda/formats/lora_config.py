"""What ``adapter_config.json`` of a PEFT LoRA says, field by field; patterns in it are matched in bounded time."""

import math
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import regex

from eda.errors import CheckpointError, UnsupportedModelError
from eda.formats.checkpoint_files import ADAPTER_CONFIG_FILE, read_json

MAX_RANK = 65_536
MAX_PATTERNS = 100_000
MAX_PATTERN_LENGTH = 512
MATCH_SECONDS = 2.0
"""For all patterns of one adapter together."""
# Names of modules as most files give them: dots in them mean dots.
_PLAIN = re.compile(r"[\w.-]+")
# Kinds of LoRA that compute something else than W x + B A x; their switches are off, empty or absent in a plain one.
_REFUSED_SWITCHES = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "block-diagonal LoRA",
    "lora_bias": "LoRA with a bias on B",
    "fan_in_fan_out": "transposed weights (fan_in_fan_out)",
    "alora_invocation_tokens": "activated LoRA",
    "arrow_config": "Arrow routing",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
    "layer_replication": "layer replication",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trained token rows (trainable_token_indices)",
}
# Other initialisations (pissa, olora, corda, loftq, ...) also change the base's weights.
_INITIALISATIONS = (True, False, "gaussian", "eva", "orthogonal", None)
ALL_LINEAR = "all-linear"


class ModulePatterns:
    """Which of a few names of modules match, as PEFT matches them: at the end of a module's path, behind a dot.

    A pattern comes from a file and may be any regular expression, so time for all of them together is limited.
    """

    def __init__(self, place: str, patterns: Sequence[str]) -> None:
        """Raises ``CheckpointError``, as ``first`` does, for an invalid pattern and when time is up."""
        self._place = place
        self._seconds_left = MATCH_SECONDS
        self._names: dict[str, int] = {}
        self._expressions: list[tuple[int, Any]] = []
        for number, pattern in enumerate(patterns):
            if _PLAIN.fullmatch(pattern):
                self._names.setdefault(pattern, number)
            else:
                with self._timed(pattern):
                    self._expressions.append((number, self._compiled(pattern)))

    def first(self, module: str) -> int | None:
        """The number of the first pattern that matches."""
        parts = module.split(".")
        ends = (".".join(parts[start:]) for start in range(len(parts)))
        found = min((self._names[end] for end in ends if end in self._names), default=None)
        for number, expression in self._expressions:
            if found is not None and found < number:
                break
            with self._timed(expression.pattern):
                # The other threads go on meanwhile.
                if expression.match(module, timeout=self._seconds_left, concurrent=True):
                    return number
        return found

    def _compiled(self, pattern: str) -> Any:
        if len(pattern) > MAX_PATTERN_LENGTH:
            raise CheckpointError(
                f"{self._place} has a pattern of {len(pattern)} characters; at most {MAX_PATTERN_LENGTH} are read"
            )
        try:
            re.compile(pattern)  # what PEFT itself would take; the other package knows more
            return regex.compile(rf"(?:.*\.)?(?:{pattern})$")
        except (re.error, regex.error, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"{self._place} has an invalid pattern {pattern[:80]!r}: {error}"
            ) from error

    @contextmanager
    def _timed(self, pattern: str) -> Iterator[None]:
        start = time.perf_counter()
        with suppress(TimeoutError):
            yield
        self._seconds_left -= time.perf_counter() - start
        if self._seconds_left <= 0:
            raise CheckpointError(
                f"{self._place} has patterns that take too long to match, {pattern[:80]!r} for one; name the modules "
                "instead"
            )


@dataclass(frozen=True, slots=True, eq=False)
class LoraConfig:
    """The part of the configuration that decides what the adapter computes."""

    path: Path
    """The adapter's directory."""
    rank: int
    alpha: float
    use_rslora: bool
    ranks: tuple[ModulePatterns, tuple[int, ...]]
    """``rank_pattern``: ranks of modules that differ."""
    alphas: tuple[ModulePatterns, tuple[float, ...]]
    target_modules: ModulePatterns | None
    """Modules that have a LoRA; ``None`` where the file leaves it open. For ``is_all_linear``, all projections have."""
    is_all_linear: bool
    exclude_modules: ModulePatterns
    layers_to_transform: frozenset[int] | None
    modules_to_save: tuple[str, ...]
    base_path: str | None
    """``base_model_name_or_path``."""

    @classmethod
    def from_directory(cls, path: Path) -> Self:
        """Reads and checks ``adapter_config.json``.

        Raises:
            CheckpointError: unreadable, or a field has a value that cannot be meant.
            UnsupportedModelError: another PEFT method than plain LoRA.
        """
        raw = read_json(path / ADAPTER_CONFIG_FILE)
        _refuse_other_kinds(raw, path)
        place = str(path / ADAPTER_CONFIG_FILE)
        layers = raw.get("layers_to_transform")
        if isinstance(layers, int):
            layers = [layers]
        if layers is not None and not (isinstance(layers, list) and all(type(n) is int for n in layers)):
            raise CheckpointError(
                f"{place}: layers_to_transform is {_shown(layers)}; whole numbers are needed"
            )
        if raw.get("layers_pattern") not in (None, "", [], "layers", ["layers"]):
            raise UnsupportedModelError(
                f"{place}: layers_pattern is {_shown(raw['layers_pattern'])}; supported models call their "
                "layers 'layers'"
            )
        targets = raw.get("target_modules")
        base = raw.get("base_model_name_or_path")
        return cls(
            path,
            _rank(raw.get("r", 8), "r", place),
            _alpha(raw.get("lora_alpha", 8), "lora_alpha", place),
            bool(raw.get("use_rslora")),
            _patterns(raw, "rank_pattern", place, _rank),
            _patterns(raw, "alpha_pattern", place, _alpha),
            None if targets in (None, ALL_LINEAR) else _modules(targets, "target_modules", place),
            targets == ALL_LINEAR,
            _modules(raw.get("exclude_modules") or [], "exclude_modules", place),
            frozenset(layers) if layers else None,
            tuple(_names(raw.get("modules_to_save") or [], "modules_to_save", place)),
            base if isinstance(base, str) and "\x00" not in base else None,
        )

    def rank_and_scale(self, module: str) -> tuple[int, float]:
        """The rank of a module's LoRA, and the factor on its product."""
        rank = self._value(self.ranks, module, self.rank)
        alpha = self._value(self.alphas, module, self.alpha)
        return rank, alpha / (math.sqrt(rank) if self.use_rslora else rank)

    @staticmethod
    def _value(table: tuple[ModulePatterns, tuple[Any, ...]], module: str, default: Any) -> Any:
        patterns, values = table
        place = patterns.first(module)
        return default if place is None else values[place]

    def adapts(self, module: str, layer: int | None) -> bool:
        """Whether the module, of ``layer`` or of none, is one that has a LoRA by this configuration."""
        if (
            layer is not None
            and self.layers_to_transform is not None
            and layer not in self.layers_to_transform
        ):
            return False
        if self.exclude_modules.first(module) is not None:
            return False
        if self.is_all_linear:
            return layer is not None
        return self.target_modules is not None and self.target_modules.first(module) is not None


def _refuse_other_kinds(raw: Mapping[str, Any], path: Path) -> None:
    kind = raw.get("peft_type")
    if kind != "LORA":
        raise UnsupportedModelError(f"{path} is a PEFT adapter of type {_shown(kind)}; supported is LORA")
    for field, name in _REFUSED_SWITCHES.items():
        if raw.get(field):
            raise UnsupportedModelError(f"{path} is {name} ({field} is set); supported is plain LoRA")
    if raw.get("bias", "none") != "none":
        raise UnsupportedModelError(
            f"{path} trains biases (bias={_shown(raw['bias'])}); supported is bias='none'"
        )
    if raw.get("init_lora_weights", True) not in _INITIALISATIONS:
        raise UnsupportedModelError(
            f"{path} was initialised with {_shown(raw['init_lora_weights'])}, which changes the base's weights too; "
            "convert it to a plain LoRA with PEFT's path_initial_model_for_weight_conversion"
        )


def _rank(value: Any, field: str, place: str) -> int:
    if type(value) is not int or not 1 <= value <= MAX_RANK:
        raise CheckpointError(
            f"{place}: rank {_shown(value)} ({field}); a whole number from 1 to {MAX_RANK} is needed"
        )
    return value


def _alpha(value: Any, field: str, place: str) -> float:
    if type(value) not in (int, float) or not abs(value) <= 1e9:
        raise CheckpointError(
            f"{place}: alpha {_shown(value)} ({field}); a number of a magnitude up to 1e9 is needed"
        )
    return float(value)


def _patterns(raw: Mapping[str, Any], field: str, place: str, check: Any) -> tuple[ModulePatterns, Any]:
    given = raw.get(field) or {}
    if not isinstance(given, dict) or len(given) > MAX_PATTERNS:
        raise CheckpointError(
            f"{place}: {field} is a JSON {type(given).__name__} of {_length(given)} entries; an object of at most "
            f"{MAX_PATTERNS} is needed"
        )
    values = tuple(check(value, f"{field} of {key[:80]!r}", place) for key, value in given.items())
    return ModulePatterns(f"{place}: {field}", list(given)), values


def _modules(given: Any, field: str, place: str) -> ModulePatterns:
    """One pattern where a string is given, else names."""
    if isinstance(given, str):
        return ModulePatterns(f"{place}: {field}", [given])
    return ModulePatterns(f"{place}: {field}", _names(given, field, place))


def _names(given: Any, field: str, place: str) -> list[str]:
    if (
        not isinstance(given, list)
        or len(given) > MAX_PATTERNS
        or not all(isinstance(name, str) and _PLAIN.fullmatch(name) for name in given)
    ):
        raise CheckpointError(f"{place}: {field} is {_shown(given)}; a list of names of modules is needed")
    return given


def _length(given: Any) -> int:
    return len(given) if hasattr(given, "__len__") else 1


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
