"""Tokens a second of drawing an image with classifier-free guidance: ours against PyTorch, same weights and CPU.

    python benchmarks/generate_vs_torch.py                   a decoder of 33 M parameters
    python benchmarks/generate_vs_torch.py --size=large      261 M; --size=micro: that of the demo, 2.1 M
    python benchmarks/generate_vs_torch.py --cores=1         each on one core: where other jobs run beside, threads that
                                                             wait for one another would be measured instead

Ours batches the conditional and the unconditional pass; PyTorch runs transformers' Qwen3ForCausalLM twice a token, each
pass with a cache of its own, as the released Emu3.5 code does. Both are float32, draw one image of 16 × 16 cells after
a prompt of 64 tokens, and sample from the guided scores of the visual ids. The two take turns; the first turn of each,
in which programs are compiled, is left out. Beside the tokens a second of wall time stand those a second of CPU time
(all threads), which other programs on the machine hardly change: with --cores=1 what an idle core would give.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time

import jax
import numpy as np

from ivr_jax.checkpoints import hf
from ivr_jax.models import backbone
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.protocol import codec
from ivr_jax.protocol.grammar import Grammar, GrammarOptions
from ivr_jax.protocol.text import PhraseTokenizer
from ivr_jax.sampling.batch import sample
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.world.language import PHRASES

CODES, SIDE, PROMPT, FREE_PROMPT, GUIDANCE = 8192, 16, 64, 24, 3.0
SIZES = {
    "micro": {"hidden_size": 96, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4,
              "num_key_value_heads": 2, "head_dim": 32},
    "small": {"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "num_attention_heads": 8,
              "num_key_value_heads": 2, "head_dim": 64},
    "large": {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 16, "num_attention_heads": 16,
              "num_key_value_heads": 4, "head_dim": 64},
}  # fmt: skip


class Ours:
    """One compiled sampler, both passes in one batch."""

    def __init__(self, config: BackboneConfig, params, tokenizer: PhraseTokenizer):
        self.config, self.params = config, jax.tree.map(jax.numpy.asarray, params)
        self.grammar = Grammar(tokenizer, GrammarOptions(modes=("direct",)))
        self.length = len(codec.encode_image(tokenizer, np.zeros((SIDE, SIDE), np.int32)))

    def draw(self, prompt: np.ndarray, free: np.ndarray, seed: int) -> int:
        lengths = np.array([len(prompt)], np.int32), np.array([len(free)], np.int32)
        keys = jax.random.split(jax.random.key(seed), 1)
        options = SamplingOptions(guidance=GUIDANCE)
        drawn, _ = sample(self.config, self.params, self.grammar, prompt[None], lengths[0], (SIDE, SIDE), keys,
                       self.length, options, unconditional=((free[None], lengths[1]),))  # fmt: skip
        return int(drawn.lengths[0])


class Torch:
    """transformers, one cached pass for each prompt and token."""

    def __init__(self, config: BackboneConfig, params, visual_start: int, length: int):
        import torch
        import transformers

        self.torch, self.visual_start, self.length = torch, visual_start, length
        with tempfile.TemporaryDirectory() as folder:
            hf.export_backbone(config, params, folder, overwrite=True)
            self.model = transformers.Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def draw(self, prompt: np.ndarray, free: np.ndarray, seed: int) -> int:
        torch = self.torch
        generator = torch.Generator().manual_seed(seed)
        with torch.inference_mode():
            passes = [self._pass(torch.tensor(tokens[None], dtype=torch.long), None) for tokens in (prompt, free)]
            for _ in range(self.length - 1):
                (given, first), (alone, second) = passes
                scores = alone + GUIDANCE * (given - alone)
                scores[:, : self.visual_start] = -torch.inf
                token = torch.multinomial(scores.softmax(-1), 1, generator=generator)
                passes = [self._pass(token, first), self._pass(token, second)]
        return self.length

    def _pass(self, tokens, cache):
        out = self.model(tokens, past_key_values=cache, use_cache=True)
        return self.torch.log_softmax(out.logits[:, -1], -1), out.past_key_values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--cores", type=int, default=0, help="use only this many cores; 0: all")
    options = parser.parse_args()
    if options.cores:  # before either library has started its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[-options.cores :])
    tokenizer = PhraseTokenizer(PHRASES, CODES)
    config = BackboneConfig(vocab_size=tokenizer.vocab.size, max_position_embeddings=1024,
                            **SIZES[options.size])  # fmt: skip
    rng = np.random.default_rng(0)
    shapes = backbone.param_shapes(config)
    params = jax.tree.map(lambda leaf: 0.02 * rng.standard_normal(leaf.shape, np.float32), shapes)
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    ours = Ours(config, params, tokenizer)
    theirs = Torch(config, params, tokenizer.vocab.visual_start, ours.length)
    print(f"{options.size}: {count / 1e6:.0f} M parameters, {ours.length} tokens an image", flush=True)
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    speeds: dict[str, dict[str, list[float]]] = {clock: {"ours": [], "torch": []} for clock in clocks}
    for turn in range(options.turns + 1):
        prompt, free = (rng.integers(0, tokenizer.vocab.text_size, n).astype(np.int32) for n in (PROMPT, FREE_PROMPT))
        for name, model in (("ours", ours), ("torch", theirs)):
            starts = {clock: read() for clock, read in clocks.items()}
            tokens = model.draw(prompt, free, turn)
            seconds = {clock: read() - starts[clock] for clock, read in clocks.items()}
            if turn:
                for clock in clocks:
                    speeds[clock][name].append(tokens / seconds[clock])
            else:
                print(f"  {name:<6} first turn {seconds['wall']:.1f} s", flush=True)
    print(f"  load average {os.getloadavg()[0]:.1f}, {len(os.sched_getaffinity(0))} cores")
    for clock, found in speeds.items():
        report(clock, found)


def report(clock: str, found: dict[str, list[float]]) -> None:
    """Prints median and range of both, and of the ratios of turns that lay side by side."""
    for name, rates in found.items():
        middle = statistics.median(rates)
        print(f"  {name:<6} {middle:7.1f} tokens/s of {clock} time, {min(rates):.1f} to {max(rates):.1f}")
    ratios = [a / b for a, b in zip(*found.values(), strict=True)]
    print(f"  ratio  {statistics.median(ratios):7.2f}, {min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} turns")


if __name__ == "__main__":
    main()
