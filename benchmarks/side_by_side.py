"""Ours against PyTorch and transformers, the same weights and inputs on the same cores: ratios of CPU and wall time.

    python benchmarks/side_by_side.py                      everything at the demo's size (2.1 M with its vocabulary)
    python benchmarks/side_by_side.py --size=small         a decoder of 33 M parameters; --size=large: 261 M
    python benchmarks/side_by_side.py --only=generate,sft  some of generate, sft, encode, decode
    python benchmarks/side_by_side.py --cores=1            each on one core: beside other programs, threads that
                                                             wait for one another would be measured instead

generate   one image of 16 × 16 cells after a prompt of 64 tokens with classifier-free guidance.  Ours batches both
           passes; transformers' Qwen3ForCausalLM is called twice a token with two caches, as the released code does.
sft        one AdamW step on 4 rows of 256 tokens.
encode     8 images of 64 × 64 pixels to codes, the demo's image tokenizer; decode: back.  The reference is the plain
           PyTorch implementation of tests/models/test_image_tokenizer.py.

All float32.  Losses, codes and pixels of both are compared first.  The two take turns; the first turn of each, in which
programs are compiled, is left out.  A ratio above 1 says that ours is faster.  `--json=FILE` writes the ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "models")]

from ivr_jax.checkpoints import hf  # noqa: E402
from ivr_jax.config import load_config  # noqa: E402
from ivr_jax.models import backbone, image_tokenizer  # noqa: E402
from ivr_jax.models.backbone_config import BackboneConfig  # noqa: E402
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig  # noqa: E402
from ivr_jax.protocol import codec  # noqa: E402
from ivr_jax.protocol.grammar import Grammar, GrammarOptions  # noqa: E402
from ivr_jax.protocol.text import PhraseTokenizer  # noqa: E402
from ivr_jax.sampling.batch import PromptBatch, RolloutOptions, sample  # noqa: E402
from ivr_jax.sampling.logits_processors import SamplingOptions  # noqa: E402
from ivr_jax.training import sft  # noqa: E402
from ivr_jax.training.optimizer import make_optimizer  # noqa: E402
from ivr_jax.training.state import TrainState  # noqa: E402
from ivr_jax.world.language import PHRASES  # noqa: E402

CODES, SIDE, PROMPT, FREE_PROMPT, GUIDANCE = 8192, 16, 64, 24, 3.0
ROWS, LENGTH, IMAGES = 4, 256, 8
SIZES = {
    "micro": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 32},
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 2, "head_dim": 64},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
              "num_key_value_heads": 4, "head_dim": 64},
}  # fmt: skip
Pair = tuple[Callable[[int], Any], Callable[[int], Any]]  # ours and theirs; the argument is the number of the turn


def decoder(size: str) -> tuple[PhraseTokenizer, BackboneConfig, Any]:
    tokenizer = PhraseTokenizer(PHRASES, CODES)
    config = BackboneConfig(vocab_size=tokenizer.vocab.size, max_position_embeddings=1024, **SIZES[size])
    rng = np.random.default_rng(0)
    shapes = backbone.param_shapes(config)
    params = jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), shapes)
    return tokenizer, config, params


def in_transformers(config: BackboneConfig, params: Any) -> Any:
    """The same decoder as transformers' model."""
    import torch
    import transformers

    with tempfile.TemporaryDirectory() as folder:
        hf.export_backbone(config, params, folder, overwrite=True)
        return transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def generate(size: str) -> Pair:
    import torch

    tokenizer, config, params = decoder(size)
    model = in_transformers(config, params).eval()
    params = jax.tree.map(jax.numpy.asarray, params)
    grammar = Grammar(tokenizer, GrammarOptions(modes=("direct",)))
    length = len(codec.encode_image(tokenizer, np.zeros((SIDE, SIDE), np.int32)))
    visual_start = tokenizer.vocab.visual_start

    def prompts(turn: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(turn)
        return tuple(rng.integers(0, tokenizer.vocab.text_size, n).astype(np.int32) for n in (PROMPT, FREE_PROMPT))

    def ours(turn: int) -> None:
        prompt, free = prompts(turn)
        unconditional = ((free[None], np.array([FREE_PROMPT], np.int32)),)
        batch = PromptBatch(prompt[None], np.array([PROMPT], np.int32), unconditional)
        options = RolloutOptions(length, SamplingOptions(guidance=GUIDANCE), size=(SIDE, SIDE))
        sample(config, params, grammar, batch, jax.random.split(jax.random.key(turn), 1), options)

    def call(tokens: Any, cache: Any) -> tuple[Any, Any]:
        out = model(tokens, past_key_values=cache, use_cache=True)
        return torch.log_softmax(out.logits[:, -1], -1), out.past_key_values

    def theirs(turn: int) -> None:
        generator = torch.Generator().manual_seed(turn)
        with torch.inference_mode():
            passes = [call(torch.tensor(tokens[None], dtype=torch.long), None) for tokens in prompts(turn)]
            for _ in range(length - 1):
                (given, first), (alone, second) = passes
                scores = alone + GUIDANCE * (given - alone)
                scores[:, :visual_start] = -torch.inf
                token = torch.multinomial(scores.softmax(-1), 1, generator=generator)
                passes = [call(token, first), call(token, second)]

    return ours, theirs


def sft_step(size: str) -> Pair:
    import torch

    tokenizer, config, params = decoder(size)
    model = in_transformers(config, params).train()
    settings = ConfigDict({"kind": "adamw", "learning_rate": 1e-4, "final_learning_rate": 1e-4, "warmup_ratio": 0.0,
                           "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.01, "clip_norm": 1.0,
                           "moment_dtype": "float32"})  # fmt: skip
    optimizer = make_optimizer(settings, 1000)
    step = sft.make_step(config, optimizer, 4096, 1, tokenizer.vocab.visual_start)
    params = jax.tree.map(jax.numpy.asarray, params)
    held = [TrainState(params, optimizer.init(params))]
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (ROWS, LENGTH)).astype(np.int32)
    whole = np.ones_like(tokens)
    positions = np.broadcast_to(np.arange(LENGTH, dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": whole, "positions": positions, "loss": whole.astype(np.uint8)}
    labels = torch.tensor(tokens, dtype=torch.long)
    adam = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.01)

    def ours(turn: int) -> float:
        held[0], metrics = step(held[0], batch, turn)
        total, count = metrics["loss"]
        return float(total) / float(count)

    def theirs(turn: int) -> float:
        adam.zero_grad(set_to_none=True)
        loss = model(labels, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        adam.step()
        return loss.item()

    return ours, theirs


def image_codes(decodes: bool) -> Pair:
    import torch
    from test_image_tokenizer import nchw, random_params, reference

    config = ImageTokenizerConfig(**load_config("micro_image_tokenizer").model.to_dict())
    params = random_params(config)
    with tempfile.TemporaryDirectory() as folder:
        model = reference(config, params, pathlib.Path(folder)).eval()
    params = jax.tree.map(jax.numpy.asarray, params)
    pixels = np.random.default_rng(2).uniform(-1, 1, (IMAGES, 64, 64, 3)).astype(np.float32)
    encode = jax.jit(image_tokenizer.encode, static_argnums=0)
    decode = jax.jit(image_tokenizer.decode, static_argnums=0)
    codes = np.asarray(encode(config, params, pixels))
    book = torch.tensor(codes, dtype=torch.long)

    def ours(turn: int) -> np.ndarray:
        return np.asarray(decode(config, params, codes) if decodes else encode(config, params, pixels))

    def theirs(turn: int) -> np.ndarray:
        with torch.inference_mode():
            if not decodes:
                return model.scores(nchw(pixels))[1].argmax(-1).numpy()
            return model.paint(model.quantize.embedding.weight[book]).permute(0, 2, 3, 1).numpy()

    return ours, theirs


BENCHMARKS: dict[str, Callable[[str], Pair]] = {
    "generate": generate,
    "sft": sft_step,
    "encode": lambda size: image_codes(decodes=False),
    "decode": lambda size: image_codes(decodes=True),
}


def measure(pair: Pair, turns: int) -> dict[str, dict[str, float]]:
    """Median, smallest and largest ratio theirs / ours of neighbouring turns, by CPU and by wall time."""
    clocks = {"cpu": time.process_time, "wall": time.perf_counter}
    ratios: dict[str, list[float]] = {clock: [] for clock in clocks}
    for turn in range(turns + 1):
        seconds, results = [], []
        for call in pair:
            starts = {clock: read() for clock, read in clocks.items()}
            results.append(call(turn))
            seconds.append({clock: read() - starts[clock] for clock, read in clocks.items()})
        if turn == 0 and results[0] is not None:
            np.testing.assert_allclose(results[0], results[1], atol=1e-3)
        if turn:
            for clock in clocks:
                ratios[clock].append(seconds[1][clock] / seconds[0][clock])
    return {
        clock: {"ratio": statistics.median(found), "low": min(found), "high": max(found)}
        for clock, found in ratios.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="micro")
    parser.add_argument("--only", default=",".join(BENCHMARKS))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--cores", type=int, default=0, help="use only this many cores; 0: all")
    parser.add_argument("--json", help="file for the ratios")
    options = parser.parse_args()
    if options.cores:  # before either library has started its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])
        import torch

        torch.set_num_threads(options.cores)
    found = {}
    for name in options.only.split(","):
        found[f"{name}_{options.size}_vs_torch"] = ratios = measure(BENCHMARKS[name](options.size), options.turns)
        for clock, ratio in ratios.items():
            print(f"{name:<9} {options.size}: ours is {ratio['ratio']:.2f}x as fast by {clock} time, "
                  f"{ratio['low']:.2f} to {ratio['high']:.2f} in {options.turns} turns", flush=True)
    if options.json:
        pathlib.Path(options.json).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
