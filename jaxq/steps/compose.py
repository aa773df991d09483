"""Putting steps together, and choosing them by path."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatch
from functools import reduce
from itertools import combinations

from jaxq.program.groups import GroupPlan
from jaxq.steps.group import Group, Spec, Step


def chain(*steps: Step) -> Step:
    """Applies steps in order, as `optax.chain` does; each knows from the start what the others plan."""

    def plan(group: GroupPlan, spec: Spec) -> Spec:
        return reduce(lambda s, step: step.plan(group, s), steps, spec)

    def apply(group: Group) -> Group:
        return reduce(lambda g, step: step.apply(g), steps, group)

    def rehearse(group: Group | None) -> Group | None:
        return reduce(lambda g, step: g and step.rehearse(g), steps, group)

    return Step(plan, apply, tuple(p for step in steps for p in step.patterns), rehearse)


def nothing() -> Step:
    """Leaves a group in full precision."""
    return Step(lambda _, spec: spec, lambda group: group, rehearse=lambda group: group)


def matches(name: str, rule: str) -> bool:
    """Whether a rule, a shell pattern, is for a site of this name; the name itself is, whatever characters it has."""
    return name == rule or fnmatch(name, rule)


def partition(rules: Mapping[str, Step]) -> Step:
    """The step of the first rule that matches one of a group's sites (or its name); groups without one are left alone.

    Rules are shell patterns over site paths, `"layers/*/attn/*"`; `*` crosses slashes. `calibrate` refuses a rule that
    matches no site of the program.

    Raises:
        ValueError: a rule that never applies, because an earlier one has all that it could match.
    """
    for (before, first), (rule, step) in combinations(rules.items(), 2):
        if step is not first and not set(before) & set("?[") and fnmatch(rule, before):
            raise ValueError(
                f"partition: the rule {rule!r} never applies, {before!r} before it has all its sites: put it first"
            )

    def choose(group: GroupPlan) -> Step:
        names = (*group.sites, group.name)
        return next((step for rule, step in rules.items() if any(matches(n, rule) for n in names)), nothing())

    patterns = tuple(rules) + tuple(p for step in rules.values() for p in step.patterns)
    return Step(
        lambda group, spec: choose(group).plan(group, spec),
        lambda group: choose(group.plan).apply(group),
        patterns,
        lambda group: choose(group.plan).rehearse(group),
    )


def skip(patterns: tuple[str, ...] | list[str], step: Step) -> Step:
    """`step` everywhere but at the sites that match one of the patterns.

    Raises:
        TypeError: one pattern, not in a list.
    """
    if isinstance(patterns, str):
        raise TypeError(f"skip: {patterns!r} is one pattern; give a list, [{patterns!r}]")
    rules = dict.fromkeys(patterns, nothing())
    return partition({**rules, **({} if "*" in rules else {"*": step})}) if patterns else step
