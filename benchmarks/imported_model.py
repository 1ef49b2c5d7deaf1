"""The path of someone with Emu3.5's weights, with the full vocabulary of 282,926 and small random networks.

    python benchmarks/imported_model.py --folder=runs/imported_model

Every command runs in a process of its own; its wall time (with compilation, from an empty cache) and its peak resident
memory are printed, and kept in FOLDER/walk.json.  The same command continues a walk that was stopped.  The text
tokenizer has the released ranks, from the wheel `dashscope`; the image tokenizer has the released codebook of 131,072
codes; images are 64 x 64.  Services are scripted, on loopback.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]  # before what is imported from there, hence E402 below

import benchmark_runs  # noqa: E402
import construct_worker  # noqa: E402
import jax  # noqa: E402
import photographs  # noqa: E402
from checkpoints_fixture import random_tree  # noqa: E402
from emu_tokenizer import vision_lines  # noqa: E402
from openai_service import Behaviour, OpenAIService, serving  # noqa: E402
from PIL import Image  # noqa: E402

from ivr_jax.checkpoints import hf  # noqa: E402
from ivr_jax.models import backbone, image_tokenizer  # noqa: E402
from ivr_jax.models.backbone_config import BackboneConfig  # noqa: E402
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig  # noqa: E402

VOCABULARY, CODES, AREA = 282_926, 131_072, 64 * 64
SIZES = {
    "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 4096, "rope_theta": 1e6,
}  # fmt: skip
IMAGES = ImageTokenizerConfig(
    ch=32, out_ch=3, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=1, attn_resolutions=(16,), in_channels=3, resolution=256,
    z_channels=256, n_embed=CODES, embed_dim=256, norm_groups=32,
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Measured:
    """One command: its wall time in seconds, its peak resident memory in GiB, and its exit status."""

    name: str
    seconds: float
    peak_gib: float
    status: int


def write_downloads(folder: Path) -> None:
    """The three folders as they are downloaded: decoder (bfloat16), text tokenizer, image tokenizer."""
    found = importlib.util.find_spec("dashscope")
    if found is None or found.origin is None:
        raise SystemExit("the released ranks come with the wheel: pip install dashscope")
    text = folder / "text"
    text.mkdir(parents=True)
    shutil.copy(Path(found.origin).parent / "resources" / "qwen.tiktoken", text / "emu3.tiktoken")
    (text / "emu3_vision_tokens.txt").write_text("\n".join(vision_lines(CODES)) + "\n")
    config = BackboneConfig(vocab_size=VOCABULARY, **SIZES)
    params = backbone.init_params(config, jax.random.key(1))
    hf.export_backbone(config, params, folder / "decoder", model_type="Emu3", dtype="bfloat16")
    hf.export_image_tokenizer(IMAGES, random_tree(image_tokenizer.param_shapes(IMAGES), 2), folder / "images")


def resident_peak(process: int) -> float:
    """VmHWM of a process, in GiB; 0 when it has just ended.  (`ru_maxrss` would begin at that of its parent.)"""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 2**20
    return 0.0


class Walk:
    """The commands on `folder`, in order; `results` holds what they took.

    Args:
      folder: where everything is.
      results: the commands that succeeded before, which are not run again.
      limit: at most this many commands.
    """

    def __init__(self, folder: Path, results: list[Measured], limit: int | None = None):
        self.folder, self.results, self._left = folder, results, limit
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "IVR_JAX_CACHE": str(folder / "cache"),
                             "TEST_KEY": construct_worker.KEY}  # fmt: skip

    def run(self, name: str, module: str, *arguments: object) -> None:
        """Runs `python -m ivr_jax.MODULE`; raises SystemExit with its output when it fails, or none may be run."""
        if self._has(name):
            return
        if self._left == 0:
            raise SystemExit(f"stopped before {name!r}; the same command continues there")
        self._left = None if self._left is None else self._left - 1
        command = [sys.executable, "-m", f"ivr_jax.{module}", *map(str, arguments)]
        began, peak = time.perf_counter(), 0.0
        with open(self.folder / "output.txt", "wb") as output:
            process = subprocess.Popen(command, env=self._environment, stdout=output, stderr=subprocess.STDOUT)
            while process.poll() is None:
                peak = max(peak, resident_peak(process.pid))
                time.sleep(0.1)
        measured = Measured(name, time.perf_counter() - began, peak, process.returncode)
        print(f"{name:36s} {measured.seconds:7.1f} s {measured.peak_gib:6.2f} GiB", flush=True)
        said = (self.folder / "output.txt").read_text()
        if process.returncode:
            raise SystemExit(said[-4000:])
        print("".join(f"{line}\n" for line in said.splitlines() if line.startswith("  logits ")), end="")
        self.results.append(measured)
        save(self.results, self.folder)

    def _has(self, name: str) -> bool:
        return any(measured.name == name for measured in self.results)

    def whole(self) -> None:
        """Every stage, each from what the one before it left."""
        at = self.folder
        decoder, images, text = at / "decoder_import", at / "images_import", at / "text"
        for name in ("decoder", "images"):
            self.run(f"convert {name}", "convert", "--from=hf", at / name, "--to=orbax", at / f"{name}_import")
        named = (f"--image_tokenizer={images}", f"--text_tokenizer={text}")
        in_config = (f"--config.image_tokenizer={images}", f"--config.text_tokenizer={text}")
        for name in ("a", "b"):
            Image.fromarray(photographs.photograph("coffee", 64)).save(at / f"{name}.png")
        asked = (f"--checkpoint={decoder}", *named, "--prompt=A cat.", f"--image_area={AREA}", "--mode=image")
        for count in (0, 1, 2):
            pictures = [f"--image={at / name}.png" for name in ("a", "b")[:count]]
            self.run(f"generate, {count} references", "generate", *asked, f"--out={at / f'answer{count}'}", *pictures,
                     *(["--aspect_ratio=1:1"] if count > 1 else []))  # fmt: skip
        self._construct(decoder, in_config)
        dataset = at / "dataset"
        export = "export to a dataset"
        success = at / "success" if self._has(export) else photographs.write_success(at)
        self.run(export, "export", success, "--format=dataset", f"--out={dataset}")
        self.run("tokenise", "tokenise", dataset, *named, f"--out={at / 'sft' / 'examples'}")
        sizes = [f"--config.model.{key}={value}" for key, value in SIZES.items()]
        sft = ("train", "--config=micro_sft", f"--config.data.path={dataset}", *in_config, "--config.steps=2",
               "--config.batch=2", "--config.log_every=1", "--config.data.length=1024",
               "--config.data.practice_share=0.0", "--config.loss_chunk_tokens=128", *sizes)  # fmt: skip
        self.run("fine-tune", *sft, f"--workdir={at / 'sft'}", f"--config.init={decoder}")
        lora = (*sft, f"--workdir={at / 'lora'}", f"--config.init={at / 'sft'}", "--config.lora.rank=4",
                "--config.checkpoint_every=1", "--config.max_checkpoints=0")  # fmt: skip
        self.run("fine-tune, LoRA", *lora)
        again = "fine-tune, LoRA, resumed at step 1"
        if not self._has(again):
            shutil.rmtree(at / "lora" / "checkpoints" / "2", ignore_errors=True)
        self.run(again, *lora)
        self._reinforce(dataset)
        self._evaluate()
        self.run("convert back", "convert", "--from=orbax", at / "rl", "--to=hf", at / "exported",
                 "--model_type=qwen3")  # fmt: skip

    def _construct(self, decoder: Path, tokenizers: tuple[str, ...]) -> None:
        samples = construct_worker.write_samples(self.folder / "mine", 4, side=64)
        with serving(OpenAIService(Behaviour(key=construct_worker.KEY, fault_rate=0.2, hang=0.3))) as url:
            settings = construct_worker.arguments(
                url, samples, self.folder / "construct", image_area=AREA, image_multiple=16, batch=4, baseline=decoder
            )
            self.run("construct, import as baseline", "construct", *settings, *tokenizers)

    def _reinforce(self, dataset: Path) -> None:
        with serving(OpenAIService(Behaviour(fault_rate=0.2, hang=0.3))) as url:
            self.run(
                "rl, judge over HTTP", "train", "--config=micro_rl", f"--workdir={self.folder / 'rl'}",
                f"--config.init={self.folder / 'sft'}", f"--config.prompts.source={dataset}", "--config.steps=1",
                "--config.prompts_per_step=1", "--config.group_size=4", "--config.micro_batch=2",
                "--config.answer_length=640", "--config.buckets=(1024,)", "--config.loss_chunk_tokens=128",
                "--config.grammar.text_cap=8", "--config.grammar.max_reflections=1", "--config.grammar.max_steps=1",
                f"--config.prompts.image_area={AREA}", "--config.judge.outcome.kind=openai",
                "--config.judge.outcome.model=scripted", f"--config.judge.outcome.base_url={url}",
                "--config.judge.outcome.key_variable=", "--config.judge.outcome.first_wait=0.01",
            )  # fmt: skip

    def _evaluate(self) -> None:
        prompts = self.folder / "mine.jsonl"
        prompts.write_text('{"prompt": "Mirror the cup.", "image": "a.png"}\n{"prompt": "A cup."}\n')
        with judge() as url:
            self.run(
                "evaluate own prompts", "evaluate", f"--prompts={prompts}", f"--checkpoint={self.folder / 'rl'}",
                f"--workdir={self.folder / 'evaluation'}", f"--config.image_area={AREA}",
                "--config.answer_length=300", "--config.text_cap=8", "--config.modes=('direct',)",
                "--config.engine.slots=2", *benchmark_runs.judge_flags(url),
            )  # fmt: skip


@contextlib.contextmanager
def judge() -> Iterator[str]:
    with benchmark_runs.judging() as (_, url):
        yield url


def save(results: list[Measured], folder: Path) -> None:
    (folder / "walk.json").write_text(json.dumps([dataclasses.asdict(m) for m in results], indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="empty, missing or of a walk before; 5 GB of disk")
    parser.add_argument("--commands", type=int, help="stop after so many; the rest is for another call")
    wanted = parser.parse_args()
    folder = wanted.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    finished = folder / "walk.json"
    if not finished.exists():
        if any(folder.iterdir()):
            raise SystemExit(f"{folder} is not empty, and no walk began there")
        write_downloads(folder)
        save([], folder)
    walk = Walk(folder, [Measured(**one) for one in json.loads(finished.read_text())], wanted.commands)
    try:
        walk.whole()
    finally:
        total = sum(measured.seconds for measured in walk.results)
        print(f"{'all':36s} {total:7.1f} s {max((m.peak_gib for m in walk.results), default=0):6.2f} GiB")


if __name__ == "__main__":
    main()
