"""Several devices: equal bits on any number of them, and a model that some of them share."""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

from hipgpt_jax import config, devices
from hipgpt_jax.generation import backends, executables, placement, requests, scheduler, waiting
from hipgpt_jax.model import cache

MODEL = dataclasses.replace(fakes.MODEL, num_heads=4, num_layers=1)
SETTINGS: tuple[dict[str, Any], ...] = (
    {},
    {"temperature": 0.0, "top_logprobs": 2},
    {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.3},
)
GATHERED = re.compile(r"= \w+\[([\d,]+)\]\S* all-gather")


@pytest.fixture(autouse=True)
def _several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "SMALLEST_BLOCK", 4)
    monkeypatch.setattr(cache, "SMALLEST_BLOCK_ON_GPU", 4)


def make(
    number: int | None = None, params: Any = None, platform: str | None = None, **more: Any
) -> scheduler.Scheduler:
    decoding = config.DecodingConfig(**{"window": 11, **more})
    on = devices.local(number, per_replica=decoding.resolve_mesh(MODEL))
    return scheduler.Scheduler(MODEL, params or fakes.random_params(MODEL), decoding, platform=platform, on=on)


def make_requests(count: int = 14, **more: Any) -> list[requests.Request]:
    """Returns requests of several lengths and settings, some of which outgrow the window of 11."""
    return [
        fakes.request(fakes.prompt(n % 7 + 1), num_tokens=n * 5 % 23 + 1, sample=n, **{**SETTINGS[n % 3], **more})
        for n in range(count)
    ]


def outputs_of(source: scheduler.Scheduler, requested: list[requests.Request]) -> list[list[Any]]:
    """Returns what is streamed of each request: tokens, text, reasons, and the bits of all statistics."""
    found: list[list[Any]] = [[] for _ in requested]
    for output in source.run(requested, fakes.SHIFTED, measure=True):
        bits = None
        if (stats := output.stats) is not None:
            top = stats.top_logprobs(requested[output.index].generation.top_logprobs)
            bits = fakes.stats_bytes(stats), *(x.tobytes() for x in top)
        found[output.index].append((output.token, output.text, output.finish_reason, bits))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "shape"),
    [
        (2, {}),
        (8, {"window_stride": 3}),
        (2, {"batch_size": 3}),
        (8, {"batch_size": 3, "window_stride": 3}),
        (2, {"batch_size": 16}),
        (2, {"batch_size": 3, "numerics": "invariant"}),
    ],
)
def test_bits_do_not_depend_on_the_number_of_devices(number: int, shape: dict[str, Any]) -> None:
    """Mixed lengths and settings, stop strings, alternatives; a batch of 16 has two replicas on each device."""
    requested = make_requests(14 if shape.get("batch_size") != 16 else 40)
    alone, several = make(1, **shape), make(number, **shape)
    expected = outputs_of(alone, requested)
    assert outputs_of(several, requested) == expected
    text = "".join(piece for _, piece, _, _ in expected[4])
    stopping = make_requests(len(requested), stop=(text[3:5],))
    expected = outputs_of(alone, stopping)
    assert outputs_of(several, stopping) == expected
    assert "stop" in {reason for outputs in expected for *_, reason, _ in outputs}


def _prefer_even(logits_V: jax.Array, context_W: jax.Array, length: jax.Array) -> jax.Array:
    return logits_V + jnp.where(jnp.arange(len(logits_V)) % 2 == 0, 2.0, 0.0)


@pytest.mark.slow
def test_rules_and_damaged_weights_are_those_of_one_device() -> None:
    """NaN ends a sample on its device, and does not leak into the next one there."""
    params = jax.tree.map(np.array, fakes.random_params(MODEL))
    params["wpe"]["embedding"][9] = np.nan
    requested = make_requests()
    alone, several = make(1, params, batch_size=3), make(2, params, batch_size=3)
    expected = outputs_of(alone, requested)
    assert outputs_of(several, requested) == expected
    assert {"error", "length"} <= {reason for outputs in expected for *_, reason, _ in outputs}
    ruled = outputs_of(alone.with_rule(_prefer_even), requested)
    assert outputs_of(several.with_rule(_prefer_even), requested) == ruled != expected


def test_a_device_takes_the_rest_of_its_prefill_batch() -> None:
    """Of two devices that take in turn, each prefills two batches of three; the second helps out at the end."""
    source = make(2, batch_size=3)
    first, second = source._programs
    requested = [fakes.request(tuple(range(n, n + 8)), sample=n, num_tokens=1) for n in range(12)]
    queue = waiting.WaitingQueue([first, second], source._sequences(requested, None, keeps=False))
    taken = []
    while one := queue.take((first, second)[len(taken) % 2]):
        assert one.batch is not None
        taken.append((one.sequence.index, [each is first for each in one.batch.users]))
    assert [index for index, _ in taken] == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert all(len(users) == 1 for _, users in taken)
    queue = waiting.WaitingQueue([first, second], source._sequences(requested[:2], None, keeps=False))
    several = [queue.take(each) for each in (first, second)]
    assert [each.sequence.index for each in several if each] == [0, 1]
    assert several[1]
    assert several[1].batch
    assert several[1].batch.users == {first, second}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "shape"),
    [
        (2, {"batch_size": 3}),
        (4, {"batch_size": 3, "window_stride": 3}),
        (4, {}),
        (2, {"batch_size": 3, "platform": "gpu"}),
    ],
)
def test_a_shared_model_draws_the_same_tokens_but_for_rounding(size: int, shape: dict[str, Any]) -> None:
    """A token that differs has a lead or a cut below the tolerance, and the text after it is another one.

    All runs on a mesh have the same bits, with as many replicas as the devices allow.
    """
    requested = make_requests()
    alone, shared = make(1, **shape), make(mesh=f"model={size}", **shape)
    found = outputs_of(shared, requested)
    same = 0
    for old, new in zip(outputs_of(alone, requested), found, strict=True):
        for one, other in zip(old, new, strict=True):
            stats = [np.frombuffer(each[3][0], np.float32) for each in (one, other)]
            if one[0] != other[0]:
                assert min(stats[1][-2:]) < 2e-4
                break
            np.testing.assert_allclose(*stats, rtol=1e-4, atol=1e-4)
            same += 1
    assert same > 100
    assert found == outputs_of(make(8, mesh=f"model={size}", **shape), requested)


@pytest.mark.slow
def test_nan_does_not_leak_on_a_mesh() -> None:
    params = jax.tree.map(np.array, fakes.random_params(MODEL))
    params["wpe"]["embedding"][9] = np.nan
    requested = [fakes.request((1, 2, 3), num_tokens=12), fakes.request((1,), num_tokens=5)]
    outputs = outputs_of(make(params=params, mesh="model=2"), requested)
    assert [each[2] for each in outputs[0]][-1] == "error"
    assert outputs[1] == outputs_of(make(mesh="model=2"), requested)[1]


def _step_on_one(model: config.ModelConfig) -> Any:
    """Returns the compiled step of one device."""
    backend = backends.backend_for("cpu", model, 256, 3)
    held = executables.Executables(model, "float32", 256, 1, "xla", backend)
    held.load(fakes.random_params(model))
    return held.lower(executables.Program("decode", blocks=2)).compile()


@pytest.mark.parametrize("platform", ["cpu", "gpu"])
def test_devices_that_share_a_model_keep_their_heads(platform: str) -> None:
    """No step gathers the cache or the weights, and on a CPU none copies the cache."""
    model = dataclasses.replace(MODEL, max_seq_len=256, embed_dim=32, ff_hidden_dim=96)
    backend = backends.backend_for(platform, model, 256, 3, mesh_size=2)
    where = placement.Placement(jax.local_devices()[2:4])
    held = executables.Executables(model, "float32", 256, 1, "xla", backend, where)
    held.load(fakes.random_params(model))
    for x in jax.tree.leaves(held.params["h_0"]["mlp"]["c_fc"]):
        assert x.sharding.device_set == set(jax.local_devices()[2:4])
        assert x.addressable_shards[0].data.size == x.size // 2
    step: Any = held.lower(executables.Program("decode", blocks=2)).compile()
    block = jax.tree.leaves(held.blocks(3, 0, 1))[0]
    sizes = [int(np.prod([int(n) for n in match[1].split(",")])) for match in GATHERED.finditer(step.as_text())]
    assert sizes
    assert max(sizes) <= 3 * model.embed_dim
    if platform == "cpu":
        cache_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(held.blocks(3, 0, 2))) // 2
        memory, on_one = step.memory_analysis(), _step_on_one(model).memory_analysis()
        assert memory.alias_size_in_bytes >= cache_bytes
        assert memory.temp_size_in_bytes < on_one.temp_size_in_bytes + block.size * block.dtype.itemsize


@pytest.mark.parametrize(
    ("number", "size", "message"),
    [
        (9, 1, "devices must be at most 8 here: got 9, and JAX has 8 (cpu). JAX_NUM_CPU_DEVICES sets how many"),
        ("9", 1, "devices must be at most 8 here: got 9"),
        (0, 1, "devices must be all, or an integer of at least 1: got 0"),
        (-1, 1, "devices must be all, or an integer of at least 1: got -1"),
        ("-1", 1, "devices must be all, or an integer of at least 1: got '-1'"),
        ("two", 1, "devices must be all, or an integer of at least 1: got 'two'"),
        (1.5, 1, "devices must be all, or an integer of at least 1: got 1.5"),
        (True, 1, "devices must be all, or an integer of at least 1: got True"),
        (3, 2, "devices must be a multiple of 2, which share a model by the mesh: got 3"),
        (1, 2, "devices must be a multiple of 2, which share a model by the mesh: got 1"),
        (None, 16, "mesh is too large: model=16 needs 16 devices, and JAX has 8 (cpu)"),
    ],
)
def test_numbers_of_devices_that_do_not_fit_are_refused(number: Any, size: int, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        devices.local(number, per_replica=size)


def test_devices_are_chosen_in_order() -> None:
    found = jax.local_devices()
    assert devices.local() == found[:1]
    assert devices.local("all") == devices.local(8) == found
    assert devices.local("3") == found[:3]
    assert devices.local(per_replica=4) == found[:4]
    with jax.default_device(found[5]):
        assert devices.local() == [found[5]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mesh": "data=2"}, "mesh must be model=N (devices that share the model): got 'data=2'. It has no other"),
        ({"mesh": "model=2,fsdp=2"}, "mesh must be model=N"),
        ({"mesh": "model=0"}, "mesh must be model=N"),
        ({"mesh": "model"}, "mesh must be model=N"),
        ({"mesh": 2}, "mesh must be model=N"),
        (
            {"mesh": "model=2", "numerics": "invariant"},
            "numerics invariant excludes mesh: got model=2",
        ),
    ],
)
def test_meshes_that_are_none_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        config.DecodingConfig(**settings)


def test_a_mesh_divides_the_heads() -> None:
    assert config.DecodingConfig(mesh="model=1") == config.DecodingConfig()
    assert config.DecodingConfig(mesh="model=4").resolve_mesh(MODEL) == 4
    with pytest.raises(
        ValueError, match=r"mesh must divide the model \(of 4 heads and 32 .*model=3. Choose N from 1, 2, 4"
    ):
        config.DecodingConfig(mesh="model=3").resolve_mesh(MODEL)


@pytest.fixture
def run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a program in this process, in the directory of the run ``tiny``, with files in ``tmp_path``."""
    monkeypatch.chdir(tiny)

    def call(program: str, *words: str) -> programs.Result:
        words = tuple(str(tmp_path / word) if word.endswith(".jsonl") else word for word in words)
        return programs.call(program, *words, monkeypatch=monkeypatch, capsys=capsys)

    return call


def generate(run: Any, output: str, *more: str) -> programs.Result:
    flags = ("--run-name", "tiny", "--num_tokens", "40", "--num_samples", "4", "--output", output)
    return run("generate", "--prompt", "the king", *flags, *more)


def lines(path: Path) -> Sequence[str]:
    return [re.sub(r'"argv":\[.*', "", line) for line in path.read_text().splitlines()]


@pytest.mark.slow
def test_programs_share_a_model_and_replay_its_records(run: Any, tmp_path: Path) -> None:
    assert generate(run, "one.jsonl").code == 0
    assert '"mesh"' not in (tmp_path / "one.jsonl").read_text()
    assert generate(run, "all.jsonl", "--devices", "all").code == 0
    assert sorted(lines(tmp_path / "all.jsonl")) == sorted(lines(tmp_path / "one.jsonl"))
    assert generate(run, "mesh.jsonl", "--mesh", "model=2", "--devices", "4").code == 0
    assert '"mesh":"model=2"' in (tmp_path / "mesh.jsonl").read_text()
    replayed = run("replay", "mesh.jsonl")
    assert replayed.code == 0
    assert "4 of 4 identical, log-probabilities equal to the bit" in replayed.out
    for other, file in (("model=1", "mesh.jsonl"), ("model=2", "one.jsonl")):
        replayed = run("replay", file, "--mesh", other)
        assert "changed    mesh: " in replayed.out
        assert "more than floating-point error" not in replayed.out
        forced = run("replay", file, "--mesh", other, "--forced")
        assert (forced.code, forced.out.count("agrees")) == (0, 4)
    mixed = generate(run, "one.jsonl", "--mesh", "model=2", "--num_samples", "5")
    assert mixed.code == 1
    assert "was made by other settings: mesh None in sample 0" in mixed.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--devices 9", "--devices must be at most 8 here: got 9, and JAX has 8 (cpu)"),
        ("--devices 0", "--devices must be all, or an integer of at least 1: got '0'"),
        ("--mesh data=2", "--mesh must be model=N (devices that share the model): got 'data=2'"),
        ("--mesh model=16", "--mesh must divide the model (of 2 heads and 48 feed-forward features): got model=16."),
        ("--mesh model=2 --devices 3", "--devices must be a multiple of 2, which share a model by the --mesh: got 3"),
        ("--mesh model=2 --numerics invariant", "--numerics invariant excludes --mesh: got model=2"),
    ],
)
def test_programs_refuse_devices_in_one_line(words: str, message: str, run: Any) -> None:
    refused = generate(run, "a.jsonl", *words.split())
    assert refused.code == 1
    assert refused.err.splitlines()[-1].startswith(f"generate: error: {message}")


def test_a_record_of_a_larger_mesh_is_skipped(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorded = (programs.TINY.parent / "records.jsonl").read_text().splitlines()[0]
    (tmp_path / "a.jsonl").write_text(recorded.replace('"environment":[', '"mesh":"model=2","environment":[') + "\n")
    monkeypatch.setattr(jax, "local_devices", lambda: jax.devices()[:1])
    skipped = run("replay", "a.jsonl")
    assert skipped.code == 2
    assert "mesh is too large: model=2 needs 2 devices, and JAX has 1 (cpu)" in skipped.out
    assert "--mesh must be model=N" in run("replay", "a.jsonl", "--mesh", "fsdp=2").err
