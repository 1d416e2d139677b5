"""Errors of the computing layer.

    EdaError
    ├── CheckpointError                 a model directory that cannot be used
    │   ├── UnsupportedModelError       an architecture or adapter kind that is not implemented
    │   └── MismatchError               parts that were not made for each other
    ├── NonFiniteLogitsError            a target that computes NaN or infinities
    ├── CacheFullError                  a sequence that does not fit into the key/value cache
    ├── DataError                       training or prompt data that cannot be read
    └── TrainingError                   training that had to stop

Each message names what was given, its value, and what would be right.
"""


class EdaError(Exception):
    """Root of all errors that this package raises on purpose."""


class CheckpointError(EdaError):
    """A model directory that is missing, incomplete, misshapen or in an unsafe format."""


class UnsupportedModelError(CheckpointError):
    """A model architecture, rope type or adapter kind that is not implemented."""


class MismatchError(CheckpointError):
    """Two parts that do not belong together: fingerprints, shapes or vocabularies differ."""


class NonFiniteLogitsError(EdaError):
    """The target's logits at some place are not finite: no token can be chosen there."""


class CacheFullError(EdaError):
    """The key/value cache has no room for the sequence."""


class DataError(EdaError):
    """Prompts or training samples that are unreadable, empty or malformed."""


class TrainingError(EdaError):
    """Training stopped: a loss was not finite, or there was nothing to train on."""
