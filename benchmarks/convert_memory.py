"""Peak host memory of converting a random decoder from safetensors to Orbax and back, each in a process of its own.

    python benchmarks/convert_memory.py                    4.1 GB of bfloat16 tensors; needs 15 GB of disk
    python benchmarks/convert_memory.py --layers=4         a smaller one

The peak is VmHWM of the converting process (everything resident, mapped library code included), the bound 1.5 × the
largest stacked tensor of the files + 1.5 GB. The model that comes back must be the same bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

GB = 1e9
CONFIG = {"vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 6144, "num_attention_heads": 16,
          "num_key_value_heads": 4, "head_dim": 128}  # fmt: skip


def make_checkpoint(folder: Path, layers: int) -> None:
    """Random tensors as transformers would have written them: bfloat16, in shards of 1 GB."""
    import numpy as np

    from ivr_jax.checkpoints import hf
    from ivr_jax.checkpoints.safetensors_io import BFLOAT16, PlannedTensor, write_directory
    from ivr_jax.models.backbone_config import BackboneConfig

    config = BackboneConfig(num_hidden_layers=layers, param_dtype="bfloat16", **CONFIG)
    rng = np.random.default_rng(0)

    def planned(name: str, shape: tuple[int, ...]) -> PlannedTensor:
        def fetch(start: int, stop: int) -> np.ndarray:
            noise = 0.02 * rng.standard_normal((stop - start, *shape[1:]), np.float32)
            return (1 + noise if len(shape) == 1 else noise).astype(BFLOAT16)

        return PlannedTensor(name, BFLOAT16, shape, fetch)

    folder.mkdir()
    tensors = [planned(name, slot.shape) for name, slot in hf.backbone_slots(config).items()]
    write_directory(folder, tensors, 1_000_000_000)
    (folder / "config.json").write_text(json.dumps(config.to_hf("qwen3")))


def largest_stacked(layers: int) -> int:
    """Bytes of the largest tensor of all layers together, or of the embedding, in bfloat16."""
    mlp = layers * CONFIG["hidden_size"] * CONFIG["intermediate_size"]
    return 2 * max(mlp, CONFIG["vocab_size"] * CONFIG["hidden_size"])


def peak_of(command: list[str]) -> tuple[float, float, float]:
    """Runs a command: seconds, peak resident bytes, and the largest anonymous (not file-backed) part that was seen."""
    start, peak, anonymous = time.perf_counter(), 0, 0
    with subprocess.Popen(command) as process:
        status = Path(f"/proc/{process.pid}/status")
        while process.poll() is None:
            fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
            peak = max(peak, _bytes(fields.get("VmHWM")))
            anonymous = max(anonymous, _bytes(fields.get("RssAnon")))
            time.sleep(0.02)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {process.returncode}")
    return time.perf_counter() - start, peak, anonymous


def _bytes(field: str | None) -> int:
    return int(field.split()[0]) * 1024 if field else 0


def run(folder: Path, layers: int) -> None:
    hf, orbax, back = folder / "hf", folder / "orbax", folder / "back"
    subprocess.run([sys.executable, __file__, f"--layers={layers}", f"--make={hf}"], check=True)
    size = sum(file.stat().st_size for file in hf.iterdir())
    bound = 1.5 * largest_stacked(layers) + 1.5 * GB
    print(f"files {size / GB:.2f} GB, largest stacked tensor {largest_stacked(layers) / GB:.2f} GB, "
          f"bound {bound / GB:.2f} GB", flush=True)
    convert = [sys.executable, "-m", "ivr_jax.convert"]
    rows = {}
    rows["HF -> Orbax"] = peak_of([*convert, "--from=hf", str(hf), "--to=orbax", str(orbax)])
    rows["Orbax -> HF"] = peak_of([*convert, "--from=orbax", str(orbax), "--to=hf", str(back), "--dtype=bfloat16"])
    print("direction      seconds   peak GB   of it anonymous   within the bound")
    for name, (seconds, peak, anonymous) in rows.items():
        print(f"{name:<14} {seconds:7.0f} {peak / GB:9.2f} {anonymous / GB:17.2f}   {peak <= bound}")
    print("bit-equal     ", _same_tensors(hf, back))


def _same_tensors(first: Path, second: Path) -> bool:
    from ivr_jax.checkpoints.safetensors_io import digest, open_directory, row_blocks

    def digests(folder: Path) -> dict[str, str]:
        return {name: digest(tensor.read((slice(*bounds), *(slice(0, n) for n in tensor.shape[1:])))
                             for bounds in row_blocks(tensor.shape, 2))
                for name, tensor in open_directory(folder).items()}

    return digests(first) == digests(second)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=44)
    parser.add_argument("--folder", type=Path, default=None, help="where to work; a temporary folder by default")
    parser.add_argument("--make", type=Path, default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.make:
        make_checkpoint(options.make, options.layers)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        run(Path(folder), options.layers)


if __name__ == "__main__":
    main()
