"""What is wrong with a body or a query, as one sentence that names the field, the value and what would be right."""

from collections.abc import Mapping, Sequence
from typing import Any

from eda.server.errors import InvalidRequestError

JSON_BODY = "the body must be a JSON object, sent with 'Content-Type: application/json'"

Problem = Mapping[str, Any]
"""One entry of pydantic's ``errors()``."""


class ParameterError(ValueError):
    """Raised by validators that look at several parameters together; ``param`` is the one to blame."""

    def __init__(self, param: str, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


def from_problems(problems: Sequence[Problem], *, root: str = "") -> InvalidRequestError:
    """The first thing that is wrong, with its place as ``param``.

    Args:
        root: the field that holds the document, when that is not the body itself.
    """
    first = _most_telling(problems)
    kind = first["type"]
    is_unknown = kind in ("extra_forbidden", "unexpected_keyword_argument")
    param = _place(first["loc"], root, ends_in_name=is_unknown or kind == "missing")
    if is_unknown:
        return InvalidRequestError(
            f"the parameter '{param}' is not supported", param=param, code="unsupported_parameter"
        )
    if kind == "missing" and param:
        return InvalidRequestError(
            f"the parameter '{param}' is required", param=param, code="missing_required_parameter"
        )
    if kind == "json_invalid":
        return InvalidRequestError(
            f"{root or 'the body'} is not valid JSON: {_reason(first)}",
            param=root or None,
            code="invalid_json",
        )
    if param is None and kind in ("missing", "model_attributes_type", "model_type"):
        return InvalidRequestError(JSON_BODY)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, ParameterError):
        param = f"{param}.{cause.param}" if param else cause.param
        return InvalidRequestError(str(cause), param=param, code=cause.code)
    message = str(first["msg"]).removeprefix("Value error, ")
    return InvalidRequestError(f"{param or 'body'}: {message}{_given(first.get('input'))}", param=param)


def _most_telling(problems: Sequence[Problem]) -> Problem:
    """The first problem or, where a value may have one of several forms, that of the form it comes closest to."""
    first = problems[0]
    location = first["loc"]
    split = next((i for i, part in enumerate(location[1:], 1) if _is_form(part)), None)
    if split is None:
        return first
    forms: dict[Any, Problem] = {}
    for problem in problems:
        if problem["loc"][:split] == location[:split]:
            forms.setdefault(problem["loc"][split : split + 1], problem)
    closest = max(forms.values(), key=lambda problem: _closeness(problem, split))
    if _closeness(closest, split) > (False, 0, 0):
        return closest
    # The value is of none of the kinds: say all of them.
    wanted = dict.fromkeys(str(problem["msg"]).removeprefix("Input should be ") for problem in forms.values())
    return {**closest, "msg": f"Input should be {' or '.join(wanted)}"}


def _closeness(problem: Problem, split: int) -> tuple[bool, int, int]:
    """How far a form was followed: a wrong value beats a wrong kind, a deep place a shallow one."""
    inner = [part for part in problem["loc"][split + 1 :] if not _is_form(part)]
    is_right_kind = not str(problem["type"]).endswith("_type")
    return is_right_kind, len(inner), next((part for part in inner if isinstance(part, int)), 0)


def _reason(problem: Problem) -> str:
    return str(problem.get("ctx", {}).get("error", problem["msg"]))


def _given(value: Any) -> str:
    if isinstance(value, (int, float, str)):  # bool is an int
        return f"; got {value!r:.100}"
    if isinstance(value, (list, dict)):
        return f"; got {'a list' if isinstance(value, list) else 'an object'}"
    return ""


def _place(location: Sequence[int | str], root: str, *, ends_in_name: bool) -> str | None:
    """``("body", "messages", 0, "content")`` to ``messages[0].content``.

    Forms that a value may have appear as names of types (``str``, ``TextPart``), which mean nothing to a client; the
    last part is never one of them when ``ends_in_name``.
    """
    text = root
    parts = location if root else location[1:]
    for place, part in enumerate(parts):
        if isinstance(part, int):
            text += f"[{part}]"
        elif (ends_in_name and place == len(parts) - 1) or not _is_form(part):
            text += f".{part}" if text else part
    return text or None


def _is_form(part: int | str) -> bool:
    if isinstance(part, int) or part.isdigit():  # digits: a key of logit_bias
        return False
    return not part.isidentifier() or part in ("str", "int", "float", "bool") or part[0].isupper()
