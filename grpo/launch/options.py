"""Make the options and the --help of `train_grpo.py` from the settings. Imports nothing heavy."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import Field, fields
from typing import Any

import click
from click.core import ParameterSource

from grpo.config import GROUPS, OLD_NAMES, TrainConfig, ordered_fields
from grpo.launch.command import Script
from grpo.model_card import resolve
from grpo.runtime.console import say
from grpo.setting import as_typed

OTHER = "Other"  # the heading of the options that are not settings
SHOWS_ALL = "grpo.launch.options.help_all"  # a key that click's `ctx.meta` has if --help-all was given


class TrainCommand(Script):
    """Run a command whose --help lists the common settings under their headings, and --help-all all settings."""

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write one section per group, then the number of settings that were left out."""
        settings = {f.name: f for f in fields(TrainConfig)}
        starter = resolve({})
        sections: dict[str, list[tuple[str, str]]] = {title: [] for title in (*GROUPS, OTHER)}
        left_out = 0
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is None:
                continue
            setting = settings.get(parameter.name)
            if setting is None:
                sections[OTHER].append(record)
            elif setting.metadata["common"] or SHOWS_ALL in ctx.meta:
                option, meaning = record
                default = default_text(setting.default, getattr(starter, setting.name))
                sections[setting.metadata["group"]].append((option, meaning + default))
            else:
                left_out += 1
        for title, rows in sections.items():
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows)
        if left_out:
            formatter.write_paragraph()
            formatter.write_text(f"--help-all lists the other {left_out} settings.")


def default_text(default: Any, starter: Any) -> str:
    """Return the end of a setting's help: its default, and its value for the starter if this differs."""
    texts = [_value_text(default)]
    if starter != default:
        texts.append(f"starter {_value_text(starter)}")
    return f"  [default: {'; '.join(texts)}]" if any(texts) else ""


def _value_text(value: Any) -> str:
    """Return a value as --help shows it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def setting_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add an option for every field of `TrainConfig`, and a hidden option for every old name."""
    old_names = {new: old for old, new in OLD_NAMES.items()}
    for f in reversed(ordered_fields()):
        command = _option(f, f.name, default=f.default, help=f.metadata["meaning"])(command)
        if f.name in old_names:
            command = _option(f, old_names[f.name], default=None, hidden=True)(command)
    return command


def _option(f: Field, name: str, **more: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    flag = as_typed(name)
    if f.type is bool:
        return click.option(f"{flag}/--no-{flag[2:]}", name, **more)
    if f.type == tuple[str, ...]:
        return click.option(flag, name, type=str, multiple=True, **more)
    choices = f.metadata["choices"]
    return click.option(flag, name, type=click.Choice(choices) if choices else f.type, **more)


def help_all_option(command: Callable[..., None]) -> Callable[..., None]:
    """Add --help-all, which prints the help of all options and ends the program."""

    def show(ctx: click.Context, parameter: click.Parameter, value: bool) -> None:
        if value and not ctx.resilient_parsing:
            ctx.meta[SHOWS_ALL] = True
            click.echo(ctx.get_help())
            ctx.exit()

    more = {"is_flag": True, "is_eager": True, "expose_value": False, "callback": show}
    return click.option("--help-all", help="Show all settings and exit.", **more)(command)


def given_settings(ctx: click.Context, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings given on the command line, by current name; warn about old names on standard error."""
    default = ParameterSource.DEFAULT
    given = {name: value for name, value in settings.items() if ctx.get_parameter_source(name) is not default}
    for old, new in OLD_NAMES.items():
        if old in given:
            value = given.pop(old)
            given.setdefault(new, value)
            say(f"{as_typed(old)} is deprecated; write {as_typed(new)}", sys.stderr)
    return given
