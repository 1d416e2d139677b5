"""Samples to learn from: a prompt and an answer as token ids, one JSON line each."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from eda.errors import DataError
from eda.formats.json_files import parse_json
from eda.training.files import write_bytes_atomically

SAMPLES_FILE = "samples.jsonl"


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation that the draft learns from.

    Attributes:
        id: of the prompt.
        temperature: that the answer was drawn at; 0 is greedy.
        finish_reason: "stop" when the answer ends with an end-of-turn token, "length" when it was cut.
    """

    id: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    temperature: float = 0.0
    finish_reason: str = "stop"

    @property
    def length(self) -> int:
        return len(self.prompt_ids) + len(self.response_ids)

    @property
    def num_roots(self) -> int:
        """Positions from which the decoder would draft a token of this answer.

        The target gives the answer's first token itself, so the last prompt position is the first root; the last
        root is the one whose first draft token is the answer's last.
        """
        return max(len(self.response_ids) - 1, 0)


def read_samples(path: Path) -> list[Sample]:
    """Reads JSON lines written by ``regenerate``; a half-written last line is passed over.

    Raises ``DataError`` when another line is malformed (its number is named); a missing file holds no samples.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} cannot be read: {error}") from error
    samples = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last line feed was cut off
        try:
            row = parse_json(line.encode())
            samples.append(
                Sample(
                    str(row["id"]),
                    tuple(map(int, row["prompt_ids"])),
                    tuple(map(int, row["response_ids"])),
                    float(row["temperature"]),
                    str(row["finish_reason"]),
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}, line {number} is no sample: {error}") from error
    return samples


def write_samples(path: Path, samples: Iterable[Sample]) -> None:
    """Writes all samples atomically."""
    text = "".join(json.dumps(asdict(sample)) + "\n" for sample in samples)
    write_bytes_atomically(path, text.encode("utf-8"))
