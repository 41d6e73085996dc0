"""What ``compare --list`` and ``compare --dry-run`` print."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.deploy.compare.budget import Work, method_settings, work_of
from fedphd.deploy.compare.comparison import CLOUD_BYTES, Comparison
from fedphd.deploy.compare.methods import Method
from fedphd.deploy.compare.plan import differences, identity, method_config
from fedphd.deploy.launch.render import human_bytes
from fedphd.deploy.launch.runs import Split


def list_methods(methods: Iterable[Method]) -> Iterator[str]:
    """A line per method: name, title, where it is described, what it sets."""
    for method in methods:
        mark = "*" if method.paper else " "
        settings = ", ".join(f"{key} = {value!r}" for key, value in method.settings.items())
        yield (
            f"{mark} {method.name:<20} {method.title:<36} {method.reference:<18} "
            f"{method.topology}; {settings}"
        )
    yield "* compared where --methods names none (the comparison of arXiv:2507.06449)"


def describe(comparison: Comparison, split: Split) -> Iterator[str]:
    """Per method the budget's arithmetic, and the settings that are its own.

    Args:
        comparison: what would be run.
        split: how the clients share the data with the first seed.
    """
    plan, base = comparison.plan, comparison.common.base()
    methods = comparison.all_methods
    yield (
        f"{len(methods)} methods x seeds {', '.join(map(str, plan.seeds))} = "
        f"{len(methods) * len(plan.seeds)} runs "
        f"into {comparison.common.out}; {len(split.sizes)} clients"
    )
    yield f"data of seed {plan.seeds[0]}: {split}"
    usual = load_config(CloudConfig, None, {"preset": base.preset, "pruning.mode": "none"})
    changed = differences(identity(usual, {}), identity(base, {}))
    yield f"common settings unlike preset {base.preset}: {changed or 'none'}"
    yield _budget(comparison)
    for method in methods:
        rounds = plan.intervals.get(method.name, base.schedule.intervals)
        yield f"\n{method.title} ({method.name}), {method.reference}"
        if rounds == 0:
            yield "  the budget is too small for it"
            continue
        if comparison.budget == CLOUD_BYTES and method.name not in plan.intervals:
            yield "  what a cloud round moves is measured at the start; with the common settings'"
        seed = plan.seeds[0]
        config = method_config(comparison.common, base, method, seed=seed, intervals=rounds)
        yield from _arithmetic(work_of(config, split.sizes))
        for key, value in method_settings(method, base, intervals=rounds).items():
            yield f"  {key} = {value!r}"


def _budget(comparison: Comparison) -> str:
    if comparison.budget != CLOUD_BYTES:
        return "budget: equal local work and equal cloud rounds"
    known = comparison.plan.cloud_bytes
    amount = f"what {comparison.byte_reference} moves" if known is None else human_bytes(known)
    return f"budget: equal bytes over the cloud's links, {amount}"


def _arithmetic(work: Work) -> Iterator[str]:
    unit = work.local_unit
    yield (
        f"  {work.cloud_rounds} cloud rounds x {work.rounds_per_cloud_round} training round(s) x "
        f"{work.participants} clients x {work.local_amount} local {unit} = "
        f"{work.total_local} local {unit} ({work.local_per_cloud_round} per cloud round)"
    )
    yield (
        f"  about {work.total_steps:.0f} optimiser steps in all, "
        f"{work.steps_per_visit:.1f} per client and training round"
    )
