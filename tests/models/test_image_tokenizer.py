"""The image tokenizer against a plain PyTorch version written here from the architecture's description."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

from ivr_jax.checkpoints import hf
from ivr_jax.errors import UserError
from ivr_jax.models import image_tokenizer
from ivr_jax.models.image_tokenizer import ImageTokenizerConfig

torch = pytest.importorskip("torch", reason="the independent reference is a test extra")
safetensors_torch = pytest.importorskip("safetensors.torch", reason="the independent reader is a test extra")
nn, F = torch.nn, torch.nn.functional

SMALL = ImageTokenizerConfig(
    ch=8, out_ch=3, ch_mult=(1, 2, 2), num_res_blocks=1, attn_resolutions=(), in_channels=3, resolution=32,
    z_channels=10, n_embed=37, embed_dim=6, norm_groups=4, entropy_temperature=0.5,
)  # fmt: skip
LAYOUTS = {
    "one block, no attention": SMALL,
    "two blocks, attention at two levels": dataclasses.replace(
        SMALL, ch_mult=(1, 1, 2, 3), num_res_blocks=2, attn_resolutions=(16, 4), norm_groups=8
    ),
}


class Block(nn.Module):
    def __init__(self, inputs, outputs, groups):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(groups, inputs, eps=1e-6), nn.GroupNorm(groups, outputs, eps=1e-6)
        self.conv1, self.conv2 = nn.Conv2d(inputs, outputs, 3, 1, 1), nn.Conv2d(outputs, outputs, 3, 1, 1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x):
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class Attend(nn.Module):
    def __init__(self, width, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(width, width, 1) for _ in range(4))

    def forward(self, x):
        normal = self.norm(x)
        q, k, v = (conv(normal).flatten(2) for conv in (self.q, self.k, self.v))  # [B, C, cells]
        weights = torch.softmax(q.transpose(1, 2) @ k / x.shape[1] ** 0.5, dim=2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).reshape(x.shape))


class Resample(nn.Module):
    def __init__(self, width, stride):
        super().__init__()
        self.conv, self.stride = nn.Conv2d(width, width, 3, stride, padding=0 if stride == 2 else 1), stride

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.stride == 2 else F.interpolate(x, scale_factor=2.0))


def level(inputs, outputs, blocks, attends, groups):
    module = nn.Module()
    module.block = nn.ModuleList([Block(inputs if i == 0 else outputs, outputs, groups) for i in range(blocks)])
    module.attn = nn.ModuleList([Attend(outputs, groups) for _ in range(blocks)] if attends else [])
    return module


def run_level(module, x):
    for index, block in enumerate(module.block):
        x = block(x)
        x = module.attn[index](x) if len(module.attn) else x
    return x


class Half(nn.Module):
    """Encoder (down=True) or decoder."""

    def __init__(self, c, down):
        super().__init__()
        self.is_encoder, self.levels = down, len(c.ch_mult)
        widths = [c.ch * m for m in c.ch_mult]
        top, groups = widths[-1], c.norm_groups
        attends = [c.resolution // 2**i in c.attn_resolutions for i in range(self.levels)]
        self.conv_in = nn.Conv2d(c.in_channels if down else c.z_channels, c.ch if down else top, 3, 1, 1)
        self.mid = nn.Module()
        self.mid.block_1, self.mid.block_2 = Block(top, top, groups), Block(top, top, groups)
        self.mid.attn_1 = Attend(top, groups)
        self.norm_out = nn.GroupNorm(groups, top if down else widths[0], eps=1e-6)
        outputs = c.z_channels * (1 + c.double_z) if down else c.out_ch
        self.conv_out = nn.Conv2d(top if down else widths[0], outputs, 3, 1, 1)
        parts = []
        for i in range(self.levels):
            inputs = ([c.ch, *widths] if down else [*widths[1:], top])[i]
            part = level(inputs, widths[i], c.num_res_blocks + (not down), attends[i], groups)
            if down and i < self.levels - 1:
                part.downsample = Resample(widths[i], 2)
            if not down and i > 0:
                part.upsample = Resample(widths[i], 1)
            parts.append(part)
        setattr(self, "down" if down else "up", nn.ModuleList(parts))

    def middle(self, x):
        return self.mid.block_2(self.mid.attn_1(self.mid.block_1(x)))

    def forward(self, x):
        x = self.conv_in(x)
        if self.is_encoder:
            for part in self.down:
                x = run_level(part, x)
                x = part.downsample(x) if hasattr(part, "downsample") else x
            x = self.middle(x)
        else:
            x = self.middle(x)
            for part in reversed(self.up):
                x = run_level(part, x)
                x = part.upsample(x) if hasattr(part, "upsample") else x
        return self.conv_out(F.silu(self.norm_out(x)))


class Reference(nn.Module):
    """NCHW, loads the exported file strictly."""

    def __init__(self, c):
        super().__init__()
        self.encoder, self.decoder = Half(c, True), Half(c, False)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(c.n_embed, c.embed_dim)
        self.quant_conv = nn.Conv2d(c.z_channels * (1 + c.double_z), c.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.embed_dim, c.z_channels, 1)

    def scores(self, x):
        z = self.quant_conv(self.encoder(x)).permute(0, 2, 3, 1)
        return z, z @ self.quantize.embedding.weight.T

    def paint(self, z):
        return self.decoder(self.post_quant_conv(z.permute(0, 3, 1, 2)))

    def train_forward(self, x, beta):
        z, scores = self.scores(x)
        book = self.quantize.embedding.weight
        soft = scores.softmax(-1)
        hard = F.one_hot(soft.argmax(-1), book.shape[0]).to(soft)
        z_q, z_q2 = (hard - soft.detach() + soft) @ book, hard @ book
        loss = ((z_q - z) ** 2).mean() + ((z_q2.detach() - z) ** 2).mean() + beta * ((z_q2 - z.detach()) ** 2).mean()
        return self.paint(z_q), loss, scores


def random_params(config: ImageTokenizerConfig, seed: int = 0) -> image_tokenizer.Params:
    """Every parameter random (biases and norms too), drawn by numpy."""
    rng = np.random.default_rng(seed)

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        noise, name = rng.standard_normal(leaf.shape, np.float32), path[-1].key
        if name == "kernel":
            return noise / np.sqrt(np.prod(leaf.shape[:3]), dtype=np.float32)
        return {"weight": noise, "bias": 0.1 * noise, "scale": 1 + 0.3 * noise}[name]

    return jax.tree_util.tree_map_with_path(draw, image_tokenizer.param_shapes(config))


def images(batch: int, height: int, width: int) -> np.ndarray:
    return np.random.default_rng(5).uniform(-1, 1, (batch, height, width, 3)).astype(np.float32)


def reference(config, params, directory) -> Reference:
    hf.export_image_tokenizer(config, params, directory)
    model = Reference(config)
    model.load_state_dict(safetensors_torch.load_file(directory / "model.safetensors"), strict=True)
    return model


def nchw(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(x).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", LAYOUTS)
def test_codes_and_pixels_equal_torch(name, tmp_path):
    config = LAYOUTS[name]
    params = random_params(config)
    model = reference(config, params, tmp_path / "out")
    pixels = images(2, 32, 48)  # not square
    with torch.no_grad():
        expected_codes = model.scores(nchw(pixels))[1].argmax(-1)
        expected = model.paint(model.quantize.embedding(expected_codes)).permute(0, 2, 3, 1).numpy()
    codes = jax.jit(functools.partial(image_tokenizer.encode, config))(params, pixels)
    assert codes.dtype == jnp.int32 and codes.shape == (2, 32 // config.factor, 48 // config.factor)
    np.testing.assert_array_equal(codes, expected_codes.numpy())
    assert len(np.unique(codes)) > 8
    painted = jax.jit(functools.partial(image_tokenizer.decode, config))(params, codes)
    assert painted.dtype == jnp.float32
    np.testing.assert_allclose(painted, expected, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", LAYOUTS)
def test_straight_through_gradients_and_losses_equal_torch(name, tmp_path):
    config = LAYOUTS[name]
    params = random_params(config)
    model = reference(config, params, tmp_path / "out")
    pixels = images(2, 32, 32)
    painted, quantisation, scores = model.train_forward(nchw(pixels), config.beta)
    log_p = (scores / config.entropy_temperature).log_softmax(-1).flatten(0, 2)
    cell_entropy = -(log_p.exp() * log_p).sum(-1).mean()
    mean_p = log_p.exp().mean(0)
    batch_entropy = -(mean_p * mean_p.log()).sum()
    total = (painted - nchw(pixels)).square().mean() + quantisation + 0.1 * cell_entropy - 0.2 * batch_entropy
    total.backward()

    @functools.partial(jax.jit, static_argnums=0)
    @functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
    def step(config, params):
        rebuilt, aux = image_tokenizer.train_forward(config, params, pixels)
        loss = jnp.square(rebuilt - pixels).mean() + aux.quantisation + 0.1 * aux.cell_entropy - 0.2 * aux.batch_entropy
        return loss, aux

    (loss, aux), gradients = step(config, params)
    assert float(loss) == pytest.approx(total.item(), rel=1e-4)
    assert float(aux.quantisation) == pytest.approx(quantisation.item(), rel=1e-4)
    assert float(aux.cell_entropy) == pytest.approx(cell_entropy.item(), rel=1e-4)
    assert float(aux.batch_entropy) == pytest.approx(batch_entropy.item(), rel=1e-4)
    np.testing.assert_array_equal(aux.code_counts, np.bincount(aux.codes.ravel(), minlength=config.n_embed))
    expected = {key: weight.grad.numpy() for key, weight in model.named_parameters()}
    slots = hf.image_tokenizer_slots(config)
    assert slots.keys() == expected.keys()
    scale = max(np.abs(gradient).max() for gradient in expected.values())
    for key, slot in slots.items():
        actual = functools.reduce(lambda tree, part: tree[part], slot.path, gradients)
        wanted = expected[key].transpose(slot.order)
        atol = max(1e-3 * np.abs(wanted).max(), 1e-6 * scale)
        np.testing.assert_allclose(actual, wanted, rtol=1e-3, atol=atol, err_msg=key)
    assert (np.abs(gradients["quantize"]["embedding"]["weight"]).max(1) > 0).all()  # every code learns


def test_training_in_parts_equals_training_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    latents, book = (rng.standard_normal(shape, np.float32) for shape in ((2, 3, 4, 6), (37, 6)))

    weights = rng.standard_normal((2, 3, 4, 6), np.float32)

    def run(latents, book):
        def loss(latents, book):
            z_q, aux = image_tokenizer.quantise(SMALL, book, latents)
            value = jnp.sum(z_q * weights) + aux.quantisation + aux.cell_entropy - aux.batch_entropy
            return value, aux

        return jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(latents, book)

    whole = run(latents, book)
    monkeypatch.setattr(image_tokenizer, "SCORES_AT_A_TIME", 37 * 6)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), run(latents, book), whole)


@pytest.mark.parametrize("chunk", [1, 7, 37, 100])
def test_codebook_chunks_do_not_change_the_choice_and_ties_go_to_the_first(chunk):
    rng = np.random.default_rng(1)
    cells, book = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((40, 6), (37, 6)))  # many exact ties
    book[20:30] = book[3:13]
    actual = image_tokenizer.nearest_codes(cells.reshape(2, 4, 5, 6), book, chunk)
    np.testing.assert_array_equal(actual.ravel(), (cells @ book.T).argmax(1))


def test_choice_is_by_dot_product_not_by_distance():
    book = np.array([[1.0, 0.0], [10.0, 0.0]], np.float32)
    assert image_tokenizer.nearest_codes(np.array([[1.0, 0.0]], np.float32), book).tolist() == [1]


def test_pixels_survive_the_way_to_unit_and_back():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1)
    unit = image_tokenizer.pixels_to_unit(pixels)
    assert float(unit.min()) == -1.0 and float(unit.max()) == 1.0
    np.testing.assert_array_equal(image_tokenizer.unit_to_pixels(unit), pixels)
    assert image_tokenizer.unit_to_pixels(jnp.array([-9.0, 9.0])).tolist() == [0, 255]


def test_image_of_the_wrong_size_is_refused():
    with pytest.raises(UserError) as error:
        image_tokenizer.encode(SMALL, random_params(SMALL), jnp.zeros((1, 30, 32, 3)))
    assert "30" in error.value.what and str(SMALL.factor) in error.value.remedy


def test_config_round_trip_and_refusals():
    assert ImageTokenizerConfig.from_dict(SMALL.to_dict()) == SMALL
    nested = {"model": {"class_path": "IBQ", "init_args": SMALL.to_dict()}}
    assert ImageTokenizerConfig.from_dict(nested) == SMALL
    with pytest.raises(UserError) as error:
        ImageTokenizerConfig.from_dict({"ddconfig": SMALL.to_dict()["ddconfig"], "embed_dim": 4})
    assert "n_embed" in error.value.what
    for wrong in ({"norm_groups": 3}, {"ch_mult": ()}, {"n_embed": 0}, {"dropout": 1.5}, {"entropy_temperature": 0.0}):
        with pytest.raises(UserError) as error:
            dataclasses.replace(SMALL, **wrong)
        assert next(iter(wrong)) in error.value.what


def test_dropout_acts_only_with_a_key():
    config = dataclasses.replace(SMALL, ch_mult=(1,), dropout=0.5)
    params, pixels = random_params(config), images(1, 4, 4)
    run = jax.jit(lambda key: image_tokenizer.train_forward(config, params, pixels, dropout_key=key)[0])
    first, again, other = (np.asarray(run(jax.random.key(seed))) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3


def test_public_size():
    """The 131,072 × 256 tokenizer by shapes alone."""
    config = ImageTokenizerConfig(
        ch=256, out_ch=3, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=4, attn_resolutions=(16,), in_channels=3,
        resolution=256, z_channels=256, n_embed=131072, embed_dim=256,
    )  # fmt: skip
    slots = hf.image_tokenizer_slots(config)
    assert slots["quantize.embedding.weight"].shape == (131072, 256)
    assert slots["encoder.down.4.attn.3.proj_out.weight"].shape == (1024, 1024, 1, 1)
    assert slots["decoder.up.2.block.4.conv1.weight"].shape == (512, 512, 3, 3)
    assert slots["decoder.up.3.upsample.conv.bias"].shape == (512,)
    pixels = jax.ShapeDtypeStruct((2, 512, 256, 3), jnp.float32)
    encode = functools.partial(image_tokenizer.encode, config)
    codes = jax.eval_shape(encode, image_tokenizer.param_shapes(config), pixels)
    assert codes.shape == (2, 32, 16)


@pytest.mark.parametrize(("images", "side"), [(1, 64), (16, 32), (64, 64)])
def test_scores_of_all_codes_never_stand_whole(images, side):
    """The largest array in the assignment of a batch to 131,072 codes, read from the traced program."""
    latents = jax.ShapeDtypeStruct((images, side, side, 256), jnp.float32)
    book = jax.ShapeDtypeStruct((131072, 256), jnp.float32)
    cells = images * side * side

    def sizes(jaxpr):
        for equation in jaxpr.eqns:
            yield from (int(np.prod(out.aval.shape)) for out in equation.outvars)
            for inner in jax.extend.core.jaxprs_in_params(equation.params):
                yield from sizes(inner)

    traced = jax.make_jaxpr(image_tokenizer.nearest_codes)(latents, book)
    given = max(cells * 256, 131072 * 256)
    assert max(sizes(traced.jaxpr)) <= max(given, min(cells * 8192, image_tokenizer.SCORES_AT_A_TIME))
    assert cells * 131072 > 8 * given


def test_strict_dtypes_and_ranks():
    config = dataclasses.replace(SMALL, ch_mult=(1, 2), dtype="bfloat16")
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        params = jax.eval_shape(functools.partial(image_tokenizer.init_params, config), jax.random.key(0))
        pixels = jax.ShapeDtypeStruct((1, 8, 8, 3), jnp.uint8)

        def run(params, pixels):
            unit = image_tokenizer.pixels_to_unit(pixels)
            rebuilt, aux = image_tokenizer.train_forward(config, params, unit)
            codes = image_tokenizer.encode(config, params, unit)
            return rebuilt, aux, image_tokenizer.unit_to_pixels(image_tokenizer.decode(config, params, codes))

        rebuilt, aux, pixels_out = jax.eval_shape(run, params, pixels)
        assert rebuilt.dtype == jnp.float32 and aux.quantisation.dtype == jnp.float32 and pixels_out.dtype == jnp.uint8
