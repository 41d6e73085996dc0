"""What the command says of itself: help on arguments, and how a setting is given."""

from typing import Any, get_type_hints

from click import Command, Context
from click.exceptions import NoSuchOption
from typer.core import TyperArgument, TyperGroup
from typer.models import ArgumentInfo

from fedphd.common.config.roles import ROLES, ClientConfig, CloudConfig
from fedphd.common.config.text import setting_keys

SET = "--set"
# So many settings are named at most.
MOST = 4


class CommandGroup(TyperGroup):
    """Commands whose arguments have their help.

    Flower asks for a typer below 0.21, which hands it over in a way that click forgets since 8.4.
    """

    def get_command(self, ctx: Context, cmd_name: str) -> Command | None:
        command = super().get_command(ctx, cmd_name)
        if command is not None and command.callback is not None:
            annotated = get_type_hints(command.callback, include_extras=True)
            for argument in command.params:
                if isinstance(argument, TyperArgument) and argument.help is None:
                    given = getattr(annotated.get(str(argument.name)), "__metadata__", ())
                    texts = [one.help for one in given if isinstance(one, ArgumentInfo)]
                    argument.help = next(iter(texts), None)
        return command


class Commands(CommandGroup):
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
