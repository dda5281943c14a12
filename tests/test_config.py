"""Every documented range: its edges are valid, values beyond them are refused."""

import dataclasses
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hipgpt_jax import config, training_config

SETTINGS = settings(deadline=None, derandomize=True, database=None)

INF, NAN = float("inf"), float("nan")
MAX_SEED = 4_294_967_295
MODEL = config.ModelConfig(vocab_size=300, max_seq_len=8, embed_dim=16, num_heads=2, ff_hidden_dim=24, num_layers=1)

# Integers by their lowest value.
INTEGERS = [
    (config.SamplingConfig, "top_k", 0),
    (config.SamplingConfig, "no_repeat_ngram", 0),
    (config.DecodingConfig, "window", 1),
    (config.DecodingConfig, "window_stride", 1),
    (config.DecodingConfig, "batch_size", 1),
    (config.GenerationConfig, "num_tokens", 0),
    (config.GenerationConfig, "num_samples", 1),
    (config.GenerationConfig, "seed", 0),
    (config.GenerationConfig, "eos_id", -1),
    (config.GenerationConfig, "min_tokens", 0),
    (training_config.TrainConfig, "batch_size", 1),
    (training_config.TrainConfig, "steps", 1),
    (training_config.TrainConfig, "warmup_steps", 0),
    (training_config.TrainConfig, "seed", 0),
    (training_config.TrainConfig, "log_every", 1),
    (training_config.TrainConfig, "eval_every", 0),
    (training_config.TrainConfig, "eval_batches", 0),
    (training_config.TrainConfig, "ckpt_every", 0),
    (training_config.TrainConfig, "keep_last", 1),
]


@pytest.mark.parametrize(("kind", "field", "low"), INTEGERS)
def test_integers_have_a_lowest_value(kind: Any, field: str, low: int) -> None:
    assert getattr(kind(**{field: low}), field) == low
    for wrong in (low - 1, low - 1000, float(low), 1.5, NAN, INF, True, "4"):
        with pytest.raises(ValueError, match=rf"^{field} must be an integer of at least {low} .*got {wrong!r}$"):
            kind(**{field: wrong})


@pytest.mark.parametrize("field", [field.name for field in dataclasses.fields(config.ModelConfig)])
def test_model_sizes_have_a_highest_value(field: str) -> None:
    """Otherwise listing the divisors of a width of 10**9, or the names of 10**9 layers, would take minutes."""
    highest = {"vocab_size": 2**24, "max_seq_len": 2**24, "ff_hidden_dim": 2**20, "num_layers": 2**10}.get(field, 2**16)
    largest = {"embed_dim": 2**16, "num_heads": 1} | {field: highest}
    assert getattr(config.ModelConfig(**largest), field) == highest
    for wrong in (highest + 1, 10**9, 10**30):
        with pytest.raises(
            ValueError, match=rf"^{field} must be at most {highest} \(a size of the model\): got {wrong}$"
        ):
            config.ModelConfig(**{field: wrong})
    invalid: list[Any] = [0, -8, 128.0, True]
    for wrong in invalid:
        with pytest.raises(ValueError, match=rf"^{field} must be an integer of at least 1 .*got {wrong!r}$"):
            config.ModelConfig(**{field: wrong})


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (config.SamplingConfig, {"temperature": 0.0}),
        (config.SamplingConfig, {"temperature": 1e-6}),
        (config.SamplingConfig, {"temperature": 100.0}),
        (config.SamplingConfig, {"top_k": 10**9}),
        (config.SamplingConfig, {"top_p": 1.0}),
        (config.SamplingConfig, {"top_p": 1e-9}),
        (config.SamplingConfig, {"repetition_penalty": 1e-6}),
        (config.SamplingConfig, {"repetition_penalty": 1e6}),
        (config.SamplingConfig, {"min_p": 0.0}),
        (config.SamplingConfig, {"min_p": 0.999}),
        (config.SamplingConfig, {"frequency_penalty": -1e6, "presence_penalty": 1e6}),
        (config.SamplingConfig, {"penalty_scope": "all"}),
        (config.SamplingConfig, {"penalty_scope": "output"}),
        (config.SamplingConfig, {"no_repeat_ngram": 2**24}),
        (config.SamplingConfig, {"logit_bias": ((0, -1e6), ("a", 1e6)), "ban": (0, "b"), "allow": (1, "b")}),
        (config.GenerationConfig, {"min_tokens": 50}),
        (config.GenerationConfig, {"min_tokens": 0, "num_tokens": 0}),
        (config.DecodingConfig, {"overflow": "roll"}),
        (config.DecodingConfig, {"overflow": "stop"}),
        (config.DecodingConfig, {"overflow": "error"}),
        (config.DecodingConfig, {"dtype": "bfloat16"}),
        (config.GenerationConfig, {"seed": MAX_SEED}),
        (training_config.TrainConfig, {"seed": MAX_SEED}),
        (training_config.TrainConfig, {"min_lr": 0.0}),
        (training_config.TrainConfig, {"learning_rate": 0.5, "min_lr": 0.5}),
        (training_config.TrainConfig, {"beta2": 0.0}),
        (training_config.TrainConfig, {"weight_decay": 0.0}),
        (training_config.TrainConfig, {"dropout": 0.0}),
        (training_config.TrainConfig, {"dropout": 0.999}),
    ],
)
def test_edges_of_ranges_are_valid(kind: Any, values: dict[str, Any]) -> None:
    made = kind(**values)
    assert {name: getattr(made, name) for name in values} == values


@pytest.mark.parametrize(
    ("kind", "values", "text"),
    [
        (
            config.SamplingConfig,
            {"temperature": -0.1},
            "temperature must be at least 0 (0 takes the most likely token)",
        ),
        (config.SamplingConfig, {"temperature": NAN}, "temperature must be a finite number"),
        (config.SamplingConfig, {"temperature": INF}, "temperature must be a finite number"),
        (config.SamplingConfig, {"temperature": -INF}, "temperature must be a finite number"),
        (config.SamplingConfig, {"top_p": 0.0}, "top_p must be above 0 and at most 1"),
        (config.SamplingConfig, {"top_p": -0.1}, "got -0.1"),
        (config.SamplingConfig, {"top_p": 1.0000001}, "got 1.0000001"),
        (config.SamplingConfig, {"top_p": NAN}, "top_p must be above 0 and at most 1 (1 keeps every token): got nan"),
        (config.SamplingConfig, {"top_p": INF}, "got inf"),
        (config.SamplingConfig, {"repetition_penalty": 0.0}, "repetition_penalty must be above 0, from 1e-6 to 1e6"),
        (config.SamplingConfig, {"repetition_penalty": 9e-7}, "(1 is neutral): got 9e-07"),
        (config.SamplingConfig, {"repetition_penalty": 1.1e6}, "(1 is neutral): got 1100000.0"),
        (config.SamplingConfig, {"repetition_penalty": -1.0}, "repetition_penalty must be above 0"),
        (config.SamplingConfig, {"repetition_penalty": NAN}, "repetition_penalty must be a finite number"),
        (config.SamplingConfig, {"repetition_penalty": INF}, "repetition_penalty must be a finite number"),
        (
            config.SamplingConfig,
            {"min_p": -0.1},
            "min_p must be at least 0 and below 1 (0 keeps every token): got -0.1",
        ),
        (config.SamplingConfig, {"min_p": 1.0}, "min_p must be at least 0 and below 1"),
        (config.SamplingConfig, {"min_p": NAN}, "got nan"),
        (
            config.SamplingConfig,
            {"frequency_penalty": 1.1e6},
            "frequency_penalty must be from -1e6 to 1e6 (0 is neutral)",
        ),
        (config.SamplingConfig, {"frequency_penalty": NAN}, "got nan"),
        (config.SamplingConfig, {"presence_penalty": -INF}, "presence_penalty must be from -1e6 to 1e6"),
        (config.SamplingConfig, {"penalty_scope": "prompt"}, "penalty_scope must be one of all, output: got 'prompt'"),
        (config.SamplingConfig, {"no_repeat_ngram": 2**24 + 1}, "no_repeat_ngram must be at most 16777216"),
        (config.SamplingConfig, {"logit_bias": {3: 1.1e6}}, "logit_bias must be from -1e6 to 1e6"),
        (config.SamplingConfig, {"logit_bias": {3: NAN}}, "got nan"),
        (config.SamplingConfig, {"logit_bias": ["3"]}, "logit_bias must be given as ID=VALUE: got '3'"),
        (config.SamplingConfig, {"logit_bias": "=3"}, "logit_bias must be given as ID=VALUE: got '=3'"),
        (config.SamplingConfig, {"logit_bias": ["3=x"]}, "logit_bias must be given as ID=VALUE: got '3=x'"),
        (config.SamplingConfig, {"logit_bias": [(3, 1.0), ("3", 2)]}, "logit_bias has two values for the token 3"),
        (config.SamplingConfig, {"logit_bias": {-1: 1.0}}, "logit_bias must be an integer of at least 0"),
        (config.SamplingConfig, {"logit_bias": 3}, "logit_bias must be a mapping of tokens to values: got 3"),
        (
            config.SamplingConfig,
            {"ban": [-1]},
            "ban must be an integer of at least 0 (a token's id or its text): got -1",
        ),
        (config.SamplingConfig, {"ban": [""]}, "ban must be a text of at least one character"),
        (config.SamplingConfig, {"ban": 1.5}, "ban must be a token or a list of tokens: got 1.5"),
        (config.SamplingConfig, {"allow": [True]}, "allow must be an integer of at least 0"),
        (
            config.SamplingConfig,
            {"allow": [3, "a"], "ban": ["a", 3, 4]},
            "allow must have a token that ban does not have",
        ),
        (config.GenerationConfig, {"min_tokens": 51}, "min_tokens must be at most num_tokens: got 51 and 50"),
        (config.DecodingConfig, {"overflow": "wrap"}, "overflow must be one of roll, stop, error: got 'wrap'"),
        (config.DecodingConfig, {"dtype": "float16"}, "dtype must be one of float32, bfloat16: got 'float16'"),
        (config.GenerationConfig, {"seed": MAX_SEED + 1}, "seed must be at most 4294967295 (a 32-bit number): got"),
        (
            training_config.TrainConfig,
            {"seed": MAX_SEED + 1},
            "seed must be at most 4294967295 (32 bits): got 4294967296",
        ),
        (
            training_config.TrainConfig,
            {"learning_rate": 0.0},
            "learning_rate must be above 0: got 0.0",
        ),
        (training_config.TrainConfig, {"learning_rate": -1e-3}, "learning_rate must be above 0"),
        (training_config.TrainConfig, {"learning_rate": NAN}, "learning_rate must be a finite number"),
        (training_config.TrainConfig, {"learning_rate": INF}, "learning_rate must be a finite number"),
        (training_config.TrainConfig, {"clip": 0.0}, "clip must be above 0: got 0.0"),
        (training_config.TrainConfig, {"clip": NAN}, "clip must be a finite number"),
        (training_config.TrainConfig, {"clip": INF}, "clip must be a finite number"),
        (training_config.TrainConfig, {"min_lr": -1e-9}, "min_lr must be between 0 and learning_rate 0.001"),
        (training_config.TrainConfig, {"min_lr": 0.01}, "min_lr must be between 0 and learning_rate 0.001: got 0.01"),
        (training_config.TrainConfig, {"min_lr": NAN}, "min_lr must be between 0 and learning_rate 0.001: got nan"),
        (training_config.TrainConfig, {"beta2": 1.0}, "beta2 must be at least 0 and below 1: got 1.0"),
        (training_config.TrainConfig, {"beta2": -0.1}, "beta2 must be at least 0"),
        (training_config.TrainConfig, {"beta2": NAN}, "got nan"),
        (training_config.TrainConfig, {"weight_decay": -0.1}, "weight_decay must be at least 0: got -0.1"),
        (training_config.TrainConfig, {"weight_decay": NAN}, "weight_decay must be a finite number"),
        (training_config.TrainConfig, {"weight_decay": INF}, "weight_decay must be a finite number"),
        (training_config.TrainConfig, {"dropout": 1.0}, "dropout must be at least 0 and below 1: got 1.0"),
        (training_config.TrainConfig, {"dropout": -0.1}, "dropout must be at least 0"),
        (training_config.TrainConfig, {"dropout": NAN}, "got nan"),
    ],
)
def test_values_outside_a_range_are_refused(kind: Any, values: dict[str, Any], text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(text)):
        kind(**values)


@SETTINGS
@given(width=st.integers(1, 64), heads=st.integers(1, 64))
def test_num_heads_divides_embed_dim_or_the_error_lists_divisors(width: int, heads: int) -> None:
    sizes = {"embed_dim": width, "num_heads": heads}
    if width % heads == 0:
        assert config.ModelConfig(**sizes).head_dim * heads == width
        return
    text = f"^embed_dim must be a multiple of num_heads: got {width} and {heads}, remainder {width % heads}\\. "
    with pytest.raises(ValueError, match=text) as caught:
        config.ModelConfig(**sizes)
    named = [int(number) for number in str(caught.value).split("[")[1].rstrip("]").split(",")]
    assert named == [n for n in range(1, 65) if width % n == 0]


def test_window_is_at_most_that_of_the_model() -> None:
    assert config.DecodingConfig().resolve_window(MODEL) == 8
    assert config.DecodingConfig(window=8).resolve_window(MODEL) == 8
    assert config.DecodingConfig(window=1).resolve_window(MODEL) == 1
    with pytest.raises(ValueError, match=r"window must be at most the run's own 8 .*: got 9"):
        config.DecodingConfig(window=9).resolve_window(MODEL)


def test_stride_is_at_most_the_window() -> None:
    assert config.DecodingConfig(window=5, window_stride=5).resolve_window(MODEL) == 5
    with pytest.raises(ValueError, match="window_stride must be at most the window of 5 tokens: got 6"):
        config.DecodingConfig(window=5, window_stride=6).resolve_window(MODEL)
    with pytest.raises(ValueError, match="window_stride must be at most the window of 8 tokens: got 9"):
        config.DecodingConfig(window_stride=9).resolve_window(MODEL)


def test_end_token_is_in_the_vocabulary() -> None:
    for eos_id in (-1, 0, 299):
        config.GenerationConfig(eos_id=eos_id).check_vocabulary(300)
    with pytest.raises(ValueError, match="eos_id must be -1 or below the vocabulary's size 300: got 300"):
        config.GenerationConfig(eos_id=300).check_vocabulary(300)


def test_tokens_are_ids_or_texts_in_any_form() -> None:
    given: dict[str, Any] = {
        "logit_bias": ["7=-1.5", " a=b=2", (9, 1)],
        "ban": ("12", "x", 12, "x"),
        "allow": "\N{ARABIC-INDIC DIGIT THREE}",
    }
    one = config.SamplingConfig(**given)
    assert one.logit_bias == ((7, -1.5), (" a=b", 2.0), (9, 1.0))
    assert one.ban == (12, "x")
    assert one.allow == ("\N{ARABIC-INDIC DIGIT THREE}",), "only ASCII digits are an id"
    alone: dict[str, Any] = {"logit_bias": {"7": 2}, "ban": 7}
    assert config.SamplingConfig(**alone) == config.SamplingConfig(logit_bias=((7, 2.0),), ban=(7,))


def test_texts_become_ids_in_ascending_order() -> None:
    def token_id(text: str) -> int:
        if text not in "abc":
            raise ValueError(f"{text!r} is 2 tokens: 5, 6")
        return 10 + ord(text) - ord("a")

    given: dict[str, Any] = {"logit_bias": {"b": 1, 3: 2}, "ban": ("c", 1, "a"), "allow": (12, "b", "c")}
    one = config.SamplingConfig(**given)
    found = one.with_ids(token_id, 13)
    assert (found.logit_bias, found.ban, found.allow) == (((3, 2.0), (11, 1.0)), (1, 10, 12), (11, 12))
    assert config.SamplingConfig().with_ids(token_id, 13) == config.SamplingConfig()
    refused: list[tuple[dict[str, Any], str]] = [
        ({"ban": ("no",)}, "ban must be a token's id, or a text that is one token: 'no' is 2 tokens: 5, 6"),
        ({"logit_bias": {"c": 1}}, "logit_bias must be below the vocabulary's size 12: got 12"),
        ({"logit_bias": {"a": 1, 10: 1}}, "logit_bias has two values for the token 10"),
        ({"allow": ("a",), "ban": (10,)}, "allow must have a token that ban does not have"),
        ({"ban": tuple(range(12))}, "ban must leave a token: it has all 12 of the vocabulary"),
    ]
    for values, text in refused:
        with pytest.raises(ValueError, match=re.escape(text)):
            config.SamplingConfig(**values).with_ids(token_id, 12)


def test_the_last_learning_rate_is_a_tenth_of_the_peak_or_the_one_given() -> None:
    assert training_config.TrainConfig(learning_rate=0.5).final_learning_rate == 0.05
    assert training_config.TrainConfig(learning_rate=0.5, min_lr=0.0).final_learning_rate == 0.0
    assert training_config.TrainConfig(learning_rate=0.5, min_lr=0.25).final_learning_rate == 0.25


def test_the_documented_defaults() -> None:
    assert dataclasses.astuple(config.ModelConfig()) == (5000, 32, 128, 4, 256, 2)
    sampling = (1.0, 5, 0.9, 1.1, 0.0, 0.0, 0.0, "all", 0, (), (), ())
    assert dataclasses.astuple(config.SamplingConfig()) == sampling
    assert dataclasses.astuple(config.GenerationConfig()) == (50, 1, 0, 0, -1, (), 0, 0)
    assert dataclasses.astuple(config.DecodingConfig()) == (None, 1, "roll", 1, "float32", "fast", None)
    assert training_config.TrainConfig().batch_size == 4
