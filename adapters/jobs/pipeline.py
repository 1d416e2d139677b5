"""One adaptation from start to end: its stages, one after the other.

``run_adaptation`` knows what is finished; what is computed is in each ``Stage`` (``adapters/worker/stages.py``). A
marker file is written after each stage, atomically, with the stage's result. A job that is killed and run again skips
what has a marker and enters the next stage anew, which goes on from its own files in the workspace (samples appended so
far, the last checkpoint).
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from eda.adapters.errors import JobInterruptedError
from eda.adapters.jobs.spec import AdaptationSpec
from eda.adapters.store.files import locked_or_raise, write_json_atomically
from eda.formats.json_files import read_json

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


class Stage(Protocol):
    """One stage of an adaptation. A class that derives from it needs ``name``, ``weight`` and ``run``.

    Attributes:
        name: of its marker, result and events. A job that was begun by an earlier release is resumed by these names.
        weight: its usual share of a job's time, compared with the other stages' weights.
        is_final: what it has done stands, also when the job is told to stop meanwhile.
    """

    name: str
    weight: float
    is_final: bool = False

    def skip(self, context: StageContext) -> Result | None:
        """The result without any work, where the request does not ask for the stage; else ``None``."""
        return None

    @abstractmethod
    def run(self, context: StageContext) -> Result:
        """Does the work, or what is left of it, and returns a small JSON object.

        The pipeline reads ``before`` and ``after`` of "evaluate", each with ``mean_acceptance_length``, and
        ``incumbent``, likewise or ``None``; of "train" ``seconds`` of its parts; of "publish" ``version`` (int).
        """

    def verdict(self, result: Result) -> str | None:
        """Why the job ends with this stage's ``result``; ``None`` when it goes on."""
        return None


@dataclass(frozen=True, slots=True)
class AdaptationResult:
    """How an adaptation ended.

    Attributes:
        version: that was published; ``None`` when a stage's verdict ended the job.
        activate: whether the version should be served now; ``reason`` says why, or why there is none.
        metrics: "before", "after" and, if another version was active, "incumbent".
        training_seconds: of each part of the training.
    """

    version: int | None
    activate: bool
    reason: str
    metrics: Mapping[str, Any] = field(default_factory=dict)
    training_seconds: Mapping[str, float] = field(default_factory=dict)

    def to_json(self) -> Result:
        return {
            "version": self.version,
            "reason": self.reason,
            "metrics": dict(self.metrics),
            "training_seconds": dict(self.training_seconds),
        }


def run_adaptation(
    spec: AdaptationSpec,
    workspace: Path,
    stages: Sequence[Stage],
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
        for stage in stages:
            context = StageContext(stage.name, spec, workspace, dict(results), on_event, should_stop)
            result = results[stage.name] = _run_stage(stage, context)
            if (reason := stage.verdict(result)) is not None:
                return AdaptationResult(None, activate=False, reason=reason)
        return _conclude(spec, results)


def _run_stage(stage: Stage, context: StageContext) -> Result:
    marker = context.workspace / "stages" / f"{stage.name}.json"
    finished = _read_marker(marker, context.spec)
    if finished is not None:
        return finished
    if context.should_stop():
        raise JobInterruptedError(f"stopped before stage {stage.name!r}")
    result = stage.skip(context)
    if result is None:
        context.on_event(StageEvent("stage_started", stage.name))
        result = stage.run(context)
    # A stage may return early when it is told to stop, so only an undisturbed one counts as finished.
    if not stage.is_final and context.should_stop():
        raise JobInterruptedError(f"stopped in stage {stage.name!r}")
    marker.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomically(marker, {"spec": context.spec.fingerprint(), "result": result})
    context.on_event(StageEvent("stage_finished", stage.name, 1.0, data=result))
    return result


def _read_marker(marker: Path, spec: AdaptationSpec) -> Result | None:
    """The result of a finished stage; ``None`` when it is not finished or was finished for another request."""
    try:
        document = read_json(marker)
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
    seconds = results["train"].get("seconds", {})
    return AdaptationResult(int(results["publish"]["version"]), activate, reason, metrics, seconds)


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

    def __init__(self, stages: Sequence[Stage], clock: Callable[[], float], reached: float = 0.0) -> None:
        self._clock = clock
        self._reached = reached
        self._spans = _spans(stages)
        self._stage = ""
        self._stage_started = clock()

    def update(self, stage: str, fraction: float) -> tuple[float, float | None]:
        """Overall fraction (0 to 1) and seconds left; ``None`` until a twentieth of the stage is done."""
        now = self._clock()
        if stage != self._stage:
            self._stage, self._stage_started = stage, now
        before, share = self._spans[stage]
        overall = before + share * fraction
        self._reached = max(self._reached, overall)
        if fraction < 0.05:
            return self._reached, None
        seconds_per_unit = (now - self._stage_started) / (fraction * share)
        return self._reached, max(0.0, (1.0 - overall) * seconds_per_unit)


def _spans(stages: Sequence[Stage]) -> dict[str, tuple[float, float]]:
    """By stage: the share of the job that is done before it, and its own."""
    total = sum(stage.weight for stage in stages)
    spans: dict[str, tuple[float, float]] = {}
    before = 0.0
    for stage in stages:
        spans[stage.name] = before / total, stage.weight / total
        before += stage.weight
    return spans
