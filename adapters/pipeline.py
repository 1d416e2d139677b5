"""One adaptation from start to end: triage -> regenerate -> select -> train -> evaluate -> publish.

``run_adaptation`` knows the order and what is finished; what a stage computes is behind ``AdaptationStages``. A marker
file is written after each stage, atomically, with the stage's result. A job that is killed and run again skips what
has a marker and enters the next stage anew, which goes on from its own files in the workspace (samples appended so
far, the last checkpoint).
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from adapters.errors import JobInterruptedError
from adapters.files import locked_or_raise, write_json_atomically
from adapters.spec import STAGES, AdaptationSpec

STAGE_WEIGHTS = {
    "triage": 0.05,
    "regenerate": 0.40,
    "select": 0.05,
    "train": 0.38,
    "evaluate": 0.10,
    "publish": 0.02,
}
"""Usual share of each stage in a job's time; they add up to 1."""

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class StageEvent:
    """Something to show while a job runs.

    Attributes:
        kind: "stage_started", "progress", "metric", "message" or "stage_finished".
        fraction: share of the stage that is done, 0 to 1.
        done, total: units of work (answers, steps, prompts) of the present part of the stage; 0 of 0 when not counted.
        data: numbers for "metric" (step, loss, acceptance length ...), the result for "stage_finished".
    """

    kind: str
    stage: str
    fraction: float = 0.0
    message: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)
    done: int = 0
    total: int = 0


@dataclass(frozen=True, slots=True)
class StageContext:
    """What a stage gets.

    Attributes:
        workspace: the job's directory; stages share files there and find them again after a crash.
        results: of the stages before this one.
        should_stop: to be asked often (at least once a second); when true, save what there is and return or raise.
    """

    stage: str
    spec: AdaptationSpec
    workspace: Path
    results: Mapping[str, Result]
    on_event: Callable[[StageEvent], None]
    should_stop: Callable[[], bool]

    def progress(
        self, done: int, total: int, message: str = "", part: tuple[float, float] = (0.0, 1.0)
    ) -> None:
        """Reports ``done`` of ``total`` units of work, which are ``part`` (from, to) of the stage."""
        start, end = part
        fraction = start + (end - start) * (min(done / total, 1.0) if total > 0 else 0.0)
        self.on_event(StageEvent("progress", self.stage, fraction, message, done=done, total=total))

    def metric(self, **numbers: float) -> None:
        """Reports a point of a curve, for instance ``metric(step=10, loss=1.2)``."""
        self.on_event(StageEvent("metric", self.stage, data=numbers))

    def message(self, text: str) -> None:
        self.on_event(StageEvent("message", self.stage, message=text))


class AdaptationStages(Protocol):
    """One method per stage. Each returns a small JSON object, kept in its marker.

    Keys that the pipeline reads:
        triage: ``worthwhile`` (bool) and ``reason``.
        evaluate: ``before`` and ``after``, each with ``mean_acceptance_length``; ``incumbent`` likewise or ``None``.
        publish: ``version`` (int).
    """

    def triage(self, context: StageContext) -> Result: ...
    def regenerate(self, context: StageContext) -> Result: ...
    def select(self, context: StageContext) -> Result: ...
    def train(self, context: StageContext) -> Result: ...
    def evaluate(self, context: StageContext) -> Result: ...
    def publish(self, context: StageContext) -> Result: ...


@dataclass(frozen=True, slots=True)
class AdaptationResult:
    """How an adaptation ended.

    Attributes:
        version: that was published; ``None`` when triage found that it is not worth training.
        activate: whether the version should be served now; ``reason`` says why, or why there is none.
        metrics: "before", "after" and, if another version was active, "incumbent".
    """

    version: int | None
    activate: bool
    reason: str
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> Result:
        return {"version": self.version, "reason": self.reason, "metrics": dict(self.metrics)}


def run_adaptation(
    spec: AdaptationSpec,
    workspace: Path,
    stages: AdaptationStages,
    on_event: Callable[[StageEvent], None] = lambda event: None,
    should_stop: Callable[[], bool] = lambda: False,
) -> AdaptationResult:
    """Runs or resumes the adaptation whose files are in ``workspace``.

    Raises:
        JobInterruptedError: ``should_stop`` said so; a later call goes on from there.
        TimeoutError: another process works in ``workspace``.
        EdaError: whatever a stage raises for data or weights that cannot be used.
    """
    with locked_or_raise(workspace / ".lock", timeout=10.0, purpose="the job's workspace"):
        results: dict[str, Result] = {}
        for name in STAGES:
            results[name] = _run_stage(name, spec, workspace, stages, results, on_event, should_stop)
            if name == "triage" and not results[name].get("worthwhile", True):
                return AdaptationResult(None, activate=False, reason=str(results[name].get("reason", "")))
        return _conclude(spec, results)


def _run_stage(
    name: str,
    spec: AdaptationSpec,
    workspace: Path,
    stages: AdaptationStages,
    results: Mapping[str, Result],
    on_event: Callable[[StageEvent], None],
    should_stop: Callable[[], bool],
) -> Result:
    marker = workspace / "stages" / f"{name}.json"
    finished = _read_marker(marker, spec)
    if finished is not None:
        return finished
    if should_stop():
        raise JobInterruptedError(f"stopped before stage {name!r}")
    if name == "triage" and not spec.triage:
        result: Result = {"worthwhile": True, "reason": "not asked for"}
    else:
        on_event(StageEvent("stage_started", name))
        context = StageContext(name, spec, workspace, dict(results), on_event, should_stop)
        result = getattr(stages, name)(context)
    # A stage may return early when it is told to stop, so only an undisturbed one counts as finished. A version that
    # is published stays published: publish has no early return.
    if name != "publish" and should_stop():
        raise JobInterruptedError(f"stopped in stage {name!r}")
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(marker, {"spec": spec.fingerprint(), "result": result})
    on_event(StageEvent("stage_finished", name, 1.0, data=result))
    return result


def _read_marker(marker: Path, spec: AdaptationSpec) -> Result | None:
    """The result of a finished stage; ``None`` when it is not finished or was finished for another request."""
    try:
        document = json.loads(marker.read_text(encoding="utf-8"))
        if document["spec"] == spec.fingerprint():
            result: Result = document["result"]
            return result
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _conclude(spec: AdaptationSpec, results: Mapping[str, Result]) -> AdaptationResult:
    evaluation = results["evaluate"]
    metrics = {key: evaluation.get(key) for key in ("before", "after", "incumbent") if evaluation.get(key)}
    activate, reason = _decide(spec, evaluation)
    return AdaptationResult(int(results["publish"]["version"]), activate, reason, metrics)


def _decide(spec: AdaptationSpec, evaluation: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether to serve the new version, by the rule that the request chose."""
    if spec.activate != "if_better":
        return spec.activate == "always", f"activate is {spec.activate!r}"
    rival = evaluation.get("incumbent") or evaluation["before"]
    rival_name = (
        f"version {spec.incumbent_version}" if evaluation.get("incumbent") else "the shared draft alone"
    )
    new, old = (float(side["mean_acceptance_length"]) for side in (evaluation["after"], rival))
    better = new >= old * (1.0 + spec.margin)
    return better, (
        f"held-out acceptance length {new:.3f} against {old:.3f} of {rival_name}; "
        f"a gain of {spec.margin:.0%} is asked for"
    )


class ProgressEstimator:
    """Overall progress and time left, from each stage's share and the pace so far. Times in seconds.

    Progress never falls below ``reached``, what was shown before: a stage that a killed worker had begun is entered
    again, and one may do several things of which only the next one's length is known.
    """

    def __init__(self, clock: Callable[[], float], reached: float = 0.0) -> None:
        self._clock = clock
        self._reached = reached
        self._stage = ""
        self._stage_started = clock()

    def update(self, stage: str, fraction: float) -> tuple[float, float | None]:
        """Overall fraction (0 to 1) and seconds left; ``None`` until a twentieth of the stage is done."""
        now = self._clock()
        if stage != self._stage:
            self._stage, self._stage_started = stage, now
        before = sum(STAGE_WEIGHTS[name] for name in STAGES[: STAGES.index(stage)])
        overall = before + STAGE_WEIGHTS[stage] * fraction
        self._reached = max(self._reached, overall)
        if fraction < 0.05:
            return self._reached, None
        seconds_per_unit = (now - self._stage_started) / (fraction * STAGE_WEIGHTS[stage])
        return self._reached, max(0.0, (1.0 - overall) * seconds_per_unit)
