"""How fast a public benchmark is judged, many calls in flight against one, and drawn, batched against one by one.

    python benchmarks/evaluation_throughput.py judge --latency=0.2 --in_flight=96
    python benchmarks/evaluation_throughput.py generate

`judge` asks a scripted judge behind HTTP, in a process of its own, `--calls` questions about small images with
`--in_flight` calls at a time, and `--alone` of them one at a time.  `generate` draws answers of a tiny model with
random weights through the rollout engine, `--slots` at a time and one at a time; compilation is left out.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import sys
import tempfile
import time
from pathlib import Path

# From here on what lies in the checkout is imported: the path must come first.
sys.path[:0] = [str(Path(__file__).resolve().parent.parent / folder) for folder in ("tests", "")]

import numpy as np  # noqa: E402


def serve(pipe, latency: float) -> None:
    import benchmark_runs
    from openai_service import Behaviour

    with benchmark_runs.judging(behaviour=Behaviour(latency=latency)) as (service, url):
        pipe.send(url)
        pipe.recv()
        pipe.send(service.log.most_in_flight)


def judge(wanted: argparse.Namespace, folder: Path) -> None:
    from ivr_jax import cli
    from ivr_jax.config import as_dataclass
    from ivr_jax.evaluate.benchmarks import judges, judging, registry
    from ivr_jax.evaluate.benchmarks.interface import Item
    from ivr_jax.images import save_png
    from ivr_jax.services.config import ServiceConfig
    from ivr_jax.services.journal import Journal

    benchmark, tasks = registry.load("wise"), []
    for number in range(wanted.calls + wanted.alone):
        data = {"Explanation": f"Fact {number}."}
        item = Item(str(number), f"Prompt {number}.", "culture", (), data)
        path = folder / f"{number}.png"
        save_png(path, np.full((64, 64, 3), number % 256, np.uint8))
        (question,) = benchmark.questions(item, 0, "chat")
        tasks.append(judging.Task(item, 0, question, path))
    here, there = multiprocessing.Pipe()
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(there, wanted.latency))
    server.start()
    url, rates = here.recv(), []
    for asked, in_flight in ((tasks[: wanted.alone], 1), (tasks[wanted.alone :], wanted.in_flight)):
        config = cli.config_from_argv([
            "--config=benchmark", "--config.judge.model=scripted", f"--config.judge.base_url={url}",
            "--config.judge.key_variable=", f"--config.judge.in_flight={in_flight}",
        ])  # fmt: skip
        workdir = folder / f"run {in_flight}"
        workdir.mkdir()

        async def run(asked=asked, config=config, workdir=workdir) -> tuple[float, float]:
            with Journal(workdir / "cache") as journal:
                one = judges.ChatJudge(benchmark, as_dataclass(ServiceConfig, config.judge), journal)
                clock, busy = time.perf_counter(), time.process_time()
                found = await judging.judge_all(asked, one, folder, workdir, {})
                seconds, busy = time.perf_counter() - clock, time.process_time() - busy
                await one.close()
            assert len(found) == len(asked) and all(judgement.value for judgement in found.values())
            return seconds, busy

        seconds, busy = asyncio.run(run())
        rates.append(len(asked) / seconds)
        print(f"judge: {wanted.latency:g} s a call, {in_flight} in flight: {len(asked)} calls in {seconds:.1f} s, "
              f"{rates[-1]:.1f} calls/s, {1000 * busy / len(asked):.1f} ms of CPU a call", flush=True)  # fmt: skip
    here.send(None)
    print(f"judge: {rates[1] / rates[0]:.1f} times as many calls/s; most in flight at the server: {here.recv()}")
    server.join()


def generate(wanted: argparse.Namespace, folder: Path) -> None:
    import benchmark_model

    from ivr_jax.checkpoints import system as systems
    from ivr_jax.evaluate.benchmarks import generation, registry
    from ivr_jax.evaluate.benchmarks.interface import Item
    from ivr_jax.protocol.grammar import Grammar, GrammarOptions
    from ivr_jax.sampling.engine import EngineOptions
    from ivr_jax.sampling.logits_processors import SamplingOptions

    system = systems.load(benchmark_model.write_model(folder / "model"))
    grammar = Grammar(system.tokenizer, GrammarOptions(text_cap=3))
    benchmark, rates = registry.load("wise"), []
    items = [Item(str(number), f"Prompt {number:03d}.", "culture") for number in range(wanted.answers)]
    for slots in (1, wanted.slots):
        chosen = items[: wanted.alone] if slots == 1 else items
        plan = generation.GenerationPlan(1, 0, slots, 0, 384)
        for part in ("compile", "measure"):
            workdir = folder / f"{part} {slots}"
            workdir.mkdir()
            clock = time.perf_counter()
            generation.generate(system, grammar, benchmark, chosen, folder, workdir, plan, SamplingOptions(),
                                EngineOptions(slots=slots, growth=1), {})  # fmt: skip
            seconds = time.perf_counter() - clock
        rates.append(len(chosen) / seconds)
        print(f"generate: {slots} at a time: {len(chosen)} answers in {seconds:.1f} s, {rates[-1]:.2f} answers/s",
              flush=True)  # fmt: skip
    print(f"generate: {rates[1] / rates[0]:.1f} times as many answers/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("judge", "generate"))
    parser.add_argument("--latency", type=float, default=0.2)
    parser.add_argument("--in_flight", type=int, default=64)
    parser.add_argument("--calls", type=int, default=1500)
    parser.add_argument("--alone", type=int, default=20)
    parser.add_argument("--slots", type=int, default=32)
    parser.add_argument("--answers", type=int, default=64)
    wanted = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        {"judge": judge, "generate": generate}[wanted.what](wanted, Path(folder))


if __name__ == "__main__":
    main()
