"""Whoever writes a setting as a flag is told how it is set."""

from typing import Any

from click import Context
from click.exceptions import NoSuchOption
from typer.core import TyperGroup

from fedphd.common.config.roles import ROLES, ClientConfig, CloudConfig
from fedphd.common.config.text import setting_keys

SET = "--set"
# So many settings are named at most.
MOST = 4


class Commands(TyperGroup):
    """All commands; an unknown option of one that takes settings is met with the setting."""

    def invoke(self, ctx: Context) -> Any:
        try:
            return super().invoke(ctx)
        except NoSuchOption as error:
            command = error.ctx.command if error.ctx else None
            if not command or not any(SET in option.opts for option in command.params):
                raise
            hint = how_to_set(error.option_name, command.name or "")
            text = f"{error.format_message()} {hint}"
            raise NoSuchOption(error.option_name, text, ctx=error.ctx) from error


def how_to_set(option: str, command: str) -> str:
    """The flag that sets what ``option`` seems to mean, as a sentence."""
    name = "_" + option.lstrip("-").replace("-", "_")
    role = command if command in ROLES else "cloud"
    if command in ROLES:
        keys = setting_keys(ROLES[command])
    else:
        # A whole federation: the cloud's settings, and where its clients have their data from.
        data = [key for key in setting_keys(ClientConfig) if key.startswith("data.")]
        keys = [*setting_keys(CloudConfig), *data]
    meant = [key for key in keys if f".{key}".replace(".", "_").endswith(name)][:MOST]
    if meant:
        return f"It is a setting: {' or '.join(f'{SET} {key}=VALUE' for key in meant)}."
    return f"Settings are given by {SET} KEY=VALUE; fedphd config {role} lists them."
