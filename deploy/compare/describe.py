"""What ``compare --list`` and ``compare --dry-run`` print."""

from collections.abc import Iterable, Iterator

from fedphd.common.config.roles import CloudConfig, load_config
from fedphd.common.config.text import differences
from fedphd.deploy.compare.budget import Budget, Workload, method_settings, own_work
from fedphd.deploy.compare.comparison import Comparison
from fedphd.deploy.compare.methods import Method
from fedphd.deploy.compare.plan import decisive_settings, plan_run
from fedphd.deploy.launch.client_data import part_of_data
from fedphd.deploy.launch.render import human_bytes
from fedphd.deploy.launch.runs import Split


def list_methods(methods: Iterable[Method]) -> Iterator[str]:
    """A line per method: name, title, where it is described, what it sets."""
    for method in methods:
        settings = ", ".join(f"{key} = {value!r}" for key, value in method.settings.items())
        yield (
            f"{'*' if method.paper else ' '} {method.name:<20} {method.title:<36} "
            f"{method.reference:<18} {method.topology}; {settings}"
        )
    yield "* compared unless --methods names others (the comparison of arXiv:2507.06449)"


def describe(comparison: Comparison, split: Split) -> Iterator[str]:
    """What would run: the common settings, and each method's workload and own settings.

    ``split`` is how the clients share the data with the first seed. Raises ConfigError if
    something of it cannot work.
    """
    comparison.check()
    plan, methods, base = comparison.plan, comparison.methods, comparison.common.base()
    yield (
        f"{len(methods)} methods x seeds {', '.join(map(str, plan.seeds))} = "
        f"{len(methods) * len(plan.seeds)} runs into {comparison.common.out}; "
        f"{len(split.sizes)} clients"
    )
    yield f"data of seed {plan.seeds[0]}: {split}"
    usual = load_config(CloudConfig, None, {"preset": base.preset, "pruning.mode": "none"})
    changed = differences(decisive_settings(usual, {}), decisive_settings(base, {}))
    yield f"common settings that differ from preset {base.preset}: {changed or 'none'}"
    by_bytes = plan.budget == Budget.cloud_bytes
    known = plan.cloud_bytes
    amount = f"what {comparison.byte_reference} moves" if known is None else human_bytes(known)
    equal = f"bytes over the cloud's links, {amount}" if by_bytes else "local work and cloud rounds"
    unequal = {method.name: own for method in methods if (own := own_work(method))}
    but = "; ".join(f"{name} sets {', '.join(own)} itself" for name, own in unequal.items())
    yield f"budget: equal {equal}{f', but {but}' if but and not by_bytes else ''}"
    if comparison.tuner:
        yield f"tuning: at most {comparison.tuner.most_runs} runs before these"
    data = part_of_data(base, 0, comparison.common.clients.data)
    trained = split.training_sizes(data.validation_fraction)
    for method in methods:
        rounds = plan.intervals.get(method.name, base.schedule.intervals)
        yield f"\n{method.title} ({method.name}), {method.reference}"
        if rounds == 0:
            yield "  the budget is too small for it"
            continue
        if by_bytes and method.name not in plan.intervals:
            yield "  cloud rounds: as many as fit in the budget; with the number in the settings:"
        tuned = plan.tuned(method)
        run = plan_run(comparison.common, method, plan.seeds[0], intervals=rounds, tuned=tuned)
        config = run.config
        schedule, training = config.schedule, config.training
        sizes = [sum(trained)] if method.pooled else trained
        work, unit = Workload.of(config, sizes), training.local_unit
        yield (
            f"  {schedule.intervals} cloud rounds x {schedule.edge_rounds} training round(s) x "
            f"{work.participants} clients x {training.local_amount} local {unit} = "
            f"{work.total_local} local {unit} ({work.local_per_cloud_round} per cloud round)"
        )
        yield (
            f"  about {work.total_steps:.0f} optimiser steps in all, "
            f"{work.steps_per_round:.1f} per client and training round"
        )
        for key, value in {**tuned, **method_settings(method, base, intervals=rounds)}.items():
            yield f"  {key} = {value!r}"
