"""What a run says of itself: exact sums, rates, alarms, profiles; and the options that save memory."""

from __future__ import annotations

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from ml_collections import ConfigDict

from ivr_jax.data import examples, pipeline
from ivr_jax.errors import UserError
from ivr_jax.models.backbone_config import BackboneConfig
from ivr_jax.training import loop
from ivr_jax.training.metrics import MetricsLog, NonFinite, Pending, ZeroGradient, check
from ivr_jax.training.optimizer import make_optimizer, schedule, stored_in
from ivr_jax.training.throughput import Profile, Throughput, peak_flops, train_flops


def test_sums_carried_over_a_restart_equal_uninterrupted_ones():
    rng = np.random.default_rng(0)
    steps = [{"loss": (jnp.float32(x), 3.0), "norm": float(y)} for x, y in rng.normal(1e3, 1, (9, 2))]
    straight, first = Pending(), Pending()
    for step in steps:
        straight.add(step)
    for step in steps[:4]:
        first.add(step)
    resumed = Pending(json.loads(json.dumps(first.pack())))
    for step in steps[4:]:
        resumed.add(step)
    assert resumed.means() == straight.means()
    np.testing.assert_allclose(straight.means()["norm"], np.mean([s["norm"] for s in steps]), rtol=1e-6)


def test_a_metric_that_nothing_was_counted_for_is_left_out():
    pending = Pending()
    pending.add({"loss_R": (0.0, 0.0), "loss_G": (6.0, 2.0)})
    assert pending.means() == {"loss_G": 3.0}


def test_alarms():
    check(1, {"loss": 1.0, "grad_norm": 0.0}, zero_gradient=False)
    with pytest.raises(ZeroGradient, match="7"):
        check(7, {"loss": 1.0, "grad_norm": 0.0}, zero_gradient=True)
    with pytest.raises(NonFinite, match="3.*loss"):
        check(3, {"loss": float("nan"), "grad_norm": 1.0}, zero_gradient=True)


def test_utilisation_by_hand():
    """2 layers of width 8 with 2 query and 1 kv heads of 4 and an MLP of 16; 10 ids."""
    config = BackboneConfig(10, 8, 16, 2, 2, 1, 4)
    layer = 8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 16
    assert train_flops(config, 5, 15) == 6 * (2 * layer + 8 * 10) * 5 + 12 * 2 * 2 * 4 * 15
    rates = Throughput(peak=1e6).row({"work_tokens": 50.0, "work_flops": 2e6}, 4.0)
    assert rates["mfu"] == 0.5 and rates["tokens_per_second"] == 12.5  # of one device, however many the host has
    assert Throughput(peak=1e6, devices=4).row({"work_flops": 2e6}, 4.0)["mfu"] == 0.125
    halves = {"work_rollout_tokens": 30.0, "work_update_tokens": 40.0, "work_update_flops": 1e6, "update_seconds": 2.0}
    assert Throughput(peak=1e6).row(halves, 4.0) == {"update_tokens_per_second": 20.0, "update_mfu": 0.5}
    assert "mfu" not in Throughput().row({"work_tokens": 50.0, "work_flops": 2e6}, 4.0)  # nobody knows a CPU's peak
    assert peak_flops("TPU v5 lite") == 197e12 and peak_flops("TPU v5") == 459e12 and peak_flops("TPU v6e") == 918e12
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("cpu") is None


def test_a_profile_of_some_steps(tmp_path):
    profile = Profile(tmp_path, "1:2")
    for step in range(3):
        profile.before(step)
        profile.after(step, jnp.ones(3) + step)
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    for wrong in ("3", "4:4", "a:b"):
        with pytest.raises(UserError, match="--profile"):
            loop.Plan(steps=1, log_every=1, checkpoint_every=1, max_checkpoints=1, profile=wrong)


def optimizer_config(**changes) -> ConfigDict:
    return ConfigDict({"kind": "adamw", "learning_rate": 1e-3, "final_learning_rate": 1e-4, "warmup_ratio": 0.1,
                       "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0, "clip_norm": 1.0,
                       "moment_dtype": "float32"} | changes)  # fmt: skip


def test_the_learning_rate_of_every_update():
    """10 updates, 4 of them warm-up: quarters of the full rate, then a cosine over the last six."""
    rate = schedule(optimizer_config(warmup_ratio=0.4), 10)
    cosine = [1e-4 + 9e-4 * (1 + np.cos(np.pi * k / 6)) / 2 for k in range(1, 7)]
    expected = [2.5e-4, 5e-4, 7.5e-4, 1e-3, *cosine]
    np.testing.assert_allclose([float(rate(k)) for k in range(10)], expected, rtol=1e-5)


def test_the_first_update_learns_without_warm_up_too():
    config = optimizer_config(warmup_ratio=0.0)
    assert float(schedule(config, 10)(0)) == pytest.approx(1e-3) and float(schedule(config, 1)(0)) > 0
    optimizer = make_optimizer(config, 10)
    params = {"w": jnp.ones((2, 2))}
    updates, _ = optimizer.update({"w": jnp.ones((2, 2))}, optimizer.init(params), params)
    assert float(jnp.abs(updates["w"]).min()) == pytest.approx(1e-3, rel=1e-3)  # Adam's first step is the rate


TREE = {
    "embed": jnp.ones((5, 4)),
    "final_norm": jnp.ones(4),
    "layers": {"norm": jnp.ones((2, 4)), "mlp": {"gate": jnp.ones((2, 4, 6))}},
    "lm_head": jnp.ones((4, 5)),
    "conv_in": {"kernel": jnp.ones((3, 3, 4, 4))},
    "conv": {"kernel": jnp.ones((3, 3, 4, 4)), "bias": jnp.ones(4)},
}


def moved_without_gradient(kind: str) -> dict:
    """Whether one update with gradients of 0 moves each parameter: by weight decay alone."""
    optimizer = make_optimizer(optimizer_config(kind=kind, weight_decay=0.1, warmup_ratio=0.0), 10)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, TREE), optimizer.init(TREE), TREE)
    return jax.tree.map(lambda x: bool(jnp.abs(x).max() > 0), updates)


@pytest.mark.parametrize(("kind", "by_adam"), [("adamw", True), ("muon", False)])
def test_matrices_decay_and_vectors_norms_and_embeddings_do_not(kind, by_adam):
    assert moved_without_gradient(kind) == {
        "embed": False, "final_norm": False, "layers": {"norm": False, "mlp": {"gate": True}}, "lm_head": by_adam,
        "conv_in": {"kernel": by_adam}, "conv": {"kernel": True, "bias": False},
    }  # fmt: skip


def test_muon_orthogonalises_hidden_kernels_and_leaves_the_rest_to_adam():
    """Of a gradient of rank one: Muon's update of a kernel keeps its rank, Adam's takes the sign of every entry."""
    optimizer = make_optimizer(optimizer_config(kind="muon", warmup_ratio=0.0, clip_norm=1e9), 10)
    column = jnp.array([1.0, 2.0, 3.0, 4.0])

    def rank_one(x: jax.Array) -> jax.Array:
        scale = column[: x.shape[-1]] if x.shape[-1] <= 4 else jnp.arange(1.0, x.shape[-1] + 1)
        return jnp.broadcast_to(scale, x.shape) * (1 + jnp.arange(x.shape[0]).reshape(-1, *(1,) * (x.ndim - 1)))

    updates, _ = optimizer.update(jax.tree.map(rank_one, TREE), optimizer.init(TREE), TREE)

    def is_adam(x: jax.Array) -> bool:
        return bool(jnp.allclose(jnp.abs(x), jnp.abs(x).mean(), rtol=1e-2))

    assert jax.tree.map(is_adam, updates) == {
        "embed": True, "final_norm": True, "layers": {"norm": True, "mlp": {"gate": False}}, "lm_head": True,
        "conv_in": {"kernel": True}, "conv": {"kernel": False, "bias": True},
    }  # fmt: skip


def test_moments_in_bfloat16_are_those_of_float32_rounded_after_every_step():
    params = {"w": jnp.linspace(-1, 1, 24).reshape(4, 6)}
    core = optax.scale_by_adam(b1=0.9, b2=0.95)
    halved = stored_in(core, jnp.bfloat16)
    state, exact = halved.init(params), core.init(params)
    for step in range(3):
        gradient = jax.tree.map(lambda x, step=step: jnp.sin(x * (3 + step)), params)
        expected, exact = core.update(gradient, exact, params)
        updates, state = halved.update(gradient, state, params)
        exact = exact._replace(mu=_rounded(exact.mu), nu=_rounded(exact.nu))
        np.testing.assert_allclose(updates["w"], expected["w"], rtol=1e-6)
    assert state.mu["w"].dtype == jnp.bfloat16 and state.count.dtype == jnp.int32


def _rounded(tree):
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), tree)


def test_moments_that_would_stand_still_are_refused():
    config = ConfigDict({"kind": "adamw", "learning_rate": 1e-3, "final_learning_rate": 1e-4, "warmup_ratio": 0.1,
                         "b1": 0.9, "b2": 0.999, "eps": 1e-8, "weight_decay": 0.0,
                         "clip_norm": 1.0, "moment_dtype": "bfloat16"})  # fmt: skip
    with pytest.raises(UserError, match="b2"):
        make_optimizer(config, 10)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("learning_rate", -1e-3),
        ("final_learning_rate", -1.0),
        ("weight_decay", -0.1),
        ("warmup_ratio", 1.5),
        ("warmup_ratio", -0.1),
        ("b1", 1.0),
        ("b2", -0.5),
        ("clip_norm", 0.0),
        ("eps", 0.0),
    ],
)
def test_an_optimiser_setting_out_of_range_is_refused(name, value):
    config = ConfigDict({"kind": "adamw", "learning_rate": 1e-3, "final_learning_rate": 1e-4, "warmup_ratio": 0.1,
                         "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.0,
                         "clip_norm": 1.0, "moment_dtype": "float32"})  # fmt: skip
    make_optimizer(config, 10)
    config[name] = value
    with pytest.raises(UserError, match=f"optimizer.{name}"):
        make_optimizer(config, 10)


def test_a_damaged_line_of_the_log_is_named_and_the_log_left_as_it_is(tmp_path):
    before = '{"step": 1, "loss": 2.0}\n\0\0\0\n{"step": 3, "loss": 1.0}\n'
    (tmp_path / "metrics.jsonl").write_text(before)
    with pytest.raises(UserError, match="metrics.jsonl.*2"):
        MetricsLog(tmp_path, 3)
    assert (tmp_path / "metrics.jsonl").read_text() == before


@pytest.fixture
def token_examples(tmp_path):
    """40 examples of 5 to 30 tokens; every token is the example's number."""
    from array_record.python import array_record_module

    rng = np.random.default_rng(0)
    writer = array_record_module.ArrayRecordWriter(str(tmp_path / "direct.array_record"), "group_size:1")
    for number in range(40):
        tokens = np.full(rng.integers(5, 31), number, np.int32)
        writer.write(examples.pack_example(tokens, np.ones(len(tokens), np.uint8)))
    writer.close()
    manifest = {"fingerprint": "", "counts": {"direct": 40}, "tokens": 0, "longest": 30}
    (tmp_path / examples.MANIFEST).write_text(json.dumps(manifest))
    return tmp_path


def stored(folder, length):
    return pipeline.stored_examples(folder, {"direct": 1.0}, length, 3)


def test_a_weight_for_a_mode_without_examples_is_an_error_that_gives_the_flag(token_examples):
    with pytest.raises(UserError) as raised:
        pipeline.stored_examples(token_examples, {"direct": 1.0, "reflection": 0.0, "multi_step": 2.0}, 64, 3)
    assert "multi_step" in raised.value.what and "reflection" not in raised.value.what
    assert "--config.data.mix.multi_step=0" in raised.value.remedy


def test_the_number_of_readers_changes_no_batch(token_examples):
    """8 rows from 4 streams: read by one process, and by two that hold rows 0, 1, 4, 5 and the rest."""

    def read(rows=None):
        return pipeline.packed_batches(stored(token_examples, 64), 8, 64, 3, streams=4, rows=rows)

    whole, parts = read(), [read([0, 1, 4, 5]), read([2, 3, 6, 7])]
    for _ in range(5):
        batch, first, second = next(whole), *map(next, parts)
        for name in batch:
            np.testing.assert_array_equal(batch[name][[0, 1, 4, 5]], first[name])
            np.testing.assert_array_equal(batch[name][[2, 3, 6, 7]], second[name])
    resumed = read([4, 5])
    resumed.set_state({**parts[0].get_state(), **parts[1].get_state()})
    np.testing.assert_array_equal(next(whole)["tokens"][[4, 5]], next(resumed)["tokens"])
    assert sorted(parts[0].get_state()) == ["0", "2"]


def test_streams_share_the_examples_out(token_examples):
    """Each of the four sees its own quarter of the shuffled examples: together all of them, about equally often."""
    batches, counts = pipeline.packed_batches(stored(token_examples, 64), 4, 64, 3, streams=4), Counter()
    for _ in range(pipeline.PACKED_TOGETHER):
        batch = next(batches)
        for tokens, segments in zip(batch["tokens"], batch["segment_ids"], strict=True):
            counts.update(tokens[segments == segment][0] for segment in range(1, segments.max() + 1))
    assert sorted(counts) == list(range(40)) and max(counts.values()) - min(counts.values()) <= 4
    with pytest.raises(UserError, match="data.streams"):
        pipeline.packed_batches(stored(token_examples, 640), 4, 640, 3, streams=3)


def test_one_process_of_several_writes_what_a_run_says(tmp_path):
    for write, folder in ((True, tmp_path / "first"), (False, tmp_path / "second")):
        folder.mkdir()
        log = MetricsLog(folder, 0, write)
        log.write(1, {"loss": 2.0})
        log.close()
        assert bool(list(folder.iterdir())) == write
