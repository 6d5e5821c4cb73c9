"""Alert rules of a Prometheus rule file: the times that each one promises, and the same rules with shorter times."""

from __future__ import annotations

import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

_UNITS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_DURATION = r"(?:\d+(?:ms|[smhd]))+"
_WINDOW = re.compile(rf"\[({_DURATION})(:[^]]*)?\]")
_WHOLE_WINDOW = re.compile(rf"(?:max|min|avg|count)_over_time\([^[]*\[({_DURATION})\]")  # true when all of it is
_AGE = re.compile(r"(_age_seconds[^<>]*>=?\s*)(\d+)")


@dataclass(frozen=True)
class Rule:
    """One alert. `limit_seconds` is the age, or the range, from which on it is raised, and `window_seconds`
    its longest range; both may be 0.
    """

    name: str
    expression: str
    for_seconds: float
    limit_seconds: float
    window_seconds: float


def rules_of(document: Mapping[str, Any]) -> dict[str, Rule]:
    """Return the alerts of a rule file by name."""
    return {rule["alert"]: _rule(rule) for rule in _alerts(document)}


def shortened(document: Mapping[str, Any], divisor: float) -> dict[str, Any]:
    """Return a copy of a rule file in which each `for`, each range and each limit of an age is divided."""
    copy = deepcopy(dict(document))
    for rule in _alerts(copy):
        if "for" in rule:
            rule["for"] = _written(_seconds(rule["for"]) / divisor)
        expression = _WINDOW.sub(lambda found: f"[{_written(_seconds(found[1]) / divisor)}]", rule["expr"])
        rule["expr"] = _AGE.sub(lambda found: f"{found[1]}{float(found[2]) / divisor:g}", expression)
    return copy


def _alerts(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [rule for group in document["groups"] for rule in group["rules"] if "alert" in rule]


def _rule(rule: Mapping[str, Any]) -> Rule:
    expression = re.sub(r"#.*", "", rule["expr"]).strip()
    ages = [float(found[2]) for found in re.finditer(_AGE.pattern.replace(r"(\d+)", r"(\d+(?:\.\d+)?)"), expression)]
    ages += [_seconds(found[1]) for found in _WHOLE_WINDOW.finditer(expression)]
    windows = [_seconds(found[1]) for found in _WINDOW.finditer(expression)]
    return Rule(
        rule["alert"], expression, _seconds(rule.get("for", "0s")), max(ages, default=0.0), max(windows, default=0.0)
    )


def _seconds(duration: str) -> float:
    if not re.fullmatch(_DURATION, duration):
        raise ValueError(f"{duration!r} is not a duration of Prometheus, such as 5m")
    return sum(int(number) * _UNITS[unit] for number, unit in re.findall(r"(\d+)(ms|[smhd])", duration))


def _written(seconds: float) -> str:
    return f"{max(round(seconds * 1000), 1)}ms"
