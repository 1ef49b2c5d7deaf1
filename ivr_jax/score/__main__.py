r"""Score rollouts of any trainer with the paper's reward or the released one, judged by a service.

    OPENAI_API_KEY=... python -m ivr_jax.score --config=configs/score.py --workdir=runs/score \
        --config.rollouts=rollouts.jsonl --config.preset=released      writes runs/score/scores.jsonl, a line a rollout
    OPENAI_API_KEY=... python -m ivr_jax.score --config=configs/score.py --workdir=runs/score --serve
                                                                       the same over HTTP, on 127.0.0.1:8330

A line of the input is a rollout: instruction, source_images, explanation, assistant_text, intermediate_steps,
final_image, reflections, and optionally `id` (copied to the output) and `group` (answers to one prompt, for the paper's
bonus).  A judgement that failed is *missing*, never a bad score; then the status is 3, and the same command asks for
what is missing alone: every answer of the judge is recorded in WORKDIR/journal.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags
from tqdm import tqdm

from ivr_jax import cli, files
from ivr_jax.config import as_dataclass
from ivr_jax.errors import UserError
from ivr_jax.score.scoring import PRESETS, Result, Scorer, named_scores, with_bonus
from ivr_jax.services.build import service_from_config
from ivr_jax.services.config import secret
from ivr_jax.services.journal import Journal
from ivr_jax.services.service import Service

MISSING = 3  # exit status: judgements are missing, run again
LOOPBACK = ("127.0.0.1", "localhost", "::1")


def read_rollouts(path: Path) -> list[Any]:
    """The JSON values of a file, one a line; blank lines are passed over.

    Raises:
      UserError: the file cannot be read, a line is no JSON, or there is none.
    """
    remedy = "Name a file with one JSON object a line: --config.rollouts=FILE."
    rollouts = [rollout for _, rollout in files.read_json_lines(path, remedy)]
    if not rollouts:
        raise UserError(f"{path} holds no rollout.", "Write one JSON object a line.")
    return rollouts


def services_of(config: Any, journal: Journal) -> list[Service]:
    """The judge of the config, and its fallback where there is one."""
    sections = [config.services.judge, *([config.services.fallback] if config.services.fallback.kind else [])]
    return [service_from_config(section, journal, i + 1 < len(sections)) for i, section in enumerate(sections)]


async def score_file(config: Any, rollouts: Sequence[Any], workdir: Path, journal: Journal) -> int | None:
    """Scores the rollouts of the file `config.rollouts` into `workdir/scores.jsonl`; returns the exit status."""
    source = Path(config.rollouts).expanduser()
    services = services_of(config, journal)
    root = Path(config.image_root).expanduser() if config.image_root else source.parent
    scorer = Scorer(services, config.preset, root, worst_for_failures=config.worst_for_failures,
                    concurrency=config.concurrency)
    try:
        with tqdm(total=len(rollouts), desc="score", unit="rollout") as bar:

            async def one(rollout: Any) -> Result:
                result = await scorer.score(rollout)
                bar.update()
                return result

            results = with_bonus(rollouts, await asyncio.gather(*map(one, rollouts)), scorer.options)
    finally:
        for service in services:
            await service.client.close()
    target = workdir / "scores.jsonl"
    lines = (json.dumps(score, ensure_ascii=False) + "\n" for score in named_scores(rollouts, results))
    files.write_file(target, "".join(lines))
    missing = sum(bool(result.missing) for result in results)
    failed = sum(bool(result.error) for result in results)
    print(f"score: {target}: {len(results)} rollouts, {missing} with missing judgements, {failed} faulty records")
    return MISSING if missing else None


def serve(config: Any, journal: Journal) -> None:
    """Answers over HTTP until it is interrupted."""
    try:
        import uvicorn

        from ivr_jax.score.app import Limits, ScoreApp, make_app
    except ImportError as error:
        raise UserError(f"{error.name} is not installed.", "pip install 'ivr_jax[serve]'") from error
    token = secret(config.token_variable)
    if config.host not in LOOPBACK and not token:
        raise UserError(f"on {config.host} anyone could spend your judge's money.",
                        "Put a token into an environment variable, and name it with --config.token_variable=NAME.")
    services = services_of(config, journal)
    root = Path(config.image_root or ".").expanduser()
    scorers = {
        preset: Scorer(services, preset, root, confined=True, worst_for_failures=config.worst_for_failures,
                       concurrency=config.concurrency)
        for preset in PRESETS
    }  # fmt: skip
    if not 0 <= config.port < 1 << 16:
        raise UserError(f"`port` is {config.port}.", "Name one with --config.port=…: 0 to 65535, 0 takes a free one.")
    with cli.listen(config.host, config.port, "--config.") as listener:
        port = listener.getsockname()[1]
        hosts = None if config.host not in LOOPBACK else frozenset(f"{name}:{port}" for name in LOOPBACK)
        app = make_app(ScoreApp(scorers, as_dataclass(Limits, config.limits), token, hosts))
        print(f"score: http://{config.host}:{port}/v1/score", flush=True)
        settings = uvicorn.Config(app, log_level="warning", access_log=False, lifespan="off", server_header=False)
        uvicorn.Server(settings).run(sockets=[listener])


def main(call: cli.Call) -> int | None:
    config = call.config
    if not call.flags.serve and not config.rollouts:
        raise UserError("no rollouts were named.", "Add --config.rollouts=FILE.jsonl, or --serve.")
    rollouts = None if call.flags.serve else read_rollouts(Path(config.rollouts).expanduser())  # before a journal
    with Journal(call.workdir / "journal") as journal:
        if rollouts is None:
            serve(config, journal)
            return None
        return asyncio.run(score_file(config, rollouts, call.workdir, journal))


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_boolean("serve", False, "answer over HTTP instead of scoring a file", flag_values=values)


def entry() -> None:
    cli.run(main, config=True, add_flags=add_flags)


if __name__ == "__main__":
    entry()
