"""The guard: watches what adapters achieve in service and says when one does harm.

A small share of each adapter's requests runs with the shared draft alone. Outputs are the same either way, so this
costs a little speed and nothing else, and it gives a baseline on the same traffic at the same time. A version whose
acceptance length stays below that baseline is to be rolled back; any model whose acceptance length sits near 1 gets
an alarm, because a draft that is never right is usually a broken one.
"""

import math
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class GuardSettings:
    """When the guard acts.

    Attributes:
        baseline_share: share of an adapter's requests that are measured without it, 0 to 0.5; 0 turns rollback off.
        window: requests that a rolling figure covers.
        min_passes: target passes that each side needs before they are compared.
        patience_seconds: how long a version must be worse without a break.
        confidence: standard errors by which it must be worse. It is compared again and again, so two would be too few.
        tolerance: share of the baseline by which it must be worse besides.
        alarm_below: acceptance length (tokens per target pass, the bonus token included) that counts as near 1.
    """

    baseline_share: float = 0.02
    window: int = 512
    min_passes: int = 400
    patience_seconds: float = 30.0
    confidence: float = 3.0
    tolerance: float = 0.02
    alarm_below: float = 1.05

    def __post_init__(self) -> None:
        if not 0.0 <= self.baseline_share <= 0.5:
            raise ValueError(f"baseline_share is {self.baseline_share}; it must be from 0 to 0.5")


@dataclass(frozen=True, slots=True)
class LiveAcceptance:
    """A rolling acceptance length: tokens emitted per target pass.

    ``standard_error`` is of the mean over requests, ``None`` for fewer than two of them.
    """

    mean_acceptance_length: float
    num_passes: int
    num_requests: int
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class GuardVerdict:
    """What the guard found. ``version`` is ``None`` for the shared draft alone."""

    kind: Literal["roll_back", "alarm"]
    model: str
    version: int | None
    reason: str


class RollingAcceptance:
    """Passes and tokens of the last ``window`` requests."""

    def __init__(self, window: int) -> None:
        self._requests: deque[tuple[int, int]] = deque(maxlen=window)

    def add(self, num_passes: int, num_emitted: int) -> None:
        self._requests.append((num_passes, num_emitted))

    def measure(self) -> LiveAcceptance | None:
        """``None`` before the first request."""
        if not self._requests:
            return None
        passes = sum(request[0] for request in self._requests)
        mean = sum(request[1] for request in self._requests) / passes
        count = len(self._requests)
        error = None
        if count >= 2:
            # A ratio of sums: requests are independent, the tokens of one request are not.
            residuals = sum((emitted - mean * n) ** 2 for n, emitted in self._requests)
            error = math.sqrt(residuals * count / (count - 1)) / passes
        return LiveAcceptance(mean, passes, count, error)


class Guard:
    """Collects acceptance per model and adapter version. Safe to use from several threads; ``observe`` is quick."""

    def __init__(
        self, settings: GuardSettings | None = None, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings = settings or GuardSettings()
        self._clock = clock
        self._lock = threading.Lock()
        self._figures: dict[tuple[str, int | None], RollingAcceptance] = {}
        self._num_requests: dict[str, int] = {}
        self._worse_since: dict[tuple[str, int], float] = {}
        self._alarmed: set[tuple[str, int | None]] = set()

    def takes_baseline(self, model: str) -> bool:
        """Whether the next request of ``model`` is to run without its adapter. Spread evenly, by counting."""
        with self._lock:
            count = self._num_requests.get(model, 0) + 1
            self._num_requests[model] = count
        share = self.settings.baseline_share
        return math.floor(count * share) > math.floor((count - 1) * share)

    def observe(self, model: str, version: int | None, num_passes: int, num_emitted: int) -> None:
        """A request that ran with ``version``, or with the shared draft alone for ``None``.

        ``num_emitted`` tokens came of ``num_passes`` decoding passes of the target.
        """
        if num_passes < 1:
            return
        with self._lock:
            key = (model, version)
            if key not in self._figures:
                self._figures[key] = RollingAcceptance(self.settings.window)
            self._figures[key].add(num_passes, num_emitted)

    def live(self, model: str, version: int | None) -> LiveAcceptance | None:
        """The rolling figure of a version (``None``: of the shared draft alone)."""
        with self._lock:
            figure = self._figures.get((model, version))
            return figure.measure() if figure else None

    def begin(self, model: str, version: int) -> None:
        """``version`` is in service again although it was rolled back: it is judged by what it does from now on."""
        with self._lock:
            self._figures.pop((model, version), None)
            self._worse_since.pop((model, version), None)

    def forget(self, model: str) -> None:
        """Drops everything about ``model``."""
        with self._lock:
            self._num_requests.pop(model, None)
            self._alarmed = {key for key in self._alarmed if key[0] != model}
            for table in (self._figures, self._worse_since):
                for key in [key for key in table if key[0] == model]:
                    del table[key]  # type: ignore[arg-type]

    def alarmed(self) -> set[tuple[str, int | None]]:
        """Models and versions whose acceptance length is near 1 now."""
        with self._lock:
            return set(self._alarmed)

    def verdicts(self, active: dict[str, int | None]) -> list[GuardVerdict]:
        """What is to be done about the ``active`` versions, by model. To be called about once a second."""
        found: list[GuardVerdict] = []
        for model, version in active.items():
            if version is not None and (reason := self._is_harmful(model, version)):
                found.append(GuardVerdict("roll_back", model, version, reason))
            if reason := self._is_new_alarm(model, version):
                found.append(GuardVerdict("alarm", model, version, reason))
        return found

    def _is_harmful(self, model: str, version: int) -> str | None:
        settings, key = self.settings, (model, version)
        adapted, baseline = self.live(model, version), self.live(model, None)
        if (
            adapted is None
            or baseline is None
            or min(adapted.num_passes, baseline.num_passes) < settings.min_passes
            or adapted.standard_error is None
            or baseline.standard_error is None
        ):
            return None
        margin = settings.confidence * math.hypot(adapted.standard_error, baseline.standard_error)
        margin = max(margin, settings.tolerance * baseline.mean_acceptance_length)
        now = self._clock()
        with self._lock:
            if adapted.mean_acceptance_length + margin >= baseline.mean_acceptance_length:
                self._worse_since.pop(key, None)
                return None
            since = self._worse_since.setdefault(key, now)
        if now - since < settings.patience_seconds:
            return None
        return (
            f"live acceptance length {adapted.mean_acceptance_length:.3f} over {adapted.num_passes} passes against "
            f"{baseline.mean_acceptance_length:.3f} of the shared draft alone over {baseline.num_passes}, "
            f"for {now - since:.0f} s"
        )

    def _is_new_alarm(self, model: str, version: int | None) -> str | None:
        live, key = self.live(model, version), (model, version)
        is_near_one = (
            live is not None
            and live.num_passes >= self.settings.min_passes
            and live.mean_acceptance_length < self.settings.alarm_below
        )
        with self._lock:
            if not is_near_one:
                self._alarmed.discard(key)
                return None
            if key in self._alarmed:
                return None
            self._alarmed.add(key)
        assert live is not None
        return (
            f"live acceptance length is {live.mean_acceptance_length:.3f} over {live.num_passes} passes: the draft is "
            "almost never right; is it broken, or made for other weights?"
        )
