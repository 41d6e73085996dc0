"""``fedphd preflight``: is this machine ready for its part in a run?"""

import json
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from typer import Exit, Option

from fedphd.common.config.roles import ROLES, CloudConfig, load_config, read_toml
from fedphd.common.errors import ConfigError
from fedphd.deploy.cli import flags
from fedphd.deploy.launch.preflight import Check, checks

_COLOURS = {"ok": "green", "warning": "yellow", "failed": "red", "skipped": "dim"}


class Role(StrEnum):
    """Which process the machine is for."""

    cloud = "cloud"
    edge = "edge"
    client = "client"


def preflight(
    config: Annotated[Path, Option(help="the role's TOML file")],
    role: Annotated[
        Role | None,
        Option(help="the process that the file is for", show_default="by the file's keys"),
    ] = None,
    cloud_config: Annotated[
        Path | None,
        Option(help="the cloud's file, for what an edge or a client cannot know of the network"),
    ] = None,
    insecure: flags.Insecure = False,
    settings: flags.Set = None,
    as_json: Annotated[bool, Option("--json", help="print the checks as a JSON list")] = False,
) -> None:
    """Check this machine before a run; the exit code is 2 if something must be mended."""
    chosen = role or guess(config)
    # As the role's own command takes it.
    links = {Role.cloud: ("superlink",), Role.client: ("node",), Role.edge: ("superlink", "node")}
    own = {f"{link}.insecure": insecure or None for link in links[chosen]}
    resolved = load_config(ROLES[chosen], config, flags.overrides(own, settings))
    network = load_config(CloudConfig, cloud_config).model if cloud_config else None
    if isinstance(resolved, CloudConfig):
        network = resolved.model
    console, done = Console(highlight=False), []
    for check in checks(resolved, network):
        done.append(check)
        if not as_json:
            console.print(_line(check), soft_wrap=True)
    if as_json:
        print(json.dumps([asdict(check) for check in done], indent=2))
    failed = sum(check.outcome == "failed" for check in done)
    if not as_json:
        console.print(f"{len(done)} checks of a machine for the {chosen}, {failed} failed")
    raise Exit(ConfigError.exit_code if failed else 0)


def guess(path: Path) -> Role:
    """The role that a file is for, by keys that only it has."""
    keys = read_toml(path).keys()
    if keys & {"client_id", "edges", "data"}:
        return Role.client
    return Role.edge if keys & {"edge_id", "cloud"} else Role.cloud


def _line(check: Check) -> str:
    colour = _COLOURS[check.outcome]
    fix = f"\n{'':<10}{escape(check.fix)}" if check.fix else ""
    outcome = f"[{colour}]{check.outcome:<8}[/{colour}]"
    return f"{outcome}  {escape(check.name)}: {escape(check.found)}{fix}"
