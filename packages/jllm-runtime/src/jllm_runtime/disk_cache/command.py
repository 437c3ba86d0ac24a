"""Command: ``jllm cache``."""

import difflib
import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from jllm_runtime.disk_cache.contents import Entry


@click.group(invoke_without_command=True, short_help="List what is kept on the disk, or remove it.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def cache(context: click.Context, as_json: bool) -> None:
    """List what JLLM keeps on the disk, and remove it.

    These are the models that were converted on first use, and compiled programs, in the folder that JLLM_CACHE names.
    What was downloaded from the hub is in the hub's own cache: `hf cache` lists and removes it.
    """
    if context.invoked_subcommand is not None:
        return
    # Here and below: --help does not wait for JAX.
    from jllm_runtime.compile_cache import cache_folder
    from jllm_runtime.disk_cache.contents import read_cache, total

    folder = cache_folder()
    entries = read_cache(folder)
    if as_json:
        listed = [entry.as_dict() for entry in entries]
        click.echo(json.dumps({"folder": str(folder), "bytes": total(entries), "entries": listed}, indent=2))
        return
    for line in _table(entries):
        click.echo(line)
    click.echo(f"{_size(total(entries))} in {folder}" if entries else f"nothing in {folder}")


@cache.command(short_help="Remove models or compiled programs.")
@click.argument("names", nargs=-1, metavar="[NAME]...")
@click.option("--all", "everything", is_flag=True, help="Remove all models and all compiled programs.")
@click.option("--programs", is_flag=True, help="Remove all compiled programs.")
def remove(names: tuple[str, ...], everything: bool, programs: bool) -> None:
    """Remove models or compiled programs by the names that `jllm cache` lists.

    A part of a name is enough where only one has it. What a running process uses is left, and the exit code is then 1.
    """
    from jllm_runtime.compile_cache import cache_folder
    from jllm_runtime.disk_cache.contents import forget_sources, read_cache
    from jllm_runtime.disk_cache.contents import remove as remove_entry
    from jllm_runtime.errors import CacheError

    if not (names or everything or programs):
        raise click.UsageError("give the NAME of what to remove, --programs or --all; `jllm cache` lists the names")
    entries = read_cache(cache_folder())
    # All names before anything is removed.
    chosen = {_named(name, entries).path for name in names}
    removed, failures = 0, list[str]()
    for entry in entries:
        if everything or (programs and entry.kind == "programs") or entry.path in chosen:
            try:
                size = remove_entry(entry)
            except CacheError as error:
                failures.append(str(error))
                continue
            click.echo(f"removed {entry.name}: {_size(size)}")
            removed += size
    if everything:
        forget_sources(cache_folder())
    click.echo(f"{_size(removed)} removed from {cache_folder()}")
    if failures:  # as a click error, so that the exit code is 1: the names were right, and another try may succeed
        raise click.ClickException("\n".join(failures))


def _named(name: str, entries: Sequence["Entry"]) -> "Entry":
    """The entry of this name, or the only one with this in its name. Names are compared, and never used as paths."""
    from jllm_runtime.errors import CacheError

    # A path is taken too, as lines about conversions show it.
    plain = os.path.basename(name.rstrip("/"))
    exact = [entry for entry in entries if entry.name == plain]
    found = exact or [entry for entry in entries if plain and plain in entry.name]
    if len(found) == 1:
        return found[0]
    if found:
        raise CacheError(f"{name!r} is in several names: {', '.join(entry.name for entry in found)}; give one of them")
    near = difflib.get_close_matches(plain, [entry.name for entry in entries], n=3, cutoff=0.3)
    hint = f"; near: {', '.join(near)}" if near else ""
    raise CacheError(f"the cache has no {name!r}{hint}; `jllm cache` lists the names")


def _table(entries: Sequence["Entry"]) -> list[str]:
    if not entries:
        return []
    rows = [("name", "size", "last use", "what")]
    for entry in entries:
        rows.append((entry.name, _size(entry.nbytes), _age(entry.used), entry.what + " (in use)" * entry.in_use))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return [
        f"{name:<{widths[0]}}  {size:>{widths[1]}}  {used:<{widths[2]}}  {what}".rstrip()
        for name, size, used, what in rows
    ]


def _size(nbytes: int) -> str:
    from rich.filesize import decimal

    return decimal(nbytes)


def _age(used: float) -> str:
    import time

    return time.strftime("%Y-%m-%d %H:%M", time.localtime(used))
