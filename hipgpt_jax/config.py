"""Model, sampling, decoding and generation settings: frozen, validated dataclasses. ``training_config`` is training's.

Every default in the package stands here, once. Nothing here imports JAX, so the command line can
refuse a bad flag before the slow imports begin.
"""

import dataclasses
import math
import numbers
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

DTYPES = ("float32", "bfloat16")
_SURROGATE = re.compile("[\ud800-\udfff]")
_LONE_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")
# Far beyond any model that was trained, and small enough that what is computed of them takes no time.
_LARGEST = {
    "vocab_size": 2**24,
    "max_seq_len": 2**24,
    "embed_dim": 2**16,
    "num_heads": 2**16,
    "ff_hidden_dim": 2**20,
    "num_layers": 2**10,
}


def as_int(value: Any) -> int | None:
    """Returns an integer of any type, NumPy's and JAX's scalars among them, as Python's; None for anything else.

    >>> as_int(3), as_int(3.0), as_int(True)
    (3, None, None)
    """
    if type(value) is int:
        return value
    # NumPy 2 gives its booleans no __index__, and an array has one only if it holds a single integer.
    if isinstance(value, bool) or getattr(value, "shape", ()) != ():
        return None
    try:
        return operator.index(value)
    except TypeError:
        return None


def require_int(name: str, value: object, low: int, meaning: str) -> int:
    """Returns a value as a Python integer; raises ValueError where it is no integer of at least ``low``."""
    number = as_int(value)
    if number is None or number < low:
        raise ValueError(f"{name} must be an integer of at least {low} ({meaning}): got {shortened(value)}")
    return number


def require_number(name: str, value: Any) -> float:
    """Returns a real number of any type as a Python float; raises ValueError for anything else, text and bool too."""
    if type(value) is float:
        return value
    if getattr(value, "shape", None) == ():  # a scalar of NumPy or JAX
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, (float, numbers.Real)):
        raise ValueError(f"{name} must be a number: got {shortened(value)}")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{name} is too large for float64") from error


def shortened(value: object) -> str:
    """Returns ``repr(value)`` for a message, cut in its middle where it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}...{text[-17:]}"


def require_text(name: str, value: object) -> None:
    """Raises ValueError where a value is no text of at least one character that UTF-8 can hold."""
    if not isinstance(value, str) or not value or _SURROGATE.search(value):
        raise ValueError(f"{name} must be a text of at least one character, in UTF-8: got {value!r}")


def valid_text(text: str) -> str:
    r"""Returns text with U+FFFD in place of what UTF-8 cannot represent: undecodable bytes, lone surrogates.

    Python decodes command lines with the error handler ``surrogateescape``, so bytes that are not UTF-8 arrive as
    surrogates. They are read as those of a file are.

    >>> valid_text("caf\udcc3\udca9 \udcff")
    'café \ufffd'
    """
    text = _LONE_SURROGATE.sub("\ufffd", text)
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")


def require_finite(name: str, value: float, meaning: str) -> None:
    """Raises ValueError where a number is infinite or not a number."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number ({meaning}): got {value}")


def require_token(name: str, token_id: int, vocab_size: int) -> None:
    """Raises ValueError where an id is neither -1, which is none, nor in a vocabulary."""
    if token_id >= vocab_size:
        raise ValueError(f"{name} must be -1 or below the vocabulary's size {vocab_size}: got {token_id}")


def require_dtype(value: object) -> None:
    """Raises ValueError where a value is no type of ``DTYPES``."""
    if value not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}: got {value!r}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a GPT-2 model; the names are the keys of a run's config file.

    Attributes:
        vocab_size: Number of token ids, ``V``; at most 2**24.
        max_seq_len: Number of learned positions, the longest context the model can see; at most 2**24.
        embed_dim: Width of the residual stream, ``D``; a multiple of ``num_heads``, at most 2**16.
        num_heads: Attention heads, ``N``.
        ff_hidden_dim: Width of the feed-forward layer, ``F``; at most 2**20.
        num_layers: Transformer blocks, ``L``; at most 2**10.

    Raises:
        ValueError: A value is not an integer in its range, or the heads do not divide the width.

    >>> ModelConfig(embed_dim=256, num_heads=8).head_dim
    32
    """

    vocab_size: int = 5000
    max_seq_len: int = 32
    embed_dim: int = 128
    num_heads: int = 4
    ff_hidden_dim: int = 256
    num_layers: int = 2

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            require_int(field.name, value := getattr(self, field.name), 1, "a size of the model")
            if value > _LARGEST[field.name]:
                raise ValueError(
                    f"{field.name} must be at most {_LARGEST[field.name]} (a size of the model): got {value}"
                )
        if self.embed_dim % self.num_heads:
            divisors = [n for n in range(1, self.embed_dim + 1) if self.embed_dim % n == 0]
            raise ValueError(
                f"embed_dim must be a multiple of num_heads: got {self.embed_dim} "
                f"and {self.num_heads}, remainder {self.embed_dim % self.num_heads}. "
                f"Choose num_heads from {divisors}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, ``H``."""
        return self.embed_dim // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How the next token is chosen from the logits.

    The order of operations is fixed: repetition penalty, temperature, top-k, top-p, draw. Each
    setting has a neutral value at which its operation is an exact identity.

    Attributes:
        temperature: Divides the logits; at least 0. 0 always takes the most likely token; 1 is neutral.
        top_k: Keeps exactly the ``top_k`` most likely tokens; 0, or more than the vocabulary, keeps all.
        top_p: Keeps the smallest set of most likely tokens whose probability reaches it; in (0, 1],
            1 keeps all.
        repetition_penalty: Divides positive and multiplies negative logits of every token already in
            the prompt or the output, once for each distinct token; from 1e-6 to 1e6, 1 is neutral.

    Raises:
        ValueError: A value is out of its range, infinite or not a number.
    """

    temperature: float = 1.0
    top_k: int = 5
    top_p: float = 0.9
    repetition_penalty: float = 1.1

    def __post_init__(self) -> None:
        _apply(SAMPLING_RULES, self)


OVERFLOW_RULES = ("roll", "stop", "error")
MAX_SEED = 2**32 - 1
MAX_SAMPLES = 2**32  # a sample's index is one 32-bit word of its random key
MAX_ALTERNATIVES = 20


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """How far and through which window text is generated. Changing one of these compiles again.

    Attributes:
        window: Tokens the model sees at most, ``W``; None takes the model's ``max_seq_len``.
        window_stride: Tokens dropped at a time once the window is full, in ``[1, window]``. 1 is the
            exact sliding window; ``N`` recomputes the window only every ``N`` tokens.
        overflow: What happens when the window is full: ``roll`` slides it, ``stop`` ends the sample,
            ``error`` refuses a request that could not fit.
        width: Rows of the compiled decode step, the decode width; rows never affect each other.
        dtype: Type of the arithmetic and of the KV cache, one of ``DTYPES``; softmax, LayerNorm's
            statistics, the logits and all of sampling are float32 in either.

    Raises:
        ValueError: A value is out of its range.
    """

    window: int | None = None
    window_stride: int = 1
    overflow: str = "roll"
    width: int = 1
    dtype: str = "float32"

    def __post_init__(self) -> None:
        _apply(_DECODING_RULES, self)
        if self.overflow not in OVERFLOW_RULES:
            raise ValueError(f"overflow must be one of {', '.join(OVERFLOW_RULES)}: got {self.overflow!r}")
        require_dtype(self.dtype)

    def resolve_window(self, model: ModelConfig) -> int:
        """Returns the window ``W`` for ``model``.

        Raises:
            ValueError: The window exceeds the model's positions, or the stride exceeds the window.
        """
        window = model.max_seq_len if self.window is None else self.window
        if window > model.max_seq_len:
            raise ValueError(
                f"max_seq_len must be at most the run's own {model.max_seq_len} (its learned positions): got {window}"
            )
        if self.window_stride > window:
            raise ValueError(f"window_stride must be at most the window of {window} tokens: got {self.window_stride}")
        return window

    def check_fits(self, window: int, prompt_tokens: int, num_tokens: int) -> None:
        """Raises ValueError where overflow is an error and a sample would overflow ``window``."""
        needed = prompt_tokens + num_tokens - 1
        if self.overflow == "error" and num_tokens and needed > window:
            raise ValueError(
                f"a prompt of {prompt_tokens} tokens and {num_tokens} new ones need a window of {needed}: "
                f"it holds {window}. Ask for fewer tokens, or use --overflow=roll"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Number, length and ends of the samples of a prompt.

    Attributes:
        num_tokens: New tokens for each sample; at least 0.
        num_samples: Samples for each prompt; from 1 to 2**32.
        seed: In ``[0, 2**32)``; with the prompt's ids, the sample's index and the token's index it is
            all that the random numbers depend on.
        eos_id: Token that ends a sample and is not part of its text; -1 for none.
        stop: Strings that end a sample where its text comes to hold one; the text is cut before it. A single string
            and a list are accepted too.
        top_logprobs: Alternatives recorded with each token, the likeliest ones; at most 20.

    Raises:
        ValueError: A value is out of its range.
    """

    num_tokens: int = 50
    num_samples: int = 1
    seed: int = 0
    eos_id: int = -1
    stop: tuple[str, ...] = ()
    top_logprobs: int = 0

    def __post_init__(self) -> None:
        _apply(GENERATION_RULES, self)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError where ``eos_id`` is no token of a vocabulary of ``vocab_size``."""
        require_token("eos_id", self.eos_id, vocab_size)


# The rule of each setting: a function that returns a value in the type that is stored, and raises ValueError for one
# that is no good. A prompts file has few settings per line but may have millions of lines, so each is checked alone.
Rules = Mapping[str, Callable[[Any], Any]]


def _temperature(value: Any) -> float:
    number = require_number("temperature (temp)", value)
    require_finite("temp", number, "0 takes the most likely token, 1 is neutral")
    if number < 0:
        raise ValueError(f"temp must be at least 0 (0 takes the most likely token): got {number}")
    return number


def _top_k(value: Any) -> int:
    return require_int("top_k", value, 0, "0 keeps every token")


def _top_p(value: Any) -> float:
    number = require_number("top_p", value)
    if not 0 < number <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1 (1 keeps every token): got {number}")
    return number


def _repetition_penalty(value: Any) -> float:
    number = require_number("repetition_penalty (rep_penalty)", value)
    require_finite("rep_penalty", number, "1 is neutral")
    if not 1e-6 <= number <= 1e6:  # beyond that, float32 logits overflow
        raise ValueError(f"rep_penalty must be above 0, from 1e-6 to 1e6 (1 is neutral): got {number}")
    return number


def _num_tokens(value: Any) -> int:
    return require_int("num_tokens", value, 0, "new tokens to generate")


def _num_samples(value: Any) -> int:
    number = require_int("num_samples", value, 1, "samples for each prompt")
    if number > MAX_SAMPLES:
        raise ValueError(f"num_samples must be at most {MAX_SAMPLES} (32 bits): got {number}")
    return number


def _seed(value: Any) -> int:
    number = require_int("seed", value, 0, "the same seed gives the same tokens")
    if number > MAX_SEED:
        raise ValueError(f"seed must be at most {MAX_SEED} (32 bits): got {number}")
    return number


def _eos_id(value: Any) -> int:
    return require_int("eos_id", value, -1, "-1 disables it")


def _stop(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (tuple, list)):
        raise ValueError(f"stop must be a text or a list of texts: got {shortened(value)}")
    for text in texts:
        require_text("stop", text)
    return tuple(map(str, texts))


def _top_logprobs(value: Any) -> int:
    number = require_int("top_logprobs", value, 0, "alternatives recorded with each token")
    if number > MAX_ALTERNATIVES:
        raise ValueError(f"top_logprobs must be at most {MAX_ALTERNATIVES}: got {number}")
    return number


def _window(value: Any) -> int | None:
    return None if value is None else require_int("max_seq_len", value, 1, "the window, tokens the model may see")


def _window_stride(value: Any) -> int:
    return require_int("window_stride", value, 1, "tokens dropped at a time, 1 is exact")


def _width(value: Any) -> int:
    return require_int("batch_size", value, 1, "the width, rows decoded side by side")


SAMPLING_RULES: Rules = {
    "temperature": _temperature,
    "top_k": _top_k,
    "top_p": _top_p,
    "repetition_penalty": _repetition_penalty,
}
GENERATION_RULES: Rules = {
    "num_tokens": _num_tokens,
    "num_samples": _num_samples,
    "seed": _seed,
    "eos_id": _eos_id,
    "stop": _stop,
    "top_logprobs": _top_logprobs,
}
_DECODING_RULES: Rules = {"window": _window, "window_stride": _window_stride, "width": _width}


def _apply(rules: Rules, config: Any) -> None:
    """Replaces fields of a frozen dataclass, while it is being made, by what their rules return."""
    for name, rule in rules.items():
        object.__setattr__(config, name, rule(getattr(config, name)))
