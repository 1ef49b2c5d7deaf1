"""Programs that a command compiles, how often and for how long.

    python benchmarks/compilations.py train --config=micro_rl --workdir=/tmp/rl --config.init=micro --config.steps=2
    python benchmarks/compilations.py evaluate --config=micro_evaluate --workdir=/tmp/eval --config.checkpoint=micro
    python benchmarks/compilations.py --cache=~/.cache/ivr_jax/xla --since=04:36:00 --until=05:00:00

The first word is a command of the package, the rest its arguments; IVR_JAX_CACHE= (empty) compiles everything anew.  A
program counts once for each of its shapes.  With `--cache` nothing is run: the programs that a command, or all of
`make demo`, wrote into the cache between two times of the same day are counted: those that took half a second or more.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import pathlib
import re
import runpy
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))


def watch(arguments: list[str]) -> None:
    """Runs a command of the package in this process, and prints what it compiled."""
    import jax

    seconds: dict[str, list[float]] = collections.defaultdict(list)

    def on_duration(event: str, duration: float, **about: object) -> None:
        if event.endswith("backend_compile_duration"):
            seconds[str(about.get("fun_name", "?"))].append(duration)

    jax.monitoring.register_event_duration_secs_listener(on_duration)
    sys.argv = arguments
    try:
        runpy.run_module(f"ivr_jax.{arguments[0]}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if ended.code:
            raise
    finally:
        _show({name: (len(each), sum(each)) for name, each in seconds.items()})


def _show(found: dict[str, tuple[int, float]]) -> None:
    for name, (count, total) in sorted(found.items(), key=lambda item: -item[1][1]):
        print(f"{count:5} x {total:8.1f} s  {name}")
    print(f"{sum(c for c, _ in found.values()):5}   {sum(t for _, t in found.values()):8.1f} s  in all")


def in_cache(folder: pathlib.Path, since: datetime.time, until: datetime.time) -> dict[str, int]:
    """How many programs of each name a persistent cache got between two times of today."""
    found: collections.Counter[str] = collections.Counter()
    for file in folder.expanduser().glob("*-cache"):
        written = datetime.datetime.fromtimestamp(file.stat().st_mtime).time()
        if since <= written <= until:
            found[re.sub(r"-[0-9a-f]{20,}-cache$", "", file.name)] += 1
    return dict(found.most_common())


def main() -> None:
    if sys.argv[1:] and not sys.argv[1].startswith("-"):
        watch(sys.argv[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=pathlib.Path, required=True)
    parser.add_argument("--since", type=datetime.time.fromisoformat, default=datetime.time.min)
    parser.add_argument("--until", type=datetime.time.fromisoformat, default=datetime.time.max)
    options = parser.parse_args()
    found = in_cache(options.cache, options.since, options.until)
    for name, count in found.items():
        print(f"{count:5} x  {name}")
    print(f"{sum(found.values()):5}    in all")


if __name__ == "__main__":
    main()
