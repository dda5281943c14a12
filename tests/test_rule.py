"""Rules of the caller's own: samples follow them, records name them, and only the same rule replays them."""

import types
from collections.abc import Callable
from pathlib import Path

import fakes
import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest

import hipgpt_jax
from hipgpt_jax.records import record


def green(logits_V: jax.Array, context_W: jax.Array, length: jax.Array) -> jax.Array:
    """A watermark: half of the vocabulary, chosen by the last token, gains 3."""
    key = jax.random.fold_in(jax.random.key(7, impl="threefry2x32"), context_W[length - 1])
    return logits_V + 3.0 * jax.random.bernoulli(key, 0.5, logits_V.shape).astype(jnp.float32)


def copying(logits_V: jax.Array, context_W: jax.Array, length: jax.Array) -> jax.Array:
    """Leaves only the token before the last in the window."""
    return jnp.where(jnp.arange(len(logits_V)) == context_W[length - 2], logits_V, -jnp.inf)


def neutral(logits_V: jax.Array, context_W: jax.Array, length: jax.Array) -> jax.Array:
    del context_W, length
    return logits_V


@pytest.fixture(scope="module")
def run(tiny: Path) -> hipgpt_jax.Run:
    decoding = hipgpt_jax.DecodingConfig(batch_size=2)
    return hipgpt_jax.load_run("tiny", decoding=decoding, where=tiny / "checkpoints/tiny")


def replayed(run: hipgpt_jax.Run, records: list[record.Record]) -> list[bool]:
    again = run.records_of(map(run.request_of, records))
    return [run.compare(old, new).is_identical for old, new in zip(records, again, strict=True)]


def test_a_rule_acts_before_all_settings(run: hipgpt_jax.Run) -> None:
    """At every position of the window, when that is full too; a neutral rule changes nothing."""
    (one,) = run.generate("the king", rule=copying, num_tokens=60)
    text = (*one.prompt_ids, *one.ids)
    assert all(text[t] == text[t - 2] for t in range(len(one.prompt_ids), len(text)))
    assert set(one.kept) == {1}
    plain, same = run.generate("the king", num_tokens=60)[0], run.generate("the king", num_tokens=60, rule=neutral)[0]
    assert (same.ids, same.logprobs, same.leads) == (plain.ids, plain.logprobs, plain.leads)
    assert plain.settings.rule is None


def test_records_and_streams_take_a_rule(run: hipgpt_jax.Run) -> None:
    (one,) = run.generate("the king", rule=copying, num_tokens=9)
    (again,) = run.records("the king", rule=copying, num_tokens=9)
    stream = run.stream("the king", rule=copying, num_tokens=9)
    assert "".join(stream) == one.text
    assert stream.record is not None
    assert [(made.ids, made.settings) for made in (again, stream.record)] == [(one.ids, one.settings)] * 2


def test_a_rule_that_bans_every_token_is_named_in_the_error(run: hipgpt_jax.Run) -> None:
    def banning(logits_V: jax.Array, context_W: jax.Array, length: jax.Array) -> jax.Array:
        del context_W, length
        return jnp.full_like(logits_V, -jnp.inf)

    (one,) = run.generate("the king", rule=banning, num_tokens=3)
    assert one.error == (
        "the logits after the rule are not finite at token 0: the rule must return finite numbers, or minus infinity "
        "for a part of the tokens"
    )
    assert replayed(run.with_rule(banning), [one]) == [True]


def test_log_probabilities_are_the_models_own(run: hipgpt_jax.Run) -> None:
    records = run.generate("the king", rule=green, num_tokens=25, num_samples=2)
    for one, scored in zip(records, run.score(records), strict=True):
        np.testing.assert_allclose(scored.logprobs[-25:], one.logprobs, atol=1e-4)
    settings = hipgpt_jax.SamplingConfig()
    for one, scored in zip(records, run.with_rule(green).score(records, settings=settings), strict=True):
        assert scored.sampled_logprobs is not None
        np.testing.assert_allclose(scored.sampled_logprobs[-25:], one.sampled_logprobs, atol=1e-4)


def test_records_of_a_rule_are_replayed_by_the_same_rule(run: hipgpt_jax.Run) -> None:
    records = run.generate(["the king", "a queen"], rule=green, num_tokens=40, num_samples=2)
    (name, digest) = str(records[0].settings.rule).split(" sha256:")
    assert (name, len(digest)) == (f"{__name__}.green", 64)
    ruled = run.with_rule(green)
    assert replayed(ruled, records) == [True] * 4
    for one in records:
        found = ruled.screen(one)
        assert (found.tokens, found.unexplained, found.redrawn, found.mismatches) == (40, 0, (), ())


def test_other_rules_are_refused(run: hipgpt_jax.Run) -> None:
    (one,) = run.generate("the king", rule=green, num_tokens=3)
    (plain,) = run.generate("the king", num_tokens=3)
    theirs = one.settings.rule
    for other, recorded, message in (
        (run, one, f"it follows the rule {theirs}, and this run no rule: replay it in Python, by run.with_rule"),
        (
            run.with_rule(copying),
            one,
            f"it follows the rule {theirs}, and this run the rule {__name__}.copying sha256:",
        ),
        (run.with_rule(green), plain, f"it follows no rule, and this run the rule {theirs}"),
    ):
        for refused in (other.request_of, other.screen):
            with pytest.raises(ValueError, match="it follows") as error:
                refused(recorded)
            assert str(error.value).startswith(message)


def _from_text() -> Callable[..., jax.Array]:
    module = types.ModuleType("typed")
    exec("def f(logits_V, context_W, length):\n    return logits_V\n", module.__dict__)
    return module.f


class _Method:
    def rule(self, logits_V: jax.Array, context_W: jax.Array, length: jax.Array) -> jax.Array:
        del context_W, length
        return logits_V


@pytest.mark.parametrize(
    ("rule", "error", "message"),
    [
        (max, TypeError, "rule must be a function of the logits"),
        (_Method().rule, TypeError, "rule must be a function of the logits"),
        ("green", TypeError, "rule must be a function of the logits"),
        ([1], TypeError, "rule must be a function of the logits"),
        (_from_text(), ValueError, "rule must be defined in a file"),
    ],
)
def test_what_is_no_function_with_a_source_is_refused(
    run: hipgpt_jax.Run, rule: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run.generate("the king", rule=rule)  # pyright: ignore[reportArgumentType]


def test_nothing_is_compiled_again_for_the_same_rule(run: hipgpt_jax.Run) -> None:
    before = run.generate("the king", rule=green, num_tokens=40, seed=1)
    with fakes.compilations() as seen:
        run.generate("the king", rule=green, num_tokens=40, seed=2, temperature=0.7)
        run.generate("the king", num_tokens=40)
        assert run.generate("the king", rule=green, num_tokens=40, seed=1)[0].ids == before[0].ids
    assert seen == []


def test_the_command_line_skips_records_of_a_rule(
    run: hipgpt_jax.Run, tiny: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tiny)
    records = [*run.generate("the king", rule=green, num_tokens=5), *run.generate("the king", num_tokens=5)]
    Path("rule.jsonl").write_text("".join(f"{one.to_json().strip()}\n" for one in records))
    for flags, verdict in ((), "identical"), (("--forced",), "agrees"):
        result = programs.call("replay", "rule.jsonl", *flags, monkeypatch=monkeypatch, capsys=capsys)
        assert result.code == 2
        first, second, *_ = result.out.splitlines()
        assert first.endswith("and this run no rule: replay it in Python, by run.with_rule")
        assert first.startswith(f"skipped    {records[0].id} sample 0: it follows the rule {__name__}.green sha256:")
        assert second.startswith(verdict)
