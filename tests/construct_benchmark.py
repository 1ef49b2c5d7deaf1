"""What construction over HTTP stands and how fast it is, measured against the service of `openai_service`.

    python tests/construct_benchmark.py faults      500 samples, 20% mixed faults: equal to the run without
    python tests/construct_benchmark.py kills       25 kills at random moments: equal to the run without, no call twice
    python tests/construct_benchmark.py throughput  200 ms a call, 64 in flight, against one call at a time
    python tests/construct_benchmark.py memory      20,000 samples: resident memory on the way
    python tests/construct_benchmark.py photographs hand-written prompts on scikit-image's photographs, to a gallery

Each prints what it measured and fails when a promise is broken; `--folder=DIR` keeps what was written.
"""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from construct_worker import KEY, arguments, contents, kill, recorded, start, write_samples
from openai_service import Behaviour, OpenAIService, serving
from photographs import photograph

from ivr_jax.images import save_png

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


def faults(folder: Path) -> None:
    count = 500
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


def kills(folder: Path) -> None:
    samples, dice = write_samples(folder, 150), random.Random(3)
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


def throughput(folder: Path) -> None:
    rates = {}
    samples = {1: write_samples(folder / "few", 6), 64: write_samples(folder / "many", 600)}
    with apart(0.2) as url:
        for in_flight, file in samples.items():
            command = arguments(url, file, folder / f"run{in_flight}", concurrency=in_flight,
                                services={"in_flight": in_flight})
            if in_flight == 64:  # so that 64 calls are on their way in all, of both services together
                command += ["--config.services.analyzer.in_flight=54", "--config.services.generator.in_flight=10"]
            seconds = run(command, folder / "log")
            summary = json.loads((folder / f"run{in_flight}" / "summary.json").read_text())
            calls = sum(service["answers"] for service in summary["services"].values())
            rates[in_flight] = calls / seconds
            print(f"throughput: {in_flight} in flight: {summary['samples']} samples, {calls:.0f} calls "
                  f"in {seconds:.1f} s, {rates[in_flight]:.1f} calls/s, {summary['samples'] / seconds:.2f} samples/s")
    print(f"throughput: ratio {rates[64] / rates[1]:.1f}")


def memory(folder: Path) -> None:
    samples = write_samples(folder, 20_000)
    with apart(0.0) as url:
        process = start(arguments(url, samples, folder / "run"), folder / "log")
        sizes: list[int] = []
        while process.is_alive():
            process.join(10)
            if process.is_alive():
                pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
                sizes.append(pages * os.sysconf("SC_PAGESIZE") >> 20)
                print(f"memory: {len(sizes) * 10} s: {sizes[-1]} MiB", flush=True)
    assert process.exitcode == 0, (folder / "log").read_text()
    middle, end = sizes[len(sizes) // 2], max(sizes[len(sizes) // 2 :])
    print(f"memory: 20000 samples; after a tenth {sizes[len(sizes) // 10]} MiB, half-way {middle}, most after {end}")


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
    """The service in a process of its own, so that it shares no interpreter with what is measured."""

    def __init__(self, latency: float):
        self._context = multiprocessing.get_context("spawn")
        self._address, there = self._context.Pipe()
        self._process = self._context.Process(target=serve, args=(latency, there), daemon=True)

    def __enter__(self) -> str:
        self._process.start()
        return self._address.recv()

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
    given = parser.parse_args()
    for place in folders(given.folder):
        globals()[given.what](place)
