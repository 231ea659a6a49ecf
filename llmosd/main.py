"""`llmosd`: the daemon's command line."""

from __future__ import annotations

import logging
import logging.handlers
import os
import queue
import sys
from pathlib import Path

import click
import msgspec
import uvloop

from llmosd import __version__, notify, settings, upgrade
from llmosd.daemon import Daemon, End
from llmosd.declared import DeclarationError
from llmosd.failpoint import failpoint
from llmosd.gateway.keys import Keys
from llmosd.kernel.units import encode_quantity
from llmosd.node.confine.choice import NoSuchMaker, choose
from llmosd.runtime import AlreadyRunning, daemon_name, hold, raise_open_files
from llmosd.upgrade import Kept

log = logging.getLogger("llmosd")


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="llmosd")
@click.option("--root", type=click.Path(path_type=Path), help="Keep everything below this directory.")
@click.option("--runtime-dir", type=click.Path(path_type=Path), help="For the sockets, where their paths are short.")
@click.pass_context
def main(context: click.Context, root: Path | None, runtime_dir: Path | None) -> None:
    """The llmosd daemon: supervises model workers and routes requests to them.

    Runs in the foreground until SIGTERM or Ctrl-C, which end all workers. SIGHUP reads the model files again.
    """
    directories = settings.directories(root)
    if runtime_dir is not None:
        directories = msgspec.structs.replace(directories, runtime=runtime_dir.absolute())
    context.obj = directories
    if context.invoked_subcommand is None:
        sys.exit(_run(context.obj))


@main.command()
@click.pass_obj
def config(directories: settings.Directories) -> None:
    """Check llmosd.toml and print what is in force."""
    try:
        read = _read(directories)
    except DeclarationError as error:
        sys.exit(f"llmosd: {error}")
    shown: dict[str, object] = {"version": __version__}
    shown["directories"] = {name: str(getattr(directories, name)) for name in directories.__struct_fields__}
    shown |= msgspec.to_builtins(read, enc_hook=encode_quantity)
    click.echo(msgspec.json.format(msgspec.json.encode(shown), indent=2).decode())


def _read(directories: settings.Directories) -> settings.Settings:
    """The settings in force. Raises DeclarationError, also for keys that the gateway could not read later."""
    file = directories.config / "llmosd.toml"
    read = settings.read(file)
    if read.gateway.enabled:
        path = read.gateway.api_keys_file
        try:
            Keys(path)
        except OSError as error:
            raise DeclarationError(f"{file}: gateway.api_keys_file: {path}: {error.strerror}") from None
        except ValueError as error:
            raise DeclarationError(f"{file}: gateway.api_keys_file: {error}") from None
    return read


def _run(directories: settings.Directories) -> int:
    try:
        directories.make()
        read = _read(directories)
    except (DeclarationError, OSError) as error:
        click.echo(f"llmosd: {error}", err=True)
        return 1
    # Written by a thread of its own: a terminal that stands still must not stop the daemon.
    lines: queue.SimpleQueue[logging.LogRecord] = queue.SimpleQueue()
    writer = logging.handlers.QueueListener(lines, notify.log_handler())
    hand_over = logging.handlers.QueueHandler(lines)
    hand_over.setFormatter(logging.Formatter("%(message)s"))  # the writer's handler adds time and level
    logging.basicConfig(level=read.logs.level.upper(), handlers=[hand_over])
    writer.start()
    raise_open_files()
    try:
        done = uvloop.run(_serve(directories, read))
    finally:
        writer.stop()
    if isinstance(done, int):
        return done
    try:
        failpoint("upgrade.closed")
        upgrade.replace(done)
    except OSError as error:
        click.echo(f"llmosd: cannot be started again: {error}; the workers live on for the next daemon", err=True)
        return 1


async def _serve(directories: settings.Directories, read: settings.Settings) -> int | Kept:
    """The exit status, or what to keep for the program that is to replace this one."""
    kept = upgrade.taken_over()
    try:
        lock = hold(directories.runtime, kept.lock if kept is not None else -1)
        maker = await choose(read.node.confinement, daemon_name(directories.runtime))
        daemon = Daemon(directories, read, maker, kept)
    except (AlreadyRunning, DeclarationError, NoSuchMaker, OSError) as error:
        click.echo(f"llmosd: {error}", err=True)
        return 1
    end = End.STOP
    try:
        try:
            refused = await daemon.start()
        except DeclarationError as error:
            click.echo(f"llmosd: {error}", err=True)
            return 1
        for line in refused:
            log.error("refused: %s", line)
        about = daemon.machine.about
        log.info("llmosd %s serves %s%s", __version__, about.runtime_directory,
                 f" and {about.gateway_url}" if about.gateway_url else "")  # fmt: skip
        end = await daemon.run()
    finally:
        left_open = await daemon.close(keep=end is End.UPGRADE)
    if end is End.UPGRADE:
        return msgspec.structs.replace(left_open, lock=lock)
    os.close(lock)
    return 0
