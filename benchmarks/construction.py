"""What construction over HTTP stands and how fast it is, measured against the service of `openai_service`.

    python benchmarks/construction.py faults      500 samples, 20% mixed faults: equal to the run without
    python benchmarks/construction.py kills       25 kills at random moments: equal to the run without, no call twice
    python benchmarks/construction.py throughput  64 calls in flight against one at a time, --latency=0.2 s a call
    python benchmarks/construction.py memory      --count=20000 samples: resident memory on the way
    python benchmarks/construction.py photographs hand-written prompts on scikit-image's photographs, to a gallery

Each prints what it measured and fails when a promise is broken; `--folder=DIR` keeps what was written.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import multiprocessing
import os
import random
import re
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

# From here on what lies in the checkout is imported: the path must come first.
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("tests", "")]

from construct_worker import KEY, arguments, contents, kill, recorded, start, write_samples  # noqa: E402
from openai_service import Behaviour, OpenAIService, serving  # noqa: E402
from photographs import photograph  # noqa: E402

from ivr_jax.images import save_png  # noqa: E402

PHOTOGRAPHS = [
    ("portrait", "astronaut", "Turn the portrait grey and leave the pose as it is. [direct]"),
    ("cup", "coffee", "Mirror the cup of coffee. [reflection 1]"),
    ("cat", "chelsea", "Mirror the cat, then make it dusk. [multi 1]"),
    ("rocket", "rocket", "Make the sky at the launch pad like dusk. [reflection 2]"),
    ("tissue", "immunohistochemistry", "Show the slide as a negative, in warm colours. [multi 2]"),
    ("retina", "retina", "Draw the retina as a poster. [reflection 3]"),
    ("stars", "hubble_deep_field", "Make the brightest galaxy a little more itself. [ambiguous]"),
]


def run(command: list[str], log: Path) -> float:
    """The command in a process of its own; its seconds."""
    begun = time.monotonic()
    process = start(command, log)
    process.join()
    assert process.exitcode == 0, log.read_text()
    return time.monotonic() - begun


def equal(folder: Path, one: str, other: str) -> bool:
    return contents(folder / one / "dataset") == contents(folder / other / "dataset")


def faults(folder: Path, count: int) -> None:
    samples, behaviour = write_samples(folder, count), Behaviour(key=KEY, hang=6.0)
    service = OpenAIService(behaviour)
    with serving(service) as url:
        run(arguments(url, samples, folder / "calm"), folder / "log")
        calls, behaviour.fault_rate = sum(service.log.answered.values()), 0.2
        run(arguments(url, samples, folder / "stormy", services={"timeout": 4.0}), folder / "log")
    summary = json.loads((folder / "stormy" / "summary.json").read_text())
    ended = sum(summary["constructed"].values()) + sum(summary["dropped"].values())
    print(f"faults: {count} samples, {calls} questions, {sum(service.log.faults.values())} faults "
          f"{dict(service.log.faults)}; ended {ended}, pending {len(summary['pending'])}, "
          f"equal to the run without faults: {equal(folder, 'calm', 'stormy')}")
    assert ended == count and equal(folder, "calm", "stormy")


def kills(folder: Path, count: int) -> None:
    samples, dice = write_samples(folder, count), random.Random(3)
    service = OpenAIService(Behaviour(key=KEY, latency=0.05))
    answered: dict[str, int] = {}
    with serving(service) as url:
        run(arguments(url, samples, folder / "calm"), folder / "log")
        calm = service.log.answered
        several = {question for question, n in calm.items() if n > 1}  # tries of a step, which are drawn alike
        service.log.answered = collections.Counter()
        command, killed = arguments(url, samples, folder / "killed", concurrency=4), 0
        while killed < 25:
            moment = dice.uniform(0, 0.1), service.log.more(dice.randrange(60))
            alive = kill(start(command, folder / "log"), *moment)
            assert alive, "the run ended before it was killed often enough"
            killed += 1
            for question in recorded(folder / "killed" / "journal") - several:
                answered.setdefault(question, service.log.answered[question])
        run(command, folder / "log")
    repeated = {q: n for q, n in answered.items() if service.log.answered[q] != n}
    twice = sum(n - calm[question] for question, n in service.log.answered.items())
    print(f"kills: {killed} kills, {len(answered)} answers on record at one of them, of these asked again: "
          f"{len(repeated)}; in flight at a kill and paid again: {twice}; "
          f"equal to the run without: {equal(folder, 'calm', 'killed')}")
    assert not repeated and equal(folder, "calm", "killed")


def throughput(folder: Path, count: int, latency: float) -> None:
    """The same mix of samples both ways: 8 one call at a time, `count` with 64 calls in flight of both services."""
    rates: dict[int, tuple[float, float]] = {}
    with apart(latency) as (url, server):
        for in_flight, number in ((1, 8), (64, count)):
            samples = write_samples(folder / f"samples{in_flight}", number)
            command = arguments(url, samples, folder / f"run{in_flight}", concurrency=in_flight,
                                services={"in_flight": in_flight})
            if in_flight == 64:
                command += ["--config.services.analyzer.in_flight=54", "--config.services.generator.in_flight=10"]
            begun, served = time.monotonic(), processor_seconds(server)
            process, used = start(command, folder / "log"), 0.0
            while process.is_alive():
                process.join(0.05)
                used = processor_seconds(process.pid) or used
            assert process.exitcode == 0, (folder / "log").read_text()
            seconds, served = time.monotonic() - begun, processor_seconds(server) - served
            summary = json.loads((folder / f"run{in_flight}" / "summary.json").read_text())
            calls = sum(service["answers"] for service in summary["services"].values())
            rates[in_flight] = number / seconds, calls / seconds
            print(f"throughput: {latency:g} s a call, {in_flight} in flight: {number} samples, {calls:.0f} calls in "
                  f"{seconds:.1f} s: {number / seconds:.3f} samples/s, {calls / seconds:.1f} calls/s; processor time "
                  f"a call: {1e3 * used / calls:.2f} ms here, {1e3 * served / calls:.2f} ms in the service; load "
                  f"{os.getloadavg()[0]:.1f}", flush=True)
    ratios = [many / one for one, many in zip(rates[1], rates[64], strict=True)]
    print(f"throughput: samples/s {ratios[0]:.1f} times as many, calls/s {ratios[1]:.1f} times")


def processor_seconds(pid: int) -> float:
    """What a process has used so far; 0 when it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(folder: Path, count: int) -> None:
    samples = write_samples(folder, count, ends=(*["direct"] * 10, "reflection 1", "multi 1"))
    sizes: list[tuple[int, int]] = []
    with apart(0.0) as (url, _):
        process, begun = start(arguments(url, samples, folder / "run"), folder / "log"), time.monotonic()
        while process.is_alive():
            process.join(2)
            with contextlib.suppress(OSError, IndexError, ValueError):
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                done = re.findall(rf"(\d+)/{count} ", (folder / "log").read_text())
                sizes.append((int(done[-1]), pages * os.sysconf("SC_PAGESIZE") >> 20))
    assert process.exitcode == 0, (folder / "log").read_text()
    summary = json.loads((folder / "run" / "summary.json").read_text())
    calls = sum(service["answers"] for service in summary["services"].values())
    for tenth in range(1, 11):
        seen = [size for done, size in sizes if tenth - 1 <= 10 * done / count <= tenth]
        print(f"memory: up to {tenth * count // 10} samples: at most {max(seen, default=0)} MiB resident")
    print(f"memory: {summary['samples']} samples, {calls:.0f} calls, {time.monotonic() - begun:.0f} s; the whole "
          f"dataset, folders not: at most {max(size for _, size in sizes)} MiB")


def photographs(folder: Path) -> None:
    entries = []
    for key, name, prompt in PHOTOGRAPHS:
        save_png(folder / "photographs" / f"{name}.png", photograph(name, 384))
        entries.append({"key": key, "src_path": f"photographs/{name}.png", "edit_prompt": prompt, "edit_path": None})
    entries.append({
        "key": "cat_and_cup", "src_path": ["photographs/chelsea.png", "photographs/coffee.png"],
        "edit_prompt": "Show the cat beside the cup, in warm colours. [reflection 1]", "edit_path": None,
    })
    entries.append({
        "key": "own_drawing", "src_path": "photographs/astronaut.png", "edit_prompt": "Make it grey. [reflection 1]",
        "edit_path": "photographs/astronaut.png",
    })
    (folder / "samples.json").write_text(json.dumps(entries, indent=1))
    with serving(OpenAIService(Behaviour(key=KEY))) as url:
        command = arguments(url, folder / "samples.json", folder / "run", image_area=384 * 384, image_multiple=16,
                            folders=True, gallery=True)
        seconds = run(command, folder / "log")
    summary = json.loads((folder / "run" / "summary.json").read_text())
    print(f"photographs: {seconds:.1f} s, {summary['constructed']}, dropped {summary['dropped']}: "
          f"{folder / 'run' / 'gallery.html'}")


class apart:
    """The service in a process of its own, which shares no interpreter with what is measured; its URL and process id.
    """

    def __init__(self, latency: float):
        self._context = multiprocessing.get_context("spawn")
        self._address, there = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(latency, there), daemon=True)

    def __enter__(self) -> tuple[str, int]:
        self._process.start()
        return self._address.recv(), self._process.pid

    def __exit__(self, *_: object) -> None:
        self._process.kill()


def serve(latency: float, address) -> None:
    with serving(OpenAIService(Behaviour(key=KEY, latency=latency))) as url:
        address.send(url)
        threading.Event().wait()


def folders(given: str | None) -> Iterator[Path]:
    if given:
        Path(given).mkdir(parents=True, exist_ok=True)
        yield Path(given)
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("faults", "kills", "throughput", "memory", "photographs"))
    parser.add_argument("--folder")
    parser.add_argument("--count", type=int, help="of samples")
    parser.add_argument("--latency", type=float, default=0.2, help="seconds a call")
    given = parser.parse_args()
    counts = {"faults": 500, "kills": 150, "throughput": 800, "memory": 20_000}
    for place in folders(given.folder):
        count = given.count or counts.get(given.what)
        if given.what == "throughput":
            throughput(place, count, given.latency)
        elif given.what == "photographs":
            photographs(place)
        else:
            globals()[given.what](place, count)
