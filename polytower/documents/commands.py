"""docs/reference/commands.md: every command with its arguments and options, as `--help` has them."""

from collections.abc import Iterator

import click

from polytower.documents.markdown import bullets, paragraph

HEAD = """# Commands

`polytower COMMAND --help` says the same. With `--json`, a command ends its output with one line of JSON. Exit status: 0
done, 1 refused or failed (the message says why and how to fix it), 2 wrong usage, 3 loaded but some rows were put
aside, 130 interrupted, 143 terminated.
"""


def page() -> str:
    """The page, from the command line's own declarations."""
    from polytower.cli import cli

    return HEAD + "".join(_section(name, command) for name, command in _commands(cli, "polytower"))


def _commands(command: click.Command, path: str) -> Iterator[tuple[str, click.Command]]:
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from _commands(command.commands[name], f"{path} {name}")
    else:
        yield path, command


def _section(name: str, command: click.Command) -> str:
    arguments = [each for each in command.params if isinstance(each, click.Argument)]
    options = [each for each in command.params if isinstance(each, click.Option) and not each.hidden]
    usage = " ".join([name, *(_argument(each) for each in arguments), *(["[OPTIONS]"] if options else [])])
    text = "\n\n".join(map(paragraph, (command.help or "").split("\n\n")))
    listed = bullets((_names(option), _help(option)) for option in options)
    return f"\n## {name}\n\n```text\n{usage}\n```\n\n{text}\n" + (f"\n{listed}\n" if listed else "")


def _argument(argument: click.Argument) -> str:
    return argument.make_metavar(click.Context(click.Command("polytower")))


def _names(option: click.Option) -> str:
    names = ", ".join(f"`{name}`" for name in option.opts)
    if option.is_flag:
        return names
    value = option.make_metavar(click.Context(click.Command("polytower")))
    return f"{names} `{value}`"


def _help(option: click.Option) -> str:
    text = " ".join((option.help or "").split())
    shown = option.show_default and option.default not in (None, ())
    return f"{text} Default: `{option.default}`." if shown else text
