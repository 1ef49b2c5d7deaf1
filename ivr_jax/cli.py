"""What every command shares: flags, configuration, work directory, logging, errors.

An entry point is a thin `main` and one line:

    def main(call: cli.Call) -> None:
        train(call.config, call.workdir)

    def entry() -> None:
        cli.run(main, config=True)

What a user may rely on, whatever the command:

    --config=configs/micro_sft.py     a file, or the bare name of an installed one (`micro_sft`); `:word` after it is
                                      passed to its `get_config`.  A config file imports its neighbours relatively
                                      (`from . import micro_base`).
    --config.a.b=value                overrides one key; unknown keys and wrong types are errors.
    --workdir=runs/name               made when missing, and checked for writing before anything is computed; a folder
                                      in a bucket (gs://… or s3://…) is copied there while the command runs.
    --help                            the command's own docstring; with --config, also that file's keys.

Bad input, a config of another command, full memory and a full disk end in one line, `error: what. remedy`, on stderr
and status 2; Ctrl-C in status 130.  Any other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from ml_collections.config_flags import config_path

from ivr_jax.cloud import inputs, mirror
from ivr_jax.cloud.objects import is_url, split
from ivr_jax.config import (
    check_numbers,
    config_names,
    describe_config,
    flatten,
    load_config,
    new_name,
    with_article,
)
from ivr_jax.errors import UserError, refused_variable

CACHE_VARIABLE = "IVR_JAX_CACHE"
_OVERRIDE = re.compile(r"^--?(?:no)?config\.([^=]+)")


@dataclasses.dataclass(frozen=True)
class Call:
    """What the user asked of one command.

    Attributes:
      config: the file's configuration with the overrides applied, locked; None for a command without one.
      workdir: an existing folder that can be written to; None when the command does not need one and got none.
      bucket: the gs:// or s3:// URL that `workdir` is the local folder of, while the command runs; None without one.
      flags: the values of the command's own flags (`call.flags.prompt`).
      verbose: whether to log what the libraries say.
      argv: the command line, program name first, which gives the same call again.
    """

    config: ConfigDict | None
    workdir: Path | None
    flags: flags.FlagValues
    verbose: bool = False
    bucket: str | None = None
    argv: tuple[str, ...] = ()


def run(
    main: Callable[[Call], int | None],
    *,
    config: bool,
    workdir: bool = True,
    add_flags: Callable[[flags.FlagValues], None] | None = None,
    argv: Sequence[str] | None = None,
    opens_bucket: bool = False,
    reads: Sequence[str] = (),
    writes: Sequence[str] = (),
    urls: Sequence[str] = (),
) -> NoReturn:
    """Parses the command line, calls `main`, and exits with its status (0 for None).

    Args:
      main: the command; its module's docstring is what `--help` prints.
      config: whether the command takes `--config` (and then requires it).
      workdir: whether `--workdir` is required; it is accepted either way.
      add_flags: defines the command's own flags on the `FlagValues` it is given.  They are kept apart from
        `absl.flags.FLAGS`, so that commands can be imported side by side.
      argv: the command line, program name first; `sys.argv` by default.
      opens_bucket: whether the command itself opens a work directory that is in a bucket (`Call.bucket`).
      reads, writes: its own flags that name files or folders, which may be in a bucket: the command finds local copies
        in them, and folders that are copied there.  In all others, but those of `urls`, which it reads itself, a
        bucket is an error.
    """

    argv = list(sys.argv if argv is None else argv)

    def parse_flags(arguments: list[str]) -> Call:
        doc = sys.modules[main.__module__].__doc__ or ""
        return parse(arguments, config=config, workdir=workdir, add_flags=add_flags, doc=doc)

    def start(call: Call) -> int | None:
        set_logging(call.verbose)
        set_up_jax()
        with contextlib.ExitStack() as stack:
            if call.bucket is not None and not opens_bucket:
                stack.enter_context(mirror.open_folder(call.bucket))
            localise(call.flags, reads, writes, urls, stack)
            return main(call)

    try:
        app.run(start, argv=argv, flags_parser=parse_flags)
    except KeyboardInterrupt:
        print("interrupted.", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        understood = error if isinstance(error, UserError) else _explained(error, argv)
        if understood is None:
            raise
        print("error:", mirror.with_urls(" ".join(str(understood).split())), file=sys.stderr)
        sys.exit(2)
    raise AssertionError("absl's app.run always exits")


def _explained(error: Exception, argv: Sequence[str]) -> UserError | None:
    """What the user can do about an exception of a library; None when it is a defect of this program."""
    if isinstance(error, AttributeError) and isinstance(error.obj, ConfigDict):
        spec, _ = _take_config_flag(argv)
        return UserError(f"{spec} has no key `{error.name}`, which this command reads.",
                         "Name a config that was made for this command, or add the key to the file.")
    if refused := refused_variable(error):
        return refused
    if os.environ.get("JAX_PLATFORMS") and not _finds_devices():
        return UserError(f"JAX finds no device of JAX_PLATFORMS={os.environ['JAX_PLATFORMS']}.",
                         "Unset the variable, or set it to cpu; `pip install ivr_jax[gpu]` or [tpu] brings the others.")
    text = str(error)
    if any(os.strerror(code) in text for code in (errno.ENOSPC, errno.EDQUOT)):  # some libraries keep no errno
        return UserError("the disk is full.", "Make room and give the same command again; what was complete is kept.")
    exhausted = isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in text or "Out of memory" in text
    if exhausted and "--verbose" not in argv:  # XLA has no exception of its own for this, only a status in the text
        return UserError(f"out of memory ({text.partition(chr(10))[0]}).",
                         "Take a smaller batch, length or model; config.grad_accum_steps trains a batch in parts. "
                         "--verbose shows where it happened.")
    return None


def parse(
    argv: Sequence[str],
    *,
    config: bool,
    workdir: bool = True,
    add_flags: Callable[[flags.FlagValues], None] | None = None,
    doc: str = "",
) -> Call:
    """The command line as a `Call`; see `run`.  Raises UserError for anything wrong, SystemExit(0) for `--help`."""
    given, argv = tuple(argv), list(argv)
    values = flags.FlagValues()
    flags.DEFINE_string("workdir", None, "folder for everything this command writes", flag_values=values)
    flags.DEFINE_boolean("verbose", False, "also show what the libraries log", flag_values=values)
    flags.DEFINE_boolean("help", False, "show this text and exit", short_name="h", flag_values=values)
    if add_flags is not None:
        add_flags(values)
    spec = None
    if config:
        spec, argv = _take_config_flag(argv)
    settings = None if spec is None else load_config(spec)
    if {"--help", "-help", "-h", "--helpshort", "--helpfull"} & set(argv[1:]):
        print(_help_text(doc, values, spec, settings, config=config, workdir=workdir))
        raise SystemExit(0)
    if config and (spec is None or settings is None):
        raise UserError("no configuration was named.", f"Add --config=NAME; installed: {_installed()}.")
    if spec is not None and settings is not None:
        _check_overrides(argv, spec, settings)
        original = settings.copy_and_resolve_references()
        _parse_flags(argv, values, settings)
        _check_tuples(values, original, settings)
        check_numbers(settings)
    else:
        _parse_flags(argv, values, settings)
    folder = None
    if values.workdir:  # an empty name, of an unset variable, would be the current folder
        folder = prepare_workdir(values.workdir, bucket=True)
    elif workdir:
        raise UserError("no work directory was named.", "Add --workdir=runs/NAME; it is made when it does not exist.")
    bucket = values.workdir.rstrip("/") if values.workdir and is_url(values.workdir) else None
    return Call(settings, folder, values, values.verbose, bucket, given)


def with_named_source(argv: Sequence[str], switches: Sequence[str]) -> list[str]:
    """`DATASET --format=…` as `--source=DATASET --format=…`: the first word that is neither a flag nor its value.

    `switches` names the command's own flags that take no value.
    """
    without_value = {"h", "help", "verbose", "noverbose", *switches, *(f"no{name}" for name in switches)}
    words = list(argv)
    for index, word in enumerate(words[1:], 1):
        before = words[index - 1]
        is_value = before.startswith("-") and "=" not in before and before.lstrip("-") not in without_value
        if not word.startswith("-") and not is_value:
            words[index] = f"--source={word}"
            break
    return words


def config_from_argv(argv: Sequence[str]) -> ConfigDict:
    """The configuration that `--config=… --config.a.b=…` describes: `config_from_argv(["--config=micro_sft"])`."""
    call = parse(["ivr_jax", *argv], config=True, workdir=False)
    assert call.config is not None
    return call.config


# Flags


def _take_config_flag(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Splits `--config=SPEC` (or `--config SPEC`) off the command line."""
    found, rest, index = [], [], 0
    while index < len(argv):
        word = argv[index]
        if word in ("--config", "-config"):
            index += 1
            found.append(argv[index] if index < len(argv) else "")
        elif word.startswith(("--config=", "-config=")):
            found.append(word.partition("=")[2])
        else:
            rest.append(word)
        index += 1
    if len(found) > 1:
        raise UserError(f"--config was given {len(found)} times: {', '.join(found)}.", "Give it once.")
    if found and not found[0]:
        raise UserError("--config names no file.", f"Write --config=NAME; installed: {_installed()}.")
    return (found[0] if found else None), rest


def _check_overrides(argv: Sequence[str], spec: str, settings: ConfigDict) -> None:
    """Raises UserError when an override names a key that the config does not have, or a whole section."""
    for word in argv[1:]:
        match = _OVERRIDE.match(word)
        if match is None:
            continue
        name, node, section = match.group(1), settings, ""
        for part in name.split("."):
            if not isinstance(node, ConfigDict):
                raise UserError(f"`{section}` is a value, not a section of {spec}.", f"Write --config.{section}=VALUE.")
            if part not in node:
                raise _unknown_key(name, section, part, node, spec, settings)
            node = node[part]
            section = f"{section}.{part}".lstrip(".")
        if isinstance(node, ConfigDict):
            example = f"--config.{name}.{next(iter(node), 'KEY')}=VALUE"
            raise UserError(f"`{name}` is a section of {spec}, not a value.", f"Set its keys one by one: {example}.")
        kind = config_path.get_type(name, settings)
        if kind not in (bool, int, float, str, tuple):
            raise UserError(f"`{name}` of {spec} holds {node!r}, which says no type to check a flag against.",
                            "Change it in the file (config_dict.placeholder(TYPE) makes a typed None).")


def _unknown_key(name: str, section: str, part: str, node: ConfigDict, spec: str, settings: ConfigDict) -> UserError:
    """The error for an override of a key that is not there: names the likeliest meant one, here or elsewhere."""
    new = new_name(name)
    if new is not None and new in flatten(settings):
        return UserError(f"`config.{name}` is now `config.{new}`.", f"Write --config.{new}=VALUE.")
    every = list(flatten(settings))
    prefix = f"{section}." if section else ""
    if name == f"{prefix}{part}":
        near = [f"{prefix}{key}" for key in difflib.get_close_matches(part, list(node), n=1)]
    else:
        near = difflib.get_close_matches(name, every, n=1)
    near = near or [key for key in every if key.split(".")[-1] == name.split(".")[-1]]
    remedy = f"Did you mean --config.{near[0]}?" if near else f"The keys here are: {', '.join(node)}."
    return UserError(f"{spec} has no key `{name}`.", remedy)


def _parse_flags(argv: list[str], values: flags.FlagValues, settings: ConfigDict | None) -> None:
    """Parses our flags into `values` and `settings`, and the libraries' own (absl, Grain, …) into the global FLAGS."""
    try:
        if settings is not None:
            config_flags.DEFINE_config_dict("config", settings, flag_values=values, sys_argv=argv)
        rest = values(argv, known_only=True)
        rest = flags.FLAGS(rest, known_only=True)[1:]
    except flags.IllegalFlagValueError as error:
        raise _illegal_value(error, settings) from error
    except (flags.Error, TypeError) as error:
        raise UserError(f"{str(error).rstrip('.')}.", "See --help.") from error
    if not rest:
        return
    name = rest[0].lstrip("-").partition("=")[0]
    if not rest[0].startswith("-"):
        raise UserError(f"unexpected argument {rest[0]!r}.", "Flags are written --name=value; see --help.")
    if settings is None and re.match(r"(no)?config(\.|$)", name):
        raise UserError(f"this command takes no --{name}.", "See --help for its flags.")
    near = difflib.get_close_matches(name, list(values), n=1)
    raise UserError(f"unknown flag --{name}.", f"Did you mean --{near[0]}? See --help." if near else "See --help.")


def _illegal_value(error: flags.IllegalFlagValueError, settings: ConfigDict | None) -> UserError:
    match = re.match(r"flag --(?:no)?config\.(.*?)=(.*?): ", str(error), re.DOTALL)
    if match is None or settings is None:
        return UserError(f"{str(error).rstrip('.')}.", "See --help.")
    name, given = match.groups()
    now = config_path.get_value(name, settings)
    kind = config_path.get_type(name, settings).__name__
    return UserError(f"`{name}` takes {with_article(kind)}, not {given!r}.", f"It is {now!r} in the config file.")


def _check_tuples(values: flags.FlagValues, original: ConfigDict, settings: ConfigDict) -> None:
    """Raises UserError for an override whose elements are not of the one type that the file's tuple has.

    Whole numbers become floats in a tuple of floats, as they do outside of one.
    """
    for name, given in values["config"].override_values.items():  # type: ignore[attr-defined]
        before = config_path.get_value(name, original)
        kinds = {type(element) for element in before} if isinstance(before, tuple) else set()
        if len(kinds) != 1:
            continue
        kind = kinds.pop()
        if kind is float and all(type(element) in (int, float) for element in given):
            config_path.set_value(name, settings, tuple(float(element) for element in given))
        elif any(type(element) is not kind for element in given):
            what = f"`{name}` takes a tuple of {kind.__name__}, not {given!r}."
            raise UserError(what, f"It is {before!r} in the config file.")


def _installed() -> str:
    return ", ".join(config_names()) or "none"


# Help


def _help_text(
    doc: str, values: flags.FlagValues, spec: str | None, settings: ConfigDict | None, *, config: bool, workdir: bool
) -> str:
    lines = [doc.strip(), "", "Flags:"] if doc else ["Flags:"]
    rows = []
    if config:
        rows.append(("--config=NAME[:WORD]", f"a config file, or one of: {_installed()}"))
        rows.append(("--config.KEY=VALUE", "overrides one key; --config=NAME --help lists the keys"))
    for name in sorted(values, key=lambda n: (n in ("verbose", "help"), n)):
        flag = values[name]
        if name != flag.name or (name == "workdir" and not workdir):  # a short name of a listed flag; of no use here
            continue
        meaning = flag.help.partition(";\n")[0]  # after it absl says that the flag may be repeated
        default = "" if flag.default in (None, False, "", []) else f" (default: {flag.default})"
        rows.append((f"--{name}" if flag.boolean else f"--{name}=…", f"{meaning}{default}"))
    lines += _table(rows)
    if spec is not None and settings is not None:
        lines += ["", f"{spec}:", "", describe_config(spec) or "(no description)", "", "Keys:"]
        lines += _table([(f"--config.{key}", repr(value)) for key, value in flatten(settings).items()])
    return "\n".join(lines)


def _table(rows: Sequence[tuple[str, str]]) -> list[str]:
    width = max((len(left) for left, _ in rows), default=0)
    return [f"  {left:<{width}}  {right}" for left, right in rows]


# Work directory


def prepare_workdir(path: str | os.PathLike[str], flag: str = "workdir", *, bucket: bool = False) -> Path:
    """Makes the folder when it is missing, and proves that a file can be written in it.

    Of one in a bucket, where `bucket` allows it, the local folder that `cloud.mirror` will make and copy there.

    Raises UserError when it cannot; it names the flag that gave the folder.
    """
    what = "work directory" if flag == "workdir" else f"folder of --{flag}"
    if is_url(path) and bucket:
        split(str(path))
        return mirror.local_folder(str(path))
    if "://" in str(path):
        known = "gs:// and s3:// are the buckets that are known" if bucket else "this command writes to local folders"
        raise UserError(f"the {what} {str(path)!r} is not a folder of this machine; {known}.",
                        f"Name another one with --{flag}=….")
    folder = Path(path).expanduser()
    remedy = f"Name a folder that you may write to with --{flag}=…."
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except FileExistsError:
        raise UserError(f"the {what} {str(folder)!r} is a file.", remedy) from None
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"cannot write to the {what} {str(folder)!r}: {reason}.", remedy) from error
    return folder


def localise(
    values: flags.FlagValues, reads: Sequence[str], writes: Sequence[str], urls: Sequence[str],
    stack: contextlib.ExitStack,
) -> None:  # fmt: skip
    """Puts local paths in place of buckets into the flags `reads` and `writes`.

    Raises UserError for a bucket in a flag that is in none of the three, and for what cannot be read or written.
    """
    for name in values:
        given = values[name].value
        every = given if isinstance(given, list) else [given]
        if name == "config" or name.startswith("config.") or name in ("workdir", *urls):
            continue  # whoever reads them knows buckets
        if not any(isinstance(value, str) and is_url(value) for value in every):
            continue
        if name in writes:
            values[name].value = str(stack.enter_context(mirror.open_folder(given)))
        elif name in reads:
            found = [str(inputs.local(value)) if is_url(value) else value for value in every]
            values[name].value = found if isinstance(given, list) else found[0]
        else:
            raise UserError(f"--{name} of this command is a path of this machine, not {given!r}.",
                            "Copy it from the bucket, or to the bucket afterwards.")


# Libraries


def set_logging(verbose: bool) -> None:
    """Warnings and errors of absl, JAX and Orbax only; with `verbose` also what they log for information."""
    logging.set_verbosity(logging.INFO if verbose else logging.WARNING)


def set_up_jax() -> None:
    """Sets JAX up for a command: compiled programs are kept, and JAX_ENABLE_X64 changes no computation.

    Every array here has the dtype that it is given; with 64-bit defaults the loops over them would not type-check.
    """
    import jax  # here, so that --help and flag errors do not wait for it

    jax.config.update("jax_enable_x64", False)
    enable_compilation_cache()


def _finds_devices() -> bool:
    import jax

    try:
        return bool(jax.devices())
    except Exception:  # of many types, by backend and version
        return False


def enable_compilation_cache() -> Path | None:
    """Lets XLA keep compiled programs between runs; returns the folder, or None when there is none.

    The folder is `$IVR_JAX_CACHE`, or `~/.cache/ivr_jax/xla`.  A cache that JAX was already told of
    (JAX_COMPILATION_CACHE_DIR) stays; `IVR_JAX_CACHE=` (empty) and a folder that cannot be made mean no cache.
    """
    import jax

    if already := jax.config.values["jax_compilation_cache_dir"]:
        return Path(already)
    name = os.environ.get(CACHE_VARIABLE, "~/.cache/ivr_jax/xla")
    if not name:
        return None
    try:
        folder = Path(name).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        logging.warning("compiled programs are not kept between runs: %s", error)
        return None
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    return folder


def listen(host: str, port: int, flag: str = "--") -> socket.socket:
    """A bound socket; port 0 takes any free one.

    Raises:
      UserError: it is taken or no address of this machine; `flag` leads to the names of the flags in the remedy.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise UserError(f"{host!r} is not an address ({error}).", f"Name one with {flag}host=….") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen(128)
    except (OSError, OverflowError) as error:
        listener.close()
        why = getattr(error, "strerror", None) or error
        raise UserError(f"port {port} of {host} cannot be used: {why}.", f"Name another {flag}port=….") from error
    return listener
