"""Plans for TPUs: operations counted against the known formula, the compiler's text read, advice, a real compile."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from pathlib import Path
from unittest import mock

import commands
import jax
import jax.numpy as jnp
import pytest

from ivr_jax import cli, sharding
from ivr_jax.compile import __main__ as compile
from ivr_jax.compile import advice, flops, hlo, jobs, memory, programs, report, rl_programs, roofline, search
from ivr_jax.compile.topologies import GIB, parse_topology
from ivr_jax.config import load_config
from ivr_jax.errors import UserError
from ivr_jax.training.throughput import train_flops

HEAP = """\
BufferAssignment:
allocation 0: size 4096, page 0, parameter 0, shape |f32[32,32]| at ShapeIndex {}, output:
allocation 1: size 640, color 1, page 0, preallocated-temp:
 value: <9 near{0} @1> (size=640,offset=0): f32[160]{0:T(256)S(1)}
allocation 2: size 10000, page 0, preallocated-temp:
 value: <1 fusion.1 @0> (size=4096,offset=0): f32[32,32]{1,0:T(8,128)}
 value: <2 dus.4{1} @0> (size=3000,offset=5000): bf16[4,2,8,128]{3,2,1,0}
 value: <3 convert @0> (size=2000,offset=7000): f32[32,32]{1,0}
 value: <4 dot @0> (size=500,offset=9500): f32[5,25]{1,0}
"""
MODULE = """\
HloModule jit_step, is_scheduled=true

%fused (p0: f32[8,128]) -> f32[8,128] {
  ROOT %add.1 = f32[8,128]{1,0} add(%p0, %p0)
}

%scatter (p1: bf16[64,128]) -> bf16[16,128] {
  %all-reduce.9 = bf16[64,128]{1,0} all-reduce(%p1), replica_groups=[2,4]<=[8], to_apply=%add
  ROOT %slice.1 = bf16[16,128]{1,0} dynamic-slice(%all-reduce.9, %zero)
}

%body (arg: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %arg = (s32[]{:T(128)}, f32[8,128]{1,0}) parameter(0)
  %x.1 = f32[8,128]{1,0:T(8,128)} get-tuple-element(%arg), index=1
  %ag-start = (f32[2,128]{1,0}, f32[8,128]{1,0}) all-gather-start(%x.1), replica_groups=mesh['a'=2,'b'=4] {'b'}
  %fusion.1 = f32[8,128]{1,0} fusion(%x.1), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"1500"}
  %ag-done = f32[8,128]{1,0} all-gather-done(%ag-start)
  %rs = bf16[16,128]{1,0} fusion(%x.1), kind=kCustom, calls=%scatter, backend_config={"estimated_cycles":"7"}
  %kernel = f32[8,128]{1,0} custom-call(%x.1), frontend_attributes={kernel_metadata={
"text of a kernel"
}}, backend_config={}
  ROOT %tuple = (s32[], f32[8,128]{1,0}) tuple(%i, %fusion.1)
}

%cond (arg.1: (s32[], f32[8,128])) -> pred[] {
  %limit = s32[]{:T(128)} constant(12), metadata={stack_frame_id=3}
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  ROOT %lt = pred[] compare(%i.1, %limit), direction=LT
}

ENTRY %main (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %while.1 = (s32[], f32[8,128]{1,0}) while(%t), condition=%cond, body=%body
  %fusion.2 = f32[8,128]{1,0} fusion(%p), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"3000"}
}
"""


def test_the_count_of_operations_is_the_known_formula():
    """6 N a token and causal attention; chunks and recomputation are counted as what they are."""
    config = cli.config_from_argv(["--config=emu35_sft", "--config.model.remat=none", "--config.data.length=512",
                                   "--config.model.num_hidden_layers=3", "--config.batch=2", "--config.mesh.tensor=1",
                                   "--config.model.vocab_multiple=1", "--config.model.attention=plain",
                                   "--config.loss_chunk_tokens=512"])  # fmt: skip
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    setup = programs.Setup(config, mesh)
    program = programs.sft_step(setup)
    model = setup.model
    params = sum(x.size for x in jax.tree.leaves(setup.params)) - model.vocab_size * model.hidden_size
    assert abs(params - train_flops(model, 1, 0) / 6) < 1e-4 * params  # norms alone are left out
    counted = flops.count(program.trace().jaxpr)
    head = 2 * model.hidden_size * model.vocab_size * program.tokens  # computed once more for its gradient
    # Plain attention leaves out 6/16 of the scores instead of a half, and its checkpoint computes it twice forwards.
    score = 4 * model.num_hidden_layers * 64 * 128 * 512 * program.tokens * 10 / 16
    expected = train_flops(model, program.tokens, 0) + head + 4 * score
    assert abs(counted / expected - 1) < 1e-3
    assert abs(program.model_flops / (6 * params * program.tokens) - 1) < 0.02


def test_the_full_model_has_the_published_size_and_cost():
    config = cli.config_from_argv(["--config=emu35_sft"])
    model = programs.model_of(config)
    total = train_flops(model, 1, 0) / 6 + model.vocab_size * model.hidden_size
    assert round(total / 1e9, 1) == 34.1
    tokens = config.batch * config.data.length
    assert round(train_flops(model, tokens, tokens * config.data.length / 2) / 1e18, 4) == 0.2325


def test_loops_branches_and_kernels_are_counted_in_full():
    def step(x, w):
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, None, length=7)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x, x)

    jaxpr = jax.make_jaxpr(step)(jnp.ones((4, 8)), jnp.ones((8, 8)))
    assert flops.count(jaxpr) == 9 * 2 * 4 * 8 * 8


def test_the_memory_plan_reads_the_heap_and_adds_up():
    size, buffers = memory.read_heap(HEAP)
    assert size == 10000 and [b.name for b in buffers] == ["fusion.1", "dus.4{1}", "convert", "dot"]
    kinds = memory.divide_heap(size, buffers, [(32, 32)], layers=4)
    # A gradient of 4096 bytes; activations of 3000; the second gradient shares 1000 bytes with them.
    assert kinds == {"gradients": 4096 + 1000, "activations": 3000, "temporaries": 10000 - 8096}
    with pytest.raises(ValueError):
        memory.read_heap("allocation 0: size 8, page 0, parameter 0")


def test_the_schedule_is_played_with_its_loops_and_waits():
    topology = parse_topology("v5e:2x4")
    chip = topology.chip
    module = hlo.read(MODULE)
    loop = next(i for i in module.computations["main"] if i.opcode == "while")
    assert module.trips(loop) == 12
    found = roofline.estimate(module, topology)
    gathered = 8 * 128 * 4 * 3 / 4  # bytes that a chip receives from the three others of its group
    scattered = 64 * 128 * 2 * 3 / 4
    assert found.wire_bytes == {"all-gather": 12 * gathered, "reduce-scatter": 12 * scattered}
    assert (found.asynchronous, found.synchronous) == (12, 12)
    wire = 2 * chip.link
    kernel = 2 * 8 * 128 * 4 / chip.bandwidth
    # The gather hides behind 1500 cycles; the fused reduce-scatter does not; the kernel counts its bytes.
    once = max(1500 / chip.clock, gathered / wire) + scattered / wire + kernel
    assert found.seconds == pytest.approx(12 * once + 3000 / chip.clock)
    assert found.exposed == pytest.approx(12 * (scattered / wire + max(0, gathered / wire - 1500 / chip.clock)))


def test_an_update_in_place_costs_what_it_writes_and_one_pass_is_one_of_the_loop():
    update = """
  %new = f32[2,128]{1,0} get-tuple-element(%arg), index=2
  %scatter = f32[64,8,128]{2,1,0} fusion(%stored, %new), kind=kCustom, calls=%s, """
    alias = 'backend_config={"aliasing_operands":{"lists":[{"indices":["0","2"]}]}}'
    body = MODULE.replace("  ROOT %tuple = (s32", f"{update}{alias}\n  ROOT %tuple = (s32")
    topology = parse_topology("v5e:2x4")
    before, after = (roofline.estimate(hlo.read(text), topology, one_pass=True) for text in (MODULE, body))
    assert after.hbm_bytes - before.hbm_bytes == 2 * 2 * 128 * 4
    assert 12 * before.seconds + 3000 / topology.chip.clock == pytest.approx(
        roofline.estimate(hlo.read(MODULE), topology).seconds)  # fmt: skip


@pytest.mark.parametrize(
    "named", ["branch_computations={%short, %long}", "true_computation=%short, false_computation=%long"]
)
def test_of_a_conditional_the_longest_branch_is_counted(named):
    short, long = (MODULE[MODULE.index("%fused (p0") :].partition("\n\n")[0].replace("%fused", f"%{name}").replace(
        "add(%p0, %p0)", f'add(%p0, %p0), backend_config={{"estimated_cycles":"{cycles}"}}')
        for name, cycles in (("short", 100), ("long", 900)))  # fmt: skip
    choice = f"  %choice = f32[8,128]{{1,0}} conditional(%p, %p, %p), {named}\n  %fusion.2"
    text = MODULE.replace("ENTRY", f"{short}\n\n{long}\n\nENTRY").replace("  %fusion.2", choice)
    topology = parse_topology("v5e:2x4")
    before, after = (roofline.estimate(hlo.read(text), topology) for text in (MODULE, text))
    assert after.seconds - before.seconds == pytest.approx(900 / topology.chip.clock)


def test_errors_of_the_compiler_about_memory_are_read(tmp_path):
    message = ("RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
               "Used 120.31G of 95.74G hbm. Exceeds hbm capacity by 24.57G.")  # fmt: skip
    assert memory.exceeded(message) == (120.31 * GIB, 95.74 * GIB)
    message = "required for HLO temporaries (98.59G) exceeds available HBM (95.73G). HLO module: jit_step."
    assert memory.exceeded(message) == (98.59 * GIB, 95.73 * GIB)
    message = "Ran out of memory in memory space vmem. Used 17.12M of 16.00M vmem. Exceeded vmem capacity by 1.12M."
    assert memory.exceeded(message) is None  # of one core, whatever the config
    assert memory.exceeded("something else") is None
    result = {"mesh": {}, "flops": 0.0, "model_flops": 0.0, "tokens": 0, "resident": {}, "error": message}
    outcome = jobs._read("sft", parse_topology("v4:2x2x1"), {}, result, tmp_path)
    assert not outcome.ok and not outcome.needed and flags_of(outcome.advice) == ["--config.model.attention=plain"]


FEW = ("--config.optimizer.moment_dtype=bfloat16", "--config.gradient_dtype=bfloat16")


@pytest.mark.parametrize(
    ("config", "topology", "flags", "total"),
    [
        ("emu35_sft_v5p128", "v5p:4x4x8", (), 87.2),
        ("emu35_sft", "v5p:4x4x8", (), 14.8),
        ("emu35_sft", "v5p:2x2x1", ("--config.mesh.tensor=4", "--config.grad_accum_steps=128",
                                    "--config.loss_chunk_tokens=2048", *FEW), 87.6),
        ("emu35_sft", "v6e:4x8", (), 49.5),
        ("emu35_sft", "v6e:4x8", ("--config.mesh.tensor=8",), 52.2),
        ("emu35_sft", "v6e:4x8", ("--config.grad_accum_steps=4",), 26.8),
    ],
)  # fmt: skip
def test_predicted_memory_is_near_the_compilers(config, topology, flags, total):
    """`total`: GiB a chip that the compiler gave, docs/results/pods-compile.md."""
    config = cli.config_from_argv([f"--config={config}", *flags])
    predicted = search.predicted(config, parse_topology(topology)).total / GIB
    assert predicted == pytest.approx(total, rel=0.15)


def flags_of(text: str) -> list[str]:
    """The flags that a line of advice names."""
    return re.findall(r"--config\.[\w.]+=[\w.+]+", text)


def test_advice_for_sft_is_one_change_that_is_predicted_to_fit():
    """The compiler gave 49.5 GiB; a larger tensor axis (52.2) and a smaller chunk (49.5) do not help."""
    config = cli.config_from_argv(["--config=emu35_sft"])
    topology = parse_topology("v6e:4x8")
    said = flags_of(advice.advice("sft", config, topology, {"all": 49.5 * GIB}))
    assert len(said) == 1 and said[0].startswith("--config.grad_accum_steps=")
    changed = cli.config_from_argv(["--config=emu35_sft", *said])
    assert search.predicted(changed, topology).total < topology.chip.hbm
    none = advice.advice("sft", config, parse_topology("v5e:2x2"), {"all": 400 * GIB})
    assert not flags_of(none) and "--topology=v5e:" in none


@pytest.mark.parametrize(
    "topology, shape, factor",
    [
        ("v4:4x4x4", {}, 1.3),
        ("v6e:2x4", {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28}, 1.0),
        ("v5e:4x8", {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 40}, 1.2),
    ],
)
def test_advice_for_shapes_of_no_table_leads_to_a_fit_in_one_step(topology, shape, factor):
    """A compiler that needs `factor` times the memory that is predicted beside what is exact."""
    flags, topology = [f"--config.model.{name}={value}" for name, value in shape.items()], parse_topology(topology)
    config = cli.config_from_argv(["--config=emu35_sft", *flags])

    def compiled(config) -> float:
        return search.predicted(config, topology).corrected(factor).total

    assert compiled(config) > topology.chip.hbm, "the case needs no advice"
    said = flags_of(advice.advice("sft", config, topology, search.predicted(config, topology).corrected(factor).kinds))
    assert said
    assert compiled(cli.config_from_argv(["--config=emu35_sft", *flags, *said])) <= topology.chip.hbm


def test_advice_for_other_programs_comes_from_what_fills_the_memory():
    topology = parse_topology("v6e:2x4")
    config = load_config("emu35_rl")
    said = advice.advice("generate", config, topology, {"parameters": 8 * GIB, "cache": 64 * GIB, "temporaries": GIB})
    slots = int(flags_of(said)[0].split("=")[1])
    room = search.MARGIN * topology.chip.hbm - 9 * GIB
    assert flags_of(said)[0].startswith("--config.engine.slots=") and slots * GIB <= room < (slots + 1) * GIB
    assert not flags_of(advice.advice("decode", config, topology, {"parameters": 40 * GIB, "cache": GIB}))


GRPO = {  # GiB a chip that the compiler gave for emu35_rl on v6e:4x8
    "parameters": 3.97, "reference": 3.97, "moments": 7.95, "gradient sum": 3.97, "rollout": 0.01, "gradients": 1.59,
    "activations": 11.25, "temporaries": 8.52, "results": 3.97, "code": 0.03,
}  # fmt: skip


def test_advice_for_grpo_knows_what_does_not_fall_with_the_answers_of_a_pass():
    topology, config = parse_topology("v6e:4x8"), load_config("emu35_rl")
    source = load_config("emu35_sft")
    config.model, config.text_tokenizer = source.model, source.text_tokenizer
    line = advice.advice("grpo", config, topology, {k: v * GIB for k, v in GRPO.items()})
    said = dict(flag.removeprefix("--config.").split("=") for flag in flags_of(line))
    answers, chunk = int(said["micro_batch"]), int(said["loss_chunk_tokens"])
    assert answers % 8 == 0 and answers < config.micro_batch
    # Three float32 arrays of a chunk's logits are there at once, whatever the number of answers.
    logits = 3 * 4 * programs.model_of(config).padded_vocab_size / 4 * min(chunk, answers * 9216) / 8 / GIB
    fixed = sum(GRPO.values()) - GRPO["activations"] - GRPO["temporaries"]
    assert fixed + GRPO["activations"] * answers / config.micro_batch + logits <= topology.chip.hbm / GIB
    named = re.search(r"about ([\d.]+) GiB", line)
    assert float(named.group(1)) == pytest.approx(30.14, rel=0.05)  # what the compiler gave for that program
    none = advice.advice("grpo", config, parse_topology("v6e:2x2"), {"parameters": 60 * GIB, "temporaries": GIB})
    assert not flags_of(none)


def test_a_search_compiles_what_is_predicted_to_fit_and_learns_from_the_compiler():
    """A compiler that always says a third more than predicted, so that the first proposals do not fit."""
    config = cli.config_from_argv(["--config=emu35_sft"])
    topology = parse_topology("v6e:4x8")
    asked = []

    def compile_one(changed):
        prediction = search.predicted(changed, topology)
        plan = memory.Plan(prediction.corrected(4 / 3).kinds, topology.chip.hbm)
        asked.append(plan.fits)
        estimate = roofline.Estimate(seconds=prediction.seconds) if plan.fits else None
        return jobs.Outcome("sft", str(topology), {}, plan, estimate, 0.0, 0.0, 0, 0.0, "" if plan.fits else "full")

    found = search.search(config, topology, compile_one, 4)
    assert len(asked) == 4 and all(asked[1:]) and len(found) >= 3
    times = [outcome.estimate.seconds for _, outcome in found]
    assert times == sorted(times)
    groups = [tuple(c.changes.get(key) for key in search.GROUP) for c, _ in found]
    assert len(set(groups)) == len(groups)
    with pytest.raises(UserError):
        search.search(config, parse_topology("v5e:2x2"), compile_one, 1)


def test_the_config_that_a_search_writes_is_the_config(tmp_path):
    config = cli.config_from_argv(["--config=emu35_sft", "--config.grad_accum_steps=8"])
    topology = parse_topology("v6e:4x8")
    outcome = jobs.Outcome("sft", str(topology), {}, memory.Plan({"parameters": GIB}, topology.chip.hbm),
                           roofline.Estimate(seconds=2.0), 0.0, 1e15, 0, 0.0)  # fmt: skip
    file = tmp_path / "found.py"
    file.write_text(report.config_file(config, topology, outcome))
    assert load_config(str(file)).to_dict() == config.to_dict()


@pytest.mark.parametrize("name", ["v5p:4x4", "v5e:2x2x2", "v9:4x4", "v5p", "v5e:0x4", "v6e:axb"])
def test_topologies_that_cannot_be_are_refused(name):
    with pytest.raises(UserError):
        parse_topology(name)


def test_the_rl_plan_holds_the_policy_before_and_the_rollout():
    """Against one answer a pass and no overlap: a copy of the parameters more; and as many batches as a rollout has."""
    mesh = sharding.make_mesh({}, jax.devices()[:1])
    config = load_config("micro_rl")
    model = load_config("micro_sft")
    config.model, config.text_tokenizer, config.micro_batch, config.packed_rows = model.model, "micro", 32, 0
    plain = rl_programs.policy_gradient(programs.Setup(config, mesh)).resident
    config.overlap, config.num_minibatches = 1, 2
    resident = rl_programs.policy_gradient(programs.Setup(config, mesh)).resident
    assert plain["previous policy"] == 0 and resident["previous policy"] == resident["parameters"] > 0
    assert resident["rollout"] == resident["batch"] * (8 * 8 // 32 - 1)
    # With guidance answers have rows of their own, whatever packed_rows says, and one more sequence a pass.
    config.packed_rows, config.sampling.guidance = 2, 2.0
    guided = rl_programs.policy_gradient(programs.Setup(config, mesh)).resident
    assert guided["batch"] == resident["batch"] + 4 * 32 * (max(config.buckets) + 1)
    # With top-k or top-p a bit for each id and token; draft groups have as many groups a prompt as drafts.
    config.packed_rows, config.sampling.guidance, config.sampling.text_top_k = 0, 1.0, 9
    config.grpo.group, config.grpo.drafts = "draft", 3
    kept = rl_programs.policy_gradient(programs.Setup(config, mesh)).resident
    vocabulary = programs.vocabulary_of(config).size
    assert kept["batch"] == resident["batch"] + 32 * max(config.buckets) * -(-vocabulary // 8)
    assert kept["rollout"] == kept["batch"] * (3 * 8 * 8 // 32 - 1)


def test_topologies_are_read():
    assert (str(parse_topology("v5p:4x4x8")), parse_topology("v5p:4x4x8").count) == ("v5p:4x4x8", 128)
    assert "xla_tpu_use_tc_device_shape_on_sc" in jobs.options_for(parse_topology("v6e:4x8"))
    assert "xla_tpu_use_tc_device_shape_on_sc" not in jobs.options_for(parse_topology("v5e:4x8"))


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--config=micro_sft"], "topology"),
        (["--config=micro_sft", "--topology=v5p:4x4"], "v5p:4x4"),
        (["--config=micro_sft", "--topology=v5e:2x2", "--program=decode"], "decode"),
        (["--config=micro_image_tokenizer", "--topology=v5e:2x2"], "image_tokenizer"),
        (["--config=micro_sft", "--topology=v5e:2x2", "--against=chonk=4"], "chonk=4"),
        (["--config=micro_sft", "--topology=v5e:2x2", "--json=/dev/null/plan.json"], "--json"),
        (["--config=micro_sft", "--topology=v5e:2x2", "--json=/"], "--json"),
        (["--config=micro_sft", "--topology=v5e:2x2", "--keep=/dev/null"], "--keep"),
        (["--config=micro_rl", "--topology=v5e:2x2", "--search"], "--search"),
        (["--config=micro_sft", "--topology=v5e:2x2,v5e:2x4", "--search"], "--search"),
    ],
)
def test_a_wrong_request_names_what_is_wrong(argv, named):
    call = cli.parse(["compile", *argv], config=True, workdir=False, add_flags=compile.add_flags)
    with pytest.raises(UserError) as error:
        compile.main(call)
    assert named in str(error.value)


def compiler() -> str | None:
    """The TPU compiler: one that is named or installed, or the one that `make test` put beside the environment."""
    beside = Path(sys.prefix) / "libtpu" / "libtpu" / "libtpu.so"
    found = importlib.util.find_spec("libtpu")
    installed = Path(found.origin).with_name("libtpu.so") if found and found.origin else beside
    return os.environ.get("TPU_LIBRARY_PATH") or next((str(p) for p in (installed, beside) if p.is_file()), None)


needs_compiler = pytest.mark.skipif(compiler() is None, reason="there is no TPU compiler (libtpu) for this machine")


SMALL = (
    "--config.text_tokenizer=micro", "--config.model.hidden_size=256", "--config.model.intermediate_size=512",
    "--config.model.num_hidden_layers=2", "--config.model.num_attention_heads=4", "--config.model.vocab_multiple=128",
    "--config.model.num_key_value_heads=2", "--config.batch=8", "--config.data.length=256",
    "--config.loss_chunk_tokens=1024", "--config.mesh.tensor=2",
)  # fmt: skip


def compile_micro(tmp_path, *argv: str) -> tuple[commands.Done, list[dict]]:
    """The finished command, and the plans that it wrote; the compiler has a process of its own."""
    answer = tmp_path / "plan.json"
    with mock.patch.dict(os.environ, {"TPU_LIBRARY_PATH": compiler()}):
        done = commands.run("compile", *argv, f"--json={answer}")
    return done, json.loads(answer.read_text()) if answer.exists() else []


def test_a_compiler_that_aborts_ends_in_one_line_with_advice(tmp_path, monkeypatch, capsys):
    """Another program stands in for the interpreter that compiles: it says what the compiler says, and aborts."""
    dying = tmp_path / "python"
    dying.write_text("#!/bin/sh\necho 'F1123 11:52:44.03 27360 fusion_util.cc:5409] Check failed: no window' >&2\n"
                     "kill -ABRT $$\n")  # fmt: skip
    dying.chmod(0o755)
    library = tmp_path / "libtpu.so"
    library.touch()
    monkeypatch.setenv("TPU_LIBRARY_PATH", str(library))
    monkeypatch.setattr(jobs.sys, "executable", str(dying))
    argv = ["compile", "--config=micro_sft", "--topology=v5e:2x2,v5e:4x4"]
    call = cli.parse(argv, config=True, workdir=False, add_flags=compile.add_flags)
    assert compile.main(call) == 1
    said = [line for line in capsys.readouterr().out.splitlines() if "does not work:" in line]
    assert len(said) == 2  # the second topology was tried all the same
    assert said[0].startswith("does not work: the compiler ended with status -6: fusion_util.cc:5409] Check failed: no")
    assert "lower config.mesh.fsdp" in said[0]


@needs_compiler
def test_what_does_not_fit_gets_advice_that_is_predicted_to_fit(tmp_path):
    """All logits of 131,072 tokens and 282,926 ids at once, in a model of no published size."""
    large = ("--config.text_tokenizer=emu", "--config.data.length=16384", "--config.loss_chunk_tokens=1000000")
    argv = ("--config=emu35_sft", "--topology=v5e:2x2", *SMALL, *large)
    done, (plan,) = compile_micro(tmp_path, *argv)
    assert done.returncode == 1 and not done.stderr and plan["prediction"] is None
    said = flags_of(plan["advice"])
    assert said and all(flag in done.stdout for flag in said)
    changed = cli.config_from_argv([word for word in argv if "topology" not in word] + said)
    assert search.predicted(changed, parse_topology("v5e:2x2")).total < plan["hbm_bytes_of_a_chip"]


@needs_compiler
def test_a_batch_that_does_not_divide_over_the_mesh_is_an_error_with_advice(tmp_path):
    done, (plan,) = compile_micro(tmp_path, "--config=emu35_sft", "--topology=v5e:4x8", *SMALL)
    assert done.returncode == 1 and not plan["ok"] and "16" in plan["advice"]


@needs_compiler
def test_float32_sums_over_micro_batches_compile_on_a_mesh(tmp_path):
    """XLA:TPU moved the all-reduce of a norm's gradient out of the loop, and failed."""
    wide = ("--config.batch=16", "--config.grad_accum_steps=2", "--config.mesh.tensor=2", "--config.mesh.fsdp=4")
    done, (plan,) = compile_micro(tmp_path, "--config=emu35_sft", "--topology=v6e:2x4", *SMALL, *wide)
    assert done.returncode == 0 and plan["ok"]


@needs_compiler
def test_a_micro_run_compiles_for_a_tpu(tmp_path):
    done, (plan,) = compile_micro(tmp_path, "--config=emu35_sft", "--topology=v5e:2x2", *SMALL)
    assert done.returncode == 0, done.stderr
    held = plan["memory_bytes_a_chip"]
    assert held["moments"] == pytest.approx(2 * held["parameters"], rel=0.01) and held["temporaries"] > 0
    assert held["all"] == sum(size for kind, size in held.items() if kind != "all") < 1 * GIB
    assert 0 < plan["prediction"]["mfu"] < 1 and plan["flops"] > plan["model_flops"] > 0
    assert "predicted MFU" in done.stdout and "buffer assignment" in done.stdout
