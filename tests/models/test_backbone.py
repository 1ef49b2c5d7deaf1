"""The decoder against transformers' Qwen3 (the same maths, written independently), and against itself otherwise run."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from ivr_jax.checkpoints import hf
from ivr_jax.errors import UserError
from ivr_jax.models import backbone, kv_cache, layers
from ivr_jax.models.backbone_config import BackboneConfig

torch = pytest.importorskip("torch", reason="the independent reference is a test extra")
transformers = pytest.importorskip("transformers", reason="the independent reference is a test extra")

TINY = BackboneConfig(
    vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=12, rms_norm_eps=1e-5, rope_theta=1e4, max_position_embeddings=64,
)  # fmt: skip
SIZES = {
    "heads wider than the model": TINY,
    "one kv head": dataclasses.replace(TINY, num_key_value_heads=1, num_hidden_layers=3),
    "a kv head each": dataclasses.replace(TINY, num_key_value_heads=4, head_dim=8),
    "tied, padded vocabulary": dataclasses.replace(TINY, tie_word_embeddings=True, vocab_multiple=16),
}


def noisy_params(config: BackboneConfig, seed: int = 0) -> backbone.Params:
    """Random parameters with norms away from 1, so that a forgotten norm shows; made by numpy, nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(leaf: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> np.ndarray:
        is_norm = len(axes) - ("layers" in axes) == 1
        noise = rng.standard_normal(leaf.shape, np.float32)
        return 1 + 0.3 * noise if is_norm else noise * 0.2

    return jax.tree.map(draw, backbone.param_shapes(config), backbone.param_axes(config))


def tokens_and_positions(config: BackboneConfig, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length), dtype=np.int32)
    return tokens, np.broadcast_to(np.arange(length, dtype=np.int32), (batch, length))


@functools.partial(jax.jit, static_argnums=0)
def all_logits(config, params, tokens, positions, segment_ids=None):
    hidden, _ = backbone.apply(config, params, tokens, positions, segment_ids)
    return backbone.logits(config, params, hidden)


def reference(config: BackboneConfig, params, directory):
    """The same weights in transformers, by way of our export and its strict loader."""
    hf.export_backbone(config, params, directory)
    model, info = transformers.Qwen3ForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", dtype=torch.float32
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


@pytest.mark.parametrize("name", SIZES)
def test_logits_equal_transformers(name, tmp_path):
    config = SIZES[name]
    params = noisy_params(config)
    tokens, positions = tokens_and_positions(config, 2, 9)
    with torch.no_grad():
        expected = reference(config, params, tmp_path / "hf")(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    actual = all_logits(config, params, tokens, positions)
    assert actual.dtype == jnp.float32 and actual.shape == (2, 9, config.vocab_size)
    np.testing.assert_allclose(actual, expected, atol=1e-4, rtol=0)


def test_left_padded_rows_equal_transformers(tmp_path):
    params = noisy_params(TINY)
    tokens, _ = tokens_and_positions(TINY, 2, 10)
    padding = np.array([[0] * 10, [1] * 4 + [0] * 6], np.int32)
    positions = np.maximum(np.cumsum(1 - padding, 1) - 1, 0).astype(np.int32)
    with torch.no_grad():
        expected = reference(TINY, params, tmp_path / "hf")(
            torch.tensor(tokens, dtype=torch.long), attention_mask=torch.tensor(1 - padding),
            position_ids=torch.tensor(positions, dtype=torch.long),
        ).logits.numpy()  # fmt: skip
    packed = np.asarray(all_logits(TINY, params, tokens, positions, 1 - padding))
    assert np.isfinite(packed).all()
    np.testing.assert_allclose(packed[padding == 0], expected[padding == 0], atol=1e-4, rtol=0)

    slots = np.where(padding == 1, -1, positions)  # the same through a cache
    hidden, _ = jax.jit(functools.partial(backbone.apply, TINY))(
        params, tokens, slots, cache=kv_cache.init_cache(TINY, 2, 12))
    cached = np.asarray(backbone.logits(TINY, params, hidden))
    assert np.isfinite(cached).all()
    np.testing.assert_allclose(cached[padding == 0], expected[padding == 0], atol=1e-4, rtol=0)


def test_gradients_equal_torch(tmp_path):
    params = noisy_params(TINY)
    tokens, positions = tokens_and_positions(TINY, 2, 9)
    model = reference(TINY, params, tmp_path / "hf")
    labels = torch.tensor(tokens, dtype=torch.long)
    model(labels, labels=labels).loss.backward()
    expected = {name: weight.grad.numpy() for name, weight in model.named_parameters()}

    @jax.jit
    @jax.grad
    def gradients(params):
        log_p = jax.nn.log_softmax(all_logits(TINY, params, tokens, positions)[:, :-1])
        return -jnp.take_along_axis(log_p, tokens[:, 1:, None], axis=-1).mean()

    actual = gradients(params)
    slots = hf.backbone_slots(TINY)
    assert slots.keys() == expected.keys()
    for name, slot in slots.items():
        leaf = actual
        for key in slot.path:
            leaf = leaf[key]
        leaf = np.asarray(leaf if slot.layer is None else leaf[slot.layer])
        error = np.abs(leaf - expected[name].transpose(slot.order)).max() / np.abs(expected[name]).max()
        assert error < 1e-3, f"{name}: {error}"


@pytest.mark.parametrize(("remat", "unroll"), [("full", 1), ("dots", 2), ("output+qkv+gate", 1)])
def test_recomputation_does_not_change_gradients(remat, unroll):
    params = noisy_params(TINY)
    tokens, positions = tokens_and_positions(TINY, 1, 6)

    def gradients(config):
        return jax.jit(jax.grad(lambda p: jnp.square(all_logits(config, p, tokens, positions)).mean()))(params)

    other = gradients(dataclasses.replace(TINY, remat=remat, unroll=unroll))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6, rtol=1e-5), gradients(TINY), other)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
@pytest.mark.parametrize("length", [12, 20])
def test_scaled_rotary_positions_equal_transformers(kind, length, tmp_path):
    config = dataclasses.replace(TINY, rope_scaling={"type": kind, "factor": 3.0}, max_position_embeddings=16)
    params = noisy_params(config)
    tokens, positions = tokens_and_positions(config, 1, length)
    with torch.no_grad():
        expected = reference(config, params, tmp_path / "hf")(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(all_logits(config, params, tokens, positions), expected, atol=1e-4, rtol=0)
    unscaled = all_logits(dataclasses.replace(config, rope_scaling=None), params, tokens, positions)
    assert (np.abs(unscaled - expected).max() > 1e-2) == (kind == "linear" or length > 16)


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, num_key_value_heads=1)])
def test_decoding_equals_teacher_forcing_for_prompts_of_different_lengths(config):
    params = noisy_params(config)
    tokens, positions = tokens_and_positions(config, 3, 12)
    expected = np.asarray(all_logits(config, params, tokens, positions))
    lengths = np.array([3, 6, 1])
    step = jax.jit(functools.partial(backbone.apply, config))
    score = jax.jit(functools.partial(backbone.logits, config))

    prompts = np.where(np.arange(6)[None] < lengths[:, None], tokens[:, :6], 49).astype(np.int32)  # right padding
    hidden, cache = step(params, prompts, positions[:, :6], cache=kv_cache.init_cache(config, 3, 12))
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(score(params, hidden)[row, :length], expected[row, :length], atol=1e-4, rtol=0)
    for offset in range(6):
        at = (lengths + offset)[:, None].astype(np.int32)
        hidden, cache = step(params, np.take_along_axis(tokens, at, 1), at, cache=cache)
        actual = score(params, hidden)[:, 0]
        np.testing.assert_allclose(actual, np.take_along_axis(expected, at[..., None], 1)[:, 0], atol=1e-4, rtol=0)


@pytest.mark.parametrize(("side", "name"), [("left", "heads wider than the model"), ("right", "one kv head")])
def test_guided_decoding_in_one_batch_equals_two_passes_and_teacher_forcing(side, name, tmp_path):
    """A conditional and a shorter unconditional prompt, padded to one width; both go on with the same tokens."""
    config = SIZES[name]
    params = noisy_params(config)
    tokens, _ = tokens_and_positions(config, 2, 12)
    lengths, width, answer = np.array([7, 3]), 7, tokens[0, 7:]

    @jax.jit
    def step(tokens, positions, cache):
        hidden, cache = backbone.apply(config, params, tokens, positions, cache=cache)
        return backbone.logits(config, params, hidden), cache

    def decode(rows):
        """Scores [rows, 6, V] after the prompt and after each token of the answer, from one cache for these rows."""
        prompts, positions = np.full((len(rows), width), 49, np.int32), np.full((len(rows), width), -1, np.int32)
        for place, row in enumerate(rows):
            start = width - lengths[row] if side == "left" else 0
            prompts[place, start : start + lengths[row]] = tokens[row, : lengths[row]]
            positions[place, start:] = np.arange(width - start)  # right padding continues the positions
        last = width - 1 if side == "left" else lengths[rows] - 1
        scores, cache = step(prompts, positions, kv_cache.init_cache(config, len(rows), 12))
        found = [scores[np.arange(len(rows)), last]]
        for offset, token in enumerate(answer):
            at = (lengths[rows] + offset)[:, None].astype(np.int32)
            scores, cache = step(np.full((len(rows), 1), token, np.int32), at, cache)
            found.append(scores[:, 0])
        return np.stack(found, 1)

    together = decode(np.array([0, 1]))
    model = reference(config, params, tmp_path / "hf")
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(together[row], decode(np.array([row]))[0], atol=1e-4, rtol=0)
        whole = np.concatenate([tokens[row, :length], answer])[None]
        with torch.no_grad():
            forced = model(torch.tensor(whole, dtype=torch.long)).logits[0, length - 1 :].numpy()
        np.testing.assert_allclose(together[row], forced, atol=1e-4, rtol=0)


@pytest.mark.parametrize("split", [20, 40])
def test_packed_rows_equal_separate_rows(split):
    """64 tokens: long enough that causal attention leaves out blocks."""
    params = noisy_params(TINY)
    tokens, _ = tokens_and_positions(TINY, 1, 64)
    end = 60
    lengths = (split, end - split)
    positions = np.concatenate([np.arange(n) for n in (*lengths, 64 - end)])[None].astype(np.int32)
    segments = np.repeat([1, 2, 0], (*lengths, 64 - end))[None].astype(np.int32)
    packed = np.asarray(all_logits(TINY, params, tokens, positions, segments))
    assert np.isfinite(packed).all()
    for rows in (slice(0, split), slice(split, end)):
        alone = all_logits(TINY, params, tokens[:, rows], positions[:, rows])
        np.testing.assert_allclose(packed[:, rows], alone, atol=1e-5, rtol=0)


def test_later_tokens_never_change_earlier_ones():
    params = noisy_params(TINY)
    tokens, positions = tokens_and_positions(TINY, 1, 64)
    changed = tokens.copy()
    changed[0, 33] = (changed[0, 33] + 1) % TINY.vocab_size
    before, after = (np.asarray(all_logits(TINY, params, t, positions)) for t in (tokens, changed))
    np.testing.assert_array_equal(before[0, :33], after[0, :33])
    assert (np.abs(before[0, 33:] - after[0, 33:]).max(-1) > 0).all()


def test_dropout_acts_only_with_a_key():
    config = dataclasses.replace(TINY, dropout=0.3, attention_dropout=0.3)
    params = noisy_params(config)
    tokens, positions = tokens_and_positions(config, 1, 8)
    run = jax.jit(functools.partial(backbone.apply, config))
    first, again, other = (run(params, tokens, positions, dropout_key=jax.random.key(seed))[0] for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-2
    without = jax.jit(functools.partial(backbone.apply, TINY))(params, tokens, positions)[0]
    np.testing.assert_array_equal(run(params, tokens, positions)[0], without)


def test_bfloat16_computes_in_bfloat16_and_scores_in_float32():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params = noisy_params(config)
    tokens, positions = tokens_and_positions(config, 2, 8)
    hidden, _ = backbone.apply(config, params, tokens, positions)
    scores = backbone.logits(config, params, hidden)
    assert hidden.dtype == jnp.bfloat16 and scores.dtype == jnp.float32
    np.testing.assert_allclose(scores, all_logits(TINY, params, tokens, positions), atol=0.3)
    assert kv_cache.init_cache(config, 1, 4).k.dtype == jnp.bfloat16


def test_full_size_tree():
    """The 34.1 B model of Emu3.5 without allocating it: names, shapes, count."""
    config = BackboneConfig(
        vocab_size=282926, hidden_size=5120, intermediate_size=25600, num_hidden_layers=64, num_attention_heads=64,
        num_key_value_heads=8, head_dim=128, vocab_multiple=512, dtype="bfloat16",
    )  # fmt: skip
    shapes = backbone.param_shapes(config)
    assert shapes["embed"].shape == (283136, 5120) and shapes["lm_head"].shape == (5120, 283136)
    attention = {name: leaf.shape for name, leaf in shapes["layers"]["attention"].items()}
    assert attention == {"q": (64, 5120, 8192), "k": (64, 5120, 1024), "v": (64, 5120, 1024), "o": (64, 8192, 5120),
                         "q_norm": (64, 128), "k_norm": (64, 128)}  # fmt: skip
    slots = hf.backbone_slots(config)
    assert len(slots) == 64 * 11 + 3
    assert slots["model.layers.63.self_attn.o_proj.weight"].shape == (5120, 8192)
    assert slots["lm_head.weight"].shape == (282926, 5120)
    by_hand = 2 * 282926 * 5120 + 5120 + 64 * (2 * 5120 * 8192 + 2 * 5120 * 1024 + 3 * 5120 * 25600 + 2 * 5120 + 256)
    assert sum(int(np.prod(slot.shape)) for slot in slots.values()) == by_hand == pytest.approx(34.1e9, rel=2e-3)
    with torch.device("meta"):
        theirs = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**config.to_hf("qwen3"))).state_dict()
    assert {name: slot.shape for name, slot in slots.items()} == {name: tuple(x.shape) for name, x in theirs.items()}
    tokens = jax.ShapeDtypeStruct((1, 128), jnp.int32)
    hidden, _ = jax.eval_shape(functools.partial(backbone.apply, config), shapes, tokens, tokens)
    assert hidden.shape == (1, 128, 5120) and hidden.dtype == jnp.bfloat16
    axes = backbone.param_axes(config)
    jax.tree.map(lambda leaf, names: len(leaf.shape) == len(names) or pytest.fail(str(names)), shapes, axes)


def test_modules_run_by_themselves():
    """The model, one of its layers, and a layer's halves, put together by hand, compute what `apply` does."""
    params = noisy_params(TINY)
    tokens, positions = tokens_and_positions(TINY, 2, 8)
    expected, _ = backbone.apply(TINY, params, tokens, positions)
    model = backbone.module(TINY, params)
    np.testing.assert_allclose(model(tokens, positions)[0], expected, atol=1e-6)

    inputs = backbone.layer_inputs(TINY, jnp.asarray(positions))
    x = params["embed"][tokens]
    for number in range(TINY.num_hidden_layers):
        layer = model.layers[number]
        eps = TINY.rms_norm_eps
        halfway = x + layer.attention(layers.rms_norm(x, layer.attention_norm[...], eps), inputs)[0]
        by_hand = halfway + layer.mlp(layers.rms_norm(halfway, layer.mlp_norm[...], eps))
        x, _ = layer(x, inputs)
        np.testing.assert_allclose(x, by_hand, atol=1e-5)
    np.testing.assert_allclose(layers.rms_norm(x, params["final_norm"], eps), expected, atol=1e-5)
    fresh = backbone.Mlp(TINY, nnx.Rngs(0))
    assert fresh(x).shape == x.shape


@pytest.mark.parametrize(
    "wrong",
    [
        {"num_key_value_heads": 3}, {"head_dim": 7}, {"vocab_size": 0}, {"hidden_size": 3.5}, {"remat": "some"},
        {"dropout": 1.0}, {"rope_scaling": {"type": "yarn", "factor": 2.0}}, {"rope_scaling": "linear"},
        {"dtype": "int8"}, {"rms_norm_eps": 0.0}, {"unroll": 0},
    ],
)  # fmt: skip
def test_impossible_options_are_named(wrong):
    with pytest.raises(UserError) as error:
        dataclasses.replace(TINY, **wrong)
    assert next(iter(wrong)) in str(error.value)


def test_config_json_round_trip_and_refusals():
    scaled = dataclasses.replace(TINY, rope_scaling=("dynamic", 2.0))
    for config, kind in ((TINY, "qwen3"), (scaled, "Emu3")):
        assert BackboneConfig.from_hf(config.to_hf(kind)) == config
    fields = TINY.to_hf()
    for change, named in (({"model_type": "llama"}, "llama"), ({"attention_bias": True}, "attention_bias"),
                          ({"head_dim": None}, "head_dim"), ({"hidden_act": "gelu"}, "hidden_act")):  # fmt: skip
        with pytest.raises(UserError) as error:
            BackboneConfig.from_hf({**fields, **change})
        assert named in error.value.what


def test_strict_dtypes_and_ranks():
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        params = backbone.init_params(TINY, jax.random.key(0))
        tokens, positions = (jnp.asarray(a) for a in tokens_and_positions(TINY, 1, 64))
        hidden, _ = backbone.apply(TINY, params, tokens, positions, jnp.ones_like(tokens))
        backbone.logits(TINY, params, hidden)
        cache = kv_cache.init_cache(TINY, 1, 4)
        backbone.apply(TINY, params, tokens[:, :1], positions[:, :1], cache=cache)
