"""The optimizer, the step, metrics.jsonl, settings.json and the evaluation of a text."""

import dataclasses
import functools
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from hipgpt_jax import config, numerics, training_config
from hipgpt_jax.evaluation import loss, score
from hipgpt_jax.model import mesh, transformer
from hipgpt_jax.runs import directory
from hipgpt_jax.training import metrics, optimizer, resume, train_step

MODEL = config.ModelConfig(vocab_size=40, max_seq_len=8, embed_dim=16, num_heads=2, ff_hidden_dim=32, num_layers=2)


@pytest.fixture(autouse=True)
def _standard_promotion() -> Iterator[None]:
    """Optax 0.2.8 itself promotes a Python float with an integer count; our own code is tested strictly elsewhere."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="module")
def model() -> transformer.Transformer:
    return transformer.Transformer(MODEL)


def make(
    model: transformer.Transformer, train: training_config.TrainConfig
) -> tuple[train_step.TrainState, train_step.TrainStep]:
    key = jax.random.key(train.seed, impl="threefry2x32")
    tx = optimizer.make(train)
    layout = mesh.Layout.create({"data": 1, "fsdp": 1, "model": 1})
    return train_step.init_sharded(layout, model, tx, key), train_step.make_train_step(model, tx, train, key, layout)


def test_schedule_warms_up_linearly_and_ends_at_the_final_rate() -> None:
    train = training_config.TrainConfig(steps=110, learning_rate=1e-2, warmup_steps=10, min_lr=1e-3)
    rates = [float(jnp.asarray(optimizer.learning_rate(train)(count))) for count in range(110)]
    np.testing.assert_allclose(rates[:10], np.arange(1, 11) * 1e-3, rtol=1e-5)
    assert max(rates) == pytest.approx(1e-2)
    assert rates[59] == pytest.approx((1e-2 + 1e-3) / 2, rel=1e-4)
    assert rates[-1] == pytest.approx(1e-3, rel=1e-4)
    assert all(a >= b for a, b in itertools.pairwise(rates[9:]))


def test_only_matrices_decay(model: transformer.Transformer) -> None:
    train = training_config.TrainConfig(weight_decay=0.5, warmup_steps=0, learning_rate=0.1, steps=10)
    tx = optimizer.make(train)
    params = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype), train_step.param_shapes(model.config))
    updates, _ = jax.jit(lambda params: tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params))(
        params
    )
    for path, update in jax.tree_util.tree_leaves_with_path(updates):
        assert bool(jnp.all(update < 0) if update.ndim >= 2 else jnp.all(update == 0)), path


def test_gradient_is_clipped_by_its_global_norm(model: transformer.Transformer) -> None:
    train = training_config.TrainConfig(clip=1.0, weight_decay=0.0)
    tx = optimizer.make(train)
    params = train_step.param_shapes(model.config)
    size = sum(leaf.size for leaf in jax.tree.leaves(params))
    unit = jax.tree.map(lambda x: jnp.ones(x.shape, x.dtype) / np.float32(size**0.5), params)
    for scale, norm in ((100.0, 1.0), (0.01, 0.01)):
        gradients = jax.tree.map(functools.partial(jnp.multiply, scale), unit)
        first_moment = jax.jit(lambda given: tx.update(given, tx.init(given), given)[1])(gradients)
        largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(optax.tree.get(first_moment, "mu")))
        assert largest == pytest.approx(0.1 * norm * float(jax.tree.leaves(unit)[0].max()), rel=1e-4)


def test_step_depends_only_on_state_and_batch(model: transformer.Transformer) -> None:
    train = training_config.TrainConfig(dropout=0.3, steps=10)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 40, (4, 9)), jnp.int32)
    results = []
    for _ in range(2):
        state, take_step = make(model, train)
        state, first = take_step(state, tokens)
        state, second = take_step(state, tokens)
        results.append((jax.tree.leaves(state), first.loss, second.loss))
    for a, b in zip(jax.tree.leaves(results[0]), jax.tree.leaves(results[1]), strict=True):
        np.testing.assert_array_equal(a, b)
    assert float(results[0][1]) != float(results[0][2])


def test_training_overfits_one_batch(model: transformer.Transformer) -> None:
    train = training_config.TrainConfig(steps=200, learning_rate=1e-2, warmup_steps=5, weight_decay=0.0)
    tokens = jnp.asarray(np.random.default_rng(1).integers(0, 40, (3, 6)), jnp.int32)
    state, take_step = make(model, train)
    history = []
    for _ in range(120):
        state, measured = take_step(state, tokens)
        history.append(measured)
    assert float(history[0].loss) == pytest.approx(np.log(40), rel=0.1)
    assert float(history[-1].loss) < 0.1
    assert float(history[-1].accuracy) == 1.0


@pytest.mark.slow
def test_evaluation_scores_each_token_but_the_first_once(model: transformer.Transformer) -> None:
    params = train_step.init_state(model, optimizer.make(training_config.TrainConfig()), jax.random.key(3)).params
    ids = np.random.default_rng(2).integers(0, 40, 31).astype(np.uint16)
    scored = score.evaluate(model, params, ids, text_bytes=60, batch_size=3, length=8)
    nll, correct = 0.0, 0
    for at in range(1, 31):
        context = ids[(at - 1) // 8 * 8 : at].astype(np.int32)
        logits = np.asarray(model.bind({"params": params})(jnp.asarray(context)[None], dropout=0.0))[0, -1].astype(
            np.float64
        )
        nll -= logits[ids[at]] - np.log(np.exp(logits).sum())
        correct += int(logits.argmax() == ids[at])
    assert scored.tokens == 30
    assert scored.loss == pytest.approx(nll / 30, rel=1e-5)
    assert scored.accuracy == pytest.approx(correct / 30)
    assert scored.nats_per_byte == pytest.approx(nll / 60, rel=1e-5)
    assert scored.perplexity == pytest.approx(np.exp(nll / 30), rel=1e-4)


@pytest.mark.parametrize("value", [709.0, 709.7, 710.0, 483_334.0])
def test_perplexity_is_exp_of_the_loss_or_infinite(value: float) -> None:
    scored = score.Score(loss=value, nats_per_byte=value, accuracy=0.0, tokens=1)
    line = {"step": 1, **metrics.describe_score(scored)}
    assert scored.perplexity == (np.exp(value) if value < 709.78 else np.inf)
    assert line.get("validation_perplexity", np.inf) == scored.perplexity
    json.dumps(line, allow_nan=False)
    assert len(metrics.format_evaluation(line)) < 130
    assert ("Perplexity: inf" in metrics.format_evaluation(line)) == (value > 709.78)


def test_equally_likely_tokens_are_top_and_ranked_by_id() -> None:
    logits_BTV = jnp.asarray([[[1.0, 3.0, 3.0], [1.0, 3.0, 3.0], [4.0, 3.0, 0.0]]])
    scores = loss.score_tokens(logits_BTV, jnp.asarray([[1, 2, 1]]))
    assert scores.is_top_BT.tolist() == [[True, True, False]]
    assert scores.rank_BT.tolist() == [[1, 2, 2]]


@pytest.mark.slow
def test_max_batches_limits_the_scored_tokens(model: transformer.Transformer) -> None:
    params = train_step.init_state(model, optimizer.make(training_config.TrainConfig()), jax.random.key(3)).params
    ids = np.random.default_rng(2).integers(0, 40, 200).astype(np.uint16)
    some = score.evaluate(model, params, ids, text_bytes=199, batch_size=2, length=8, max_batches=3)
    assert some.tokens == 3 * 2 * 8


def test_truncate_drops_later_steps_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for number in (1, 2, 3, 4):
        metrics.append(path, {"step": number, "loss": 1.0})
    path.write_text(path.read_text() + '{"step": 5, "lo')
    metrics.truncate(path, 3)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3]
    path.write_text('{"step": 1}\nrubbish\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"metrics.jsonl line 2 is not JSON: "):
        metrics.truncate(path, 3)


@pytest.mark.parametrize(
    "line",
    [
        *(
            '{"step": null}',
            '{"step": "2"}',
            '{"step": 2.0}',
            '{"step": true}',
            '{"step": 0}',
            '{"loss": 1}',
            "[2]",
            "2",
        ),
        *('{"step": 2, "validation_loss": "1"}', '{"step": 2, "loss": null}', '{"step": 2, "loss": NaN}'),
        *('{"step": 2, "step": 2}', '{"step": 2, "loss": 1e400}', "[" * 100_000),
    ],
)
def test_invalid_line_of_metrics_is_an_error(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"step": 1, "validation_loss": 2}}\n{line}\n')
    for reader in (metrics.truncate, metrics.best_loss, metrics.best_step, metrics.is_evaluated):
        with pytest.raises(ValueError, match=r"metrics\.jsonl line 2 is not (JSON|a valid line of metrics): "):
            reader(path, 3)
    path.write_text('{"step": 1, "validation_loss": 2}\n' + "\0" * 40)
    metrics.truncate(path, 3)
    assert path.read_text() == '{"step": 1, "validation_loss": 2}\n'


def test_best_step_is_the_first_with_the_lowest_loss(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert (metrics.best_step(path, 9), metrics.best_loss(path, 9)) == (None, np.inf)
    for at, value in ((2, 3.0), (4, 1.0), (6, 1.0), (8, 0.5)):
        metrics.append(path, {"step": at, "validation_loss": value})
    assert [metrics.best_step(path, at) for at in (1, 2, 7, 8)] == [None, 2, 4, 8]
    assert metrics.best_loss(path, 7) == 1.0


def mutated(data: bytes, draw: random.Random) -> bytes:
    """Some bytes replaced, cut, doubled, or a value in JSON given another kind."""
    found = bytearray(data)
    for _ in range(draw.randint(1, 3)):
        at = draw.randrange(len(found) + 1)
        odd = draw.choice(
            [b"null", b"1e400", b"-1", b"{}", b"[[", b'"x"', b"\0", b"\xff", b"9" * 400, b"1.5", b"\n", b","]
        )
        span = draw.choice([0, 1, 1, 3, 9])
        found[at : at + span] = draw.choice([odd, odd, b"", bytes([draw.randrange(256)]), bytes(found[at : at + 20])])
    return bytes(found[: draw.randrange(len(found) + 1)] if draw.random() < 0.1 else found)


def test_mutated_metrics_and_settings_give_one_line_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """600 mutations of each file, with a fixed seed."""
    monkeypatch.setattr(directory, "CHECKPOINTS", tmp_path)
    train = training_config.TrainConfig(steps=40)
    resume.write_settings(tmp_path, MODEL, train)
    for at in (10, 20, 30):
        metrics.append(tmp_path / "metrics.jsonl", {"step": at, "loss": 1.5, "validation_loss": 2.0, "accuracy": 0})
    longer = dataclasses.replace(train, steps=50)
    resume.extend(tmp_path, longer, 20)
    whole = {name: (tmp_path / name).read_bytes() for name in ("metrics.jsonl", "settings.json")}
    draw = random.Random(8)
    refused: list[str] = []
    for _ in range(600):
        for name, data in whole.items():
            (tmp_path / name).write_bytes(mutated(data, draw))
        for read in (
            lambda: metrics.truncate(tmp_path / "metrics.jsonl", 25),
            lambda: metrics.best_step(tmp_path / "metrics.jsonl", 25),
            lambda: resume.check_settings(tmp_path, MODEL, longer, step=20, extend=True),
            lambda: resume.extend(tmp_path, longer, 20),
        ):
            try:
                read()
            except (ValueError, FileNotFoundError) as error:
                refused.append(str(error))
    assert 600 < len(refused) < 2400
    assert [text for text in refused if "\n" in text or len(text) > 900] == []


def test_changed_settings_are_noted_or_refused(tmp_path: Path) -> None:
    train = training_config.TrainConfig(steps=40)
    resume.write_settings(tmp_path, MODEL, train)
    assert resume.check_settings(tmp_path, MODEL, train, step=20, extend=False) == []
    (line,) = resume.check_settings(tmp_path, MODEL, dataclasses.replace(train, remat=True), step=20, extend=False)
    assert (
        line
        == "the run was started without --remat: its results will be equal within rounding, but not to the last bit"
    )
    longer = dataclasses.replace(train, steps=60)
    resume.extend(tmp_path, longer, 30)
    assert resume.check_settings(tmp_path, MODEL, longer, step=30, extend=False) == []
    (line,) = resume.check_settings(tmp_path, MODEL, longer, step=20, extend=False)
    assert "extended to 60 steps at step 30: steps 21 to 30 are repeated with the longer schedule" in line
    resume.extend(tmp_path, longer, 20)
    assert resume.check_settings(tmp_path, MODEL, longer, step=20, extend=False) == []
    saved = json.loads((tmp_path / "settings.json").read_text())
    older = {key: value for key, value in saved["training"].items() if key != "clip"}
    for broken, message in (
        ({**saved, "extended": 1}, "is not a valid settings file: settings file.extended must be array"),
        ({**saved, "training": older}, "settings file.training has no 'clip'"),
        ({**saved, "model": {**saved["model"], "rotary": True}}, "does not know model.rotary: the run was made by"),
    ):
        (tmp_path / "settings.json").write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=rf"settings.json.*{message}"):
            resume.check_settings(tmp_path, MODEL, train, step=20, extend=False)


def test_changed_hardware_is_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train = training_config.TrainConfig(steps=40)
    resume.write_settings(tmp_path, MODEL, train)
    held = json.loads((tmp_path / "settings.json").read_text())["numerics"]
    assert held["cores"] == numerics.cores()
    assert held["processor"] == numerics.processor()
    monkeypatch.setattr(numerics, "cores", lambda: 4096)
    monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/home/ann/dump")
    (line,) = resume.check_settings(tmp_path, MODEL, train, step=20, extend=False)
    assert line.startswith(f"the run was started with other numerics: cores 4096 (it was {held['cores']}), xla_flags ")
    assert "/home" not in line
    assert line.endswith("equal those of the uninterrupted run within rounding, but not to the last bit")


def test_large_perplexity_is_formatted_with_an_exponent() -> None:
    line = {"step": 1, "loss": 700.0, "perplexity": np.exp(700.0), "accuracy": 0.5, "learning_rate": 0.1}
    text = metrics.format_step({**line, "milliseconds": 1.0, "tokens_per_second": 1.0}, bytes_per_token=2.5)
    assert text.startswith("[Step 1] Loss: 700.0000 nats/token, 280.0000 nats/byte | Perplexity: 1.01e+304 |")
