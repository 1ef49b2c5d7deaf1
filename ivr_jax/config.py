"""Configurations: found by name, loaded from Python files, checked, saved beside a run, compared when it resumes.

A config file has a docstring (paper, cost, command) and one function, `get_config()` or `get_config(word)`, which
returns an `ml_collections.ConfigDict` of plain values: numbers, texts, true/false, and tuples of them.  It is a module
of its folder, so one config can start from a neighbour: `from . import micro_base`.  Every default is there.

A section of a config becomes a dataclass (`as_dataclass`) that derives from `Section`.  Its annotations say what each
value may be, and are checked whenever one is made:

    @dataclasses.dataclass(frozen=True)
    class LoraOptions(Section, name="lora"):
        rank: Count
        dropout: Annotated[float, Range(0, below=1)]
        kind: Annotated[str, OneOf("q", "k", "v")]
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any

from ml_collections import ConfigDict, config_dict

from ivr_jax import files
from ivr_jax.errors import UserError

CONFIG_FILE = "config.json"
_PACKAGE = Path(__file__).resolve().parent


def config_folders() -> list[Path]:
    """Where bare config names are looked up: beside the package in a checkout, inside it when installed."""
    checkout = _PACKAGE.parent
    folders = [checkout / "configs"] if (checkout / "setup.py").is_file() else []
    return [folder for folder in (*folders, _PACKAGE / "configs") if folder.is_dir()]


def config_names() -> list[str]:
    """The bare names that `resolve_config` knows, sorted."""
    names = {file.stem for folder in config_folders() for file in folder.glob("*.py")}
    return sorted(name for name in names if not name.startswith("_"))


def resolve_config(name: str) -> Path:
    """The file meant by `name`: a path, or a bare name (`micro_sft`, `configs/micro_sft.py`) of an installed config."""
    path = Path(name)
    if path.is_file():
        return path
    if path.parent in (Path(), Path("configs")):
        for folder in config_folders():
            candidate = folder / f"{path.name.removesuffix('.py')}.py"
            if candidate.is_file():
                return candidate
    known = config_names()
    near = difflib.get_close_matches(path.name.removesuffix(".py"), known, n=1)
    others = f"Name a file, or one of: {', '.join(known) or 'none installed'}."
    raise UserError(f"there is no config file {name!r}.", f"Did you mean --config={near[0]}?" if near else others)


def load_config(spec: str) -> ConfigDict:
    """What `get_config` of the file `path_or_name[:argument]` returns, not yet locked."""
    name, colon, argument = spec.partition(":")
    path = resolve_config(name)
    module = _config_module(path)
    if not callable(getattr(module, "get_config", None)):
        raise UserError(f"{path} has no function get_config().", "Add one that returns an ml_collections.ConfigDict.")
    arguments = (argument,) if colon else ()
    try:
        inspect.signature(module.get_config).bind(*arguments)
    except TypeError:
        takes = f"takes no argument, but got {argument!r} after the colon" if colon else "needs an argument"
        raise UserError(f"{path} {takes}.", f"See --config={name} --help.") from None
    settings = _run_config_code(path, lambda: module.get_config(*arguments))
    if not isinstance(settings, ConfigDict):
        kind = type(settings).__name__
        raise UserError(f"{path}: get_config() returned {with_article(kind)}.", "Return an ml_collections.ConfigDict.")
    try:
        flatten(settings)
    except config_dict.RequiredValueError as error:
        raise UserError(f"{path}: {str(error).rstrip('.')}.", "Give every key a value in the file.") from error
    check_names(settings, str(path))
    return settings


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`; `above` and `below` are bounds that are not reached."""

    least: float = -math.inf
    most: float = math.inf
    above: float = -math.inf
    below: float = math.inf

    def __contains__(self, value: Any) -> bool:
        return self.least <= value <= self.most and self.above < value < self.below

    def __str__(self) -> str:
        bounds = {"at least": self.least, "at most": self.most, "above": self.above, "below": self.below}
        return " and ".join(f"{word} {bound:.10g}" for word, bound in bounds.items() if math.isfinite(bound))


class OneOf:
    """Some values by name."""

    def __init__(self, *values: Any):
        self._values = values

    def __contains__(self, value: Any) -> bool:
        return value in self._values

    def __str__(self) -> str:
        return f"one of {', '.join(map(repr, self._values))}"


Positive = Annotated[int, Range(1)]
Count = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
NotNegative = Annotated[float, Range(0)]


class Section:
    """Base of the dataclasses that hold a part of a config; `name` is that part's, for errors.

    Raises:
      UserError: a value is not of its annotation's type (an int is a float too), not finite, or out of its range.
    """

    _prefix: typing.ClassVar[str] = ""

    def __init_subclass__(cls, name: str = "", **options: Any):
        super().__init_subclass__(**options)
        cls._prefix = f"{name}." if name else ""

    def __post_init__(self) -> None:
        for field, hint in typing.get_type_hints(type(self), include_extras=True).items():
            if not field.startswith("_"):
                check_value(self._prefix + field, getattr(self, field), hint)


def check_value(key: str, value: Any, hint: Any) -> None:
    """Raises UserError unless `value` fits the annotation `hint`: a type, an optional one, or one with a range."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if type(None) in options:
        if value is None:
            return
        (hint,) = (option for option in options if option is not type(None))
    kind, *ranges = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
    word = {int: "a whole number", float: "a finite number", str: "a text", bool: "true or false"}.get(kind)
    if word is None:
        return
    allowed = (int, float) if kind is float else kind
    fits = isinstance(value, allowed) and isinstance(value, bool) == (kind is bool)
    if not fits or kind is float and not abs(value) <= sys.float_info.max or not all(value in part for part in ranges):
        raise UserError(f"`{key}` is {value!r}.", f"Give {', '.join([word, *map(str, ranges)])}.")


def as_dataclass(kind: type, section: Mapping[str, Any] | ConfigDict) -> Any:
    """The dataclass `kind` from a section of a config; every field must be in the section, and no other key.

    A field whose default is None is a feature that is off, and may be left out.
    """
    fields = {field.name for field in dataclasses.fields(kind)}
    off = {field.name for field in dataclasses.fields(kind) if field.default is None}
    if fields != set(section) | off:
        wrong = ", ".join(sorted(fields ^ (set(section) | off)))
        what = f"the config section for {kind.__name__} lacks, or should not have: {wrong}."
        raise UserError(what, "Correct the config file.")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in section.items()})


def check_least(config: ConfigDict, names: Iterable[str], least: int = 1) -> None:
    """Raises UserError for a key among `names` that `config` has, and that is below `least`."""
    for name in names:
        if name in config:
            check_value(name, config[name], Annotated[int, Range(least)])


def check_numbers(config: ConfigDict) -> None:
    """Raises UserError for a number that no config can mean: NaN, infinity, a seed out of range."""
    for key, value in flatten(config).items():
        for number in value if isinstance(value, tuple) else (value,):
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"`{key}` is {number}.", "Give a finite number.")
        if key.split(".")[-1] == "seed" and isinstance(value, int) and not 0 <= value < 2**32:
            raise UserError(f"`{key}` is {value}.", "Use a seed from 0 to 4294967295.")


RENAMED = {  # key of an earlier version -> its name now
    "minibatch": "micro_batch",
    "splits": "num_minibatches",
    "updates": "num_iterations",
    "accumulation": "grad_accum_steps",
    "chunk": "loss_chunk_tokens",
    "keep": "max_checkpoints",
    "optimizer.peak": "optimizer.learning_rate",
    "optimizer.final": "optimizer.final_learning_rate",
    "optimizer.warmup": "optimizer.warmup_ratio",
    "grpo.kl": "grpo.beta",
    "grpo.normalisation": "grpo.loss_type",
    "grpo.constant": "grpo.dr_grpo_length",
    "grpo.sampler_cap": "grpo.tis_cap",
    "reward.scale": "reward.score_map",
    "reward.evaluations": "reward.step_reward_evals",
    "reward.absent": "reward.missing_value",
    "reward.bonus_floor": "reward.bonus_min_outcome",
    "model.gather_tensor": "model.fsdp_over_tensor",
    "watch.least_contrast": "monitor.min_frac_nonzero_std",
    "watch.least_gradient": "monitor.min_grad_norm",
    "watch.most_mode": "monitor.max_mode_share",
    "watch.most_drift": "monitor.max_drift",
    "watch.most_missing": "monitor.max_missing",
    "watch": "monitor",
    "group": "group_size",
}
RENAMED_VALUES = {  # by the key's name now
    "grpo.group": {"trajectory": "prompt"},
    "grpo.loss_type": {"sequence": "grpo", "token": "bnpo", "constant": "dr_grpo"},
    "reward.score_map": {"fifth": "div5"},
    "reward.step_reward_evals": {"literal": "none"},
}


def new_name(key: str) -> str | None:
    """What the dotted `key` of an earlier version is called now; None for a key that was not renamed."""
    section, dot, rest = key.partition(".")
    return RENAMED.get(key) or (f"{RENAMED[section]}.{rest}" if dot and section in RENAMED else None)


def check_names(config: Mapping[str, Any] | ConfigDict, file: str) -> None:
    """Raises UserError for a key or a value of an earlier version, and says what it is called now."""
    for key, value in flatten(config).items():
        new = new_name(key)
        if new is not None:
            raise UserError(f"`config.{key}` is now `config.{new}`.", f"Rename it in {file}.")
        now = RENAMED_VALUES.get(key, {}).get(value) if isinstance(value, str) else None
        if now is not None:
            raise UserError(f"`config.{key}` {value!r} is now {now!r}.", f"Change it in {file}.")


def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    """The nested `values` of an earlier version with the names of this one."""
    result: dict[str, Any] = {}
    for key, value in flatten(values).items():
        key = new_name(key) or key
        *sections, last = key.split(".")
        node = result
        for section in sections:
            node = node.setdefault(section, {})
        node[last] = RENAMED_VALUES.get(key, {}).get(value, value) if isinstance(value, str) else value
    return result


def flatten(config: Mapping[str, Any] | ConfigDict, prefix: str = "") -> dict[str, Any]:
    """`{"a": {"b": 1}}` as `{"a.b": 1}`, keys in order."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, (Mapping, ConfigDict)):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _config_module(path: Path) -> types.ModuleType:
    """Runs the file as a module of a package made for its folder, so that relative imports find neighbours."""
    folder = path.resolve().parent
    package_name = "ivr_jax_configs_" + re.sub(r"\W", "_", str(folder))
    package = sys.modules.setdefault(package_name, types.ModuleType(package_name))
    package.__path__ = [str(folder)]
    spec = importlib.util.spec_from_file_location(f"{package_name}.{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{path} is not a Python file.", "A config is a .py file with a function get_config().")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    _run_config_code(path, lambda: spec.loader.exec_module(module))
    return module


def _run_config_code(path: Path, code: Callable[[], Any]) -> Any:
    """Calls `code`, which runs the user's config file, and says in one line where it failed."""
    try:
        return code()
    except UserError as error:
        raise UserError(f"{path}: {error.what}", error.remedy) from error
    except SyntaxError as error:
        raise UserError(f"{error.filename}, line {error.lineno}: {error.msg}.", "Correct the config file.") from error
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{frame.filename}, line {frame.lineno}"
        raise UserError(f"{where}: {type(error).__name__}: {error}.", f"Correct the config file {path}.") from error


def describe_config(spec: str) -> str:
    """The docstring of the file that `path_or_name[:argument]` names, or ""."""
    return (_config_module(resolve_config(spec.partition(":")[0])).__doc__ or "").strip()


def with_article(word: str) -> str:
    """"an int", "a float"."""
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


def save_config(workdir: Path, config: ConfigDict) -> None:
    """Writes `config.json` (tuples as lists), whole or not at all."""
    for key, value in flatten(config).items():
        try:
            json.dumps(value)
        except TypeError:
            raise UserError(f"the config key `{key}` holds {with_article(type(value).__name__)}.",
                            "Use numbers, texts, true/false and tuples of them.") from None
    files.write_json(workdir / CONFIG_FILE, config.to_dict())


def saved_config(workdir: Path) -> dict[str, Any] | None:
    """The nested values of `config.json`, with the key names of this version; None when the folder has none.

    Raises UserError when it is damaged.
    """
    path = workdir / CONFIG_FILE
    try:
        value = files.read_json(path, "Restore the file, or use another --workdir.")
    except FileNotFoundError:
        return None
    if not isinstance(value, dict):
        raise UserError(f"{path} does not hold a configuration.", "Restore the file, or use another --workdir.")
    return renamed(value)


def check_same_config(saved: Mapping[str, Any], config: ConfigDict, ignore: Iterable[str] = ()) -> None:
    """Raises UserError listing the keys in which a run's saved config and `config` differ.

    Args:
      saved: what `saved_config` returned.
      config: the configuration asked for now.
      ignore: dotted keys, or whole sections, that may change between two parts of one run.
    """
    before = flatten(saved)
    now = flatten(json.loads(json.dumps(config.to_dict())))
    skipped = tuple(ignore)
    differing = [
        key
        for key in dict.fromkeys((*before, *now))
        if (key in before) != (key in now) or before.get(key) != now.get(key)
        if not any(key == name or key.startswith(f"{name}.") for name in skipped)
    ]
    if not differing:
        return

    def show(values: Mapping[str, Any], key: str) -> str:
        return json.dumps(values[key]) if key in values else "absent"

    shown = [f"{key} was {show(before, key)}, is {show(now, key)}" for key in differing[:5]]
    more = f"; and {len(differing) - 5} more" if len(differing) > 5 else ""
    raise UserError(f"the work directory belongs to a run with another configuration: {'; '.join(shown)}{more}.",
                    "Use another --workdir, or the configuration that the run was started with.")


def claim_workdir(
    workdir: Path, config: ConfigDict, *, resuming: bool, ignore: Iterable[str] = (), write: bool = True
) -> None:
    """Checks, before a run starts or resumes in `workdir`, that the folder is this configuration's; saves it there.

    Args:
      workdir: an existing folder.
      config: the configuration asked for now.
      resuming: whether the folder holds a checkpoint; without one, an earlier configuration is simply replaced.
      ignore: see `check_same_config`.
      write: False for the second and further processes of one run, which only check.

    Raises:
      UserError: there is a checkpoint, and it is another configuration's, or nobody knows whose.
    """
    if resuming:
        saved = saved_config(workdir)
        if saved is None:
            raise UserError(f"{workdir} holds a checkpoint, but no {CONFIG_FILE} that says how it was made.",
                            "Restore the file, or use another --workdir.")
        check_same_config(saved, config, ignore)
    if write:
        save_config(workdir, config)
