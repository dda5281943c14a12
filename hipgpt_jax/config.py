"""Settings of models, sampling, decoding and generation: frozen, validated dataclasses with all defaults.

``training_config`` has those of training. Nothing here imports JAX, so that programs reject a wrong flag before the
slow imports. An error message begins with the name of the field; programs replace it by the flag's.
"""

import dataclasses
import functools
import math
import numbers
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

DTYPES = ("float32", "bfloat16")
OVERFLOW_RULES = ("roll", "stop", "error")
NUMERICS = ("fast", "invariant")
PENALTY_SCOPES = ("all", "output")
MAX_SEED = 2**32 - 1
MAX_SAMPLES = 2**32  # a sample's index is one 32-bit word of its random key
MAX_ALTERNATIVES = 20
NUMBERING = frozenset({"num_samples", "first_sample"})  # which samples there are; the only settings that affect none
MAX_MESH = 2**16
_LONE_SURROGATE = re.compile("[\ud800-\udc7f\udd00-\udfff]")

_T = TypeVar("_T")
# A function of a field's name and value. It returns the value in the type that is stored, or raises ValueError.
_Rule = Callable[[str, Any], Any]
Rules = Mapping[str, Callable[[Any], Any]]


def as_int(value: Any) -> int | None:
    """Returns an integer of any type, such as a NumPy or JAX scalar, as Python's; None for anything else.

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


def require_int(name: str, value: object, low: int, meaning: str, high: int | None = None) -> int:
    """Returns a value as a Python integer.

    Args:
        name: Name of the field, for the error message.
        value: The value.
        low: Least value allowed.
        meaning: Meaning of the field, for the error message.
        high: Largest value allowed; None for no limit.

    Raises:
        ValueError: The value is not an integer in this range.
    """
    number = as_int(value)
    if number is None or number < low:
        raise ValueError(f"{name} must be an integer of at least {low} ({meaning}): got {shortened(value)}")
    if high is not None and number > high:
        raise ValueError(f"{name} must be at most {high} ({meaning}): got {shortened(number)}")
    return number


def require_number(name: str, value: Any) -> float:
    """Returns a real number of any type as a Python float; raises ValueError for anything else, such as a bool."""
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


def require_finite(name: str, value: float, meaning: str) -> None:
    """Raises ValueError if a number is infinite or NaN."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number ({meaning}): got {value}")


def require_text(name: str, value: object) -> None:
    """Raises ValueError if a value is not a non-empty string that can be encoded in UTF-8."""
    if not isinstance(value, str) or not value or any("\ud800" <= char <= "\udfff" for char in value):
        raise ValueError(f"{name} must be a text of at least one character, in UTF-8: got {value!r}")


def require_token(name: str, token_id: int, vocab_size: int) -> None:
    """Raises ValueError if a token id is neither -1 (none) nor below ``vocab_size``."""
    if token_id >= vocab_size:
        raise ValueError(f"{name} must be -1 or below the vocabulary's size {vocab_size}: got {token_id}")


def require_dtype(value: object) -> None:
    """Raises ValueError if a value is not one of ``DTYPES``."""
    _choice(DTYPES)("dtype", value)


def shortened(value: object) -> str:
    """Returns ``repr(value)`` for an error message, cut in the middle if it is long."""
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:100]}...{text[-17:]}"


def valid_text(text: str) -> str:
    r"""Returns text with U+FFFD in place of what UTF-8 cannot represent: undecodable bytes, lone surrogates.

    Python decodes command lines with the error handler ``surrogateescape``, so bytes that are not UTF-8 arrive as
    surrogates. They are decoded here as in a file.

    >>> valid_text("caf\udcc3\udca9 \udcff")
    'café \ufffd'
    """
    text = _LONE_SURROGATE.sub("\ufffd", text)
    return text.encode("utf-8", errors="surrogateescape").decode("utf-8", errors="replace")


def _integer(low: int, meaning: str, high: int | None = None) -> _Rule:
    return lambda name, value: require_int(name, value, low, meaning, high)


def _optional(rule: _Rule) -> _Rule:
    return lambda name, value: None if value is None else rule(name, value)


def _choice(choices: tuple[str, ...]) -> _Rule:
    def rule(name: str, value: Any) -> Any:
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}: got {value!r}")
        return value

    return rule


def _temperature(name: str, value: Any) -> float:
    number = require_number(name, value)
    require_finite(name, number, "0 takes the most likely token, 1 is neutral")
    if number < 0:
        raise ValueError(f"{name} must be at least 0 (0 takes the most likely token): got {number}")
    return number


def _top_p(name: str, value: Any) -> float:
    number = require_number(name, value)
    if not 0 < number <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1 (1 keeps every token): got {number}")
    return number


def _min_p(name: str, value: Any) -> float:
    number = require_number(name, value)
    if not 0 <= number < 1:
        raise ValueError(f"{name} must be at least 0 and below 1 (0 keeps every token): got {number}")
    return number


def _penalty(name: str, value: Any) -> float:
    number = require_number(name, value)
    if not abs(number) <= 1e6:
        raise ValueError(f"{name} must be from -1e6 to 1e6 (0 is neutral): got {number}")
    return number


def _token(name: str, value: Any) -> int | str:
    """Returns a token given by its id, as a number or in digits, or by its text."""
    if isinstance(value, str) and not (value.isascii() and value.isdigit()):
        require_text(name, value)
        return str(value)
    return require_int(name, int(value) if isinstance(value, str) else value, 0, "a token's id or its text")


def _tokens(name: str, value: Any) -> tuple[int | str, ...]:
    several = (value,) if isinstance(value, (str, int)) else value
    if not isinstance(several, (tuple, list)):
        raise ValueError(f"{name} must be a token or a list of tokens: got {shortened(value)}")
    return tuple(dict.fromkeys(_token(name, token) for token in several))


def _logit_bias(name: str, value: Any) -> tuple[tuple[int | str, float], ...]:
    pairs = list(value.items()) if isinstance(value, Mapping) else [value] if isinstance(value, str) else value
    if not isinstance(pairs, (tuple, list)):
        raise ValueError(f"{name} must be a mapping of tokens to values: got {shortened(value)}")
    bias: dict[int | str, float] = {}
    for pair in pairs:
        token, number = pair, None
        if isinstance(pair, str):
            token, _, value_text = pair.rpartition("=")
            number = value_text if token else None
        elif isinstance(pair, (tuple, list)) and len(pair) == 2:
            token, number = pair
        try:
            number = float(number) if isinstance(number, str) else require_number(name, number)
        except ValueError:
            raise ValueError(f"{name} must be given as ID=VALUE: got {shortened(pair)}") from None
        if not abs(number) <= 1e6:
            raise ValueError(f"{name} must be from -1e6 to 1e6 (0 is neutral; ban excludes a token): got {number}")
        token = _token(name, token)
        if token in bias:
            raise ValueError(f"{name} has two values for the token {shortened(token)}")
        bias[token] = number
    return tuple(bias.items())


def _repetition_penalty(name: str, value: Any) -> float:
    number = require_number(name, value)
    require_finite(name, number, "1 is neutral")
    if not 1e-6 <= number <= 1e6:  # beyond that, float32 logits overflow
        raise ValueError(f"{name} must be above 0, from 1e-6 to 1e6 (1 is neutral): got {number}")
    return number


def _texts(name: str, value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else value
    if not isinstance(texts, (tuple, list)):
        raise ValueError(f"{name} must be a text or a list of texts: got {shortened(value)}")
    for text in texts:
        require_text(name, text)
    return tuple(map(str, texts))


def _mesh(name: str, value: Any) -> str | None:
    """Returns the axis ``model`` of a mesh, such as ``model=2``; None for a single device."""
    if value is None:
        return None
    axis, _, size = value.partition("=") if isinstance(value, str) else ("", "", "")
    if axis != "model" or not (size.isascii() and size.isdecimal() and 1 <= int(size) <= MAX_MESH):
        raise ValueError(
            f"{name} must be model=N (devices that share the model): got {shortened(value)}. It has no other axis: "
            f"devices=N gives each device samples of its own"
        )
    return None if int(size) == 1 else f"model={int(size)}"


def _field(default: _T, rule: _Rule) -> _T:
    """Returns a dataclass field with a default and the rule for its value."""
    return dataclasses.field(default=default, metadata={"rule": rule})


def _size(default: int, high: int) -> int:
    # The limits are far beyond any trained model, and computing with sizes within them takes no time.
    return _field(default, _integer(1, "a size of the model", high))


def _validate(config: Any) -> None:
    """Replaces the fields of a frozen dataclass under construction by what their rules return."""
    for field in dataclasses.fields(config):
        object.__setattr__(config, field.name, field.metadata["rule"](field.name, getattr(config, field.name)))


def _rules(kind: type) -> Rules:
    return {field.name: functools.partial(field.metadata["rule"], field.name) for field in dataclasses.fields(kind)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Shape of a GPT-2 model. The names are the keys of a run's config file.

    Attributes:
        vocab_size: Number of token ids, ``V``; at most 2**24.
        max_seq_len: Number of learned positions, the longest context; at most 2**24.
        embed_dim: Width of the residual stream, ``D``; a multiple of ``num_heads``, at most 2**16.
        num_heads: Attention heads, ``N``; at most 2**16.
        ff_hidden_dim: Width of the feed-forward layer, ``F``; at most 2**20.
        num_layers: Transformer blocks, ``L``; at most 2**10.

    Raises:
        ValueError: A value is not an integer in its range, or the heads do not divide the width.

    >>> ModelConfig(embed_dim=256, num_heads=8).head_dim
    32
    """

    vocab_size: int = _size(5000, 2**24)
    max_seq_len: int = _size(32, 2**24)
    embed_dim: int = _size(128, 2**16)
    num_heads: int = _size(4, 2**16)
    ff_hidden_dim: int = _size(256, 2**20)
    num_layers: int = _size(2, 2**10)

    def __post_init__(self) -> None:
        _validate(self)
        if self.embed_dim % self.num_heads:
            divisors = [n for n in range(1, self.embed_dim + 1) if self.embed_dim % n == 0]
            raise ValueError(
                f"embed_dim must be a multiple of num_heads: got {self.embed_dim} and {self.num_heads}, "
                f"remainder {self.embed_dim % self.num_heads}. Choose num_heads from {divisors}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one attention head, ``H``."""
        return self.embed_dim // self.num_heads


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Choice of the next token from the logits.

    The order of operations is fixed: bias and bans, penalties, temperature, top-k, top-p, min-p, draw. Each setting has
    a neutral value, at which its operation is an exact identity.

    Tokens are given by their ids, or by texts that are one token of the run's vocabulary; digits are an id.

    Attributes:
        temperature: Divisor of the logits; at least 0. 0 always takes the most likely token; 1 is neutral.
        top_k: Number of most likely tokens kept, exactly; 0, or more than the vocabulary, keeps all.
        top_p: Probability that the smallest set of most likely tokens must reach; in (0, 1], 1 keeps all.
        repetition_penalty: Divisor of positive and factor of negative logits of every token that occurred, applied
            once per distinct token; from 1e-6 to 1e6, 1 is neutral.
        min_p: Smallest probability kept, relative to that of the most likely token; in [0, 1), 0 keeps all.
        frequency_penalty: Subtracted from a token's logit per occurrence; 0 is neutral.
        presence_penalty: Subtracted once from the logit of every token that occurred; 0 is neutral.
        penalty_scope: Text whose tokens the three penalties count: ``all`` (prompt and output) or ``output``.
        no_repeat_ngram: Length of the sequences of tokens in the window that are not repeated; 0 allows all.
        logit_bias: Tokens, each with a number that is added to its logit. A mapping is accepted too.
        ban: Tokens that are never sampled.
        allow: The only tokens that may be sampled; empty allows all.

    Raises:
        ValueError: A value is out of range, infinite or NaN, or no token is left.
    """

    temperature: float = _field(1.0, _temperature)
    top_k: int = _field(5, _integer(0, "0 keeps every token"))
    top_p: float = _field(0.9, _top_p)
    repetition_penalty: float = _field(1.1, _repetition_penalty)
    min_p: float = _field(0.0, _min_p)
    frequency_penalty: float = _field(0.0, _penalty)
    presence_penalty: float = _field(0.0, _penalty)
    penalty_scope: str = _field("all", _choice(PENALTY_SCOPES))
    no_repeat_ngram: int = _field(0, _integer(0, "0 allows repetition", 2**24))
    logit_bias: tuple[tuple[int | str, float], ...] = _field((), _logit_bias)
    ban: tuple[int | str, ...] = _field((), _tokens)
    allow: tuple[int | str, ...] = _field((), _tokens)

    def __post_init__(self) -> None:
        _validate(self)
        if self.allow and not set(self.allow) - set(self.ban):
            raise ValueError("allow must have a token that ban does not have")

    def with_ids(self, token_id: Callable[[str], int], vocab_size: int) -> "SamplingConfig":
        """Returns the settings with the ids of their tokens, in ascending order.

        Args:
            token_id: Returns the id of a text that is one token, or raises ValueError.
            vocab_size: Size of the vocabulary.

        Raises:
            ValueError: A text is not one token, an id is not in the vocabulary, or no token is left.
        """

        def resolve(name: str, token: int | str) -> int:
            try:
                number = token_id(token) if isinstance(token, str) else token
            except ValueError as error:
                raise ValueError(f"{name} must be a token's id, or a text that is one token: {error}") from error
            if number >= vocab_size:
                raise ValueError(f"{name} must be below the vocabulary's size {vocab_size}: got {number}")
            return number

        if not (self.logit_bias or self.ban or self.allow):
            return self
        allow, ban = (tuple(sorted({resolve(n, one) for one in getattr(self, n)})) for n in ("allow", "ban"))
        bias = [(resolve("logit_bias", token), value) for token, value in self.logit_bias]
        if len(set(ban)) == vocab_size:
            raise ValueError(f"ban must leave a token: it has all {vocab_size} of the vocabulary")
        # Replacing them validates that no token has two values, and that a token is left.
        return dataclasses.replace(self, allow=allow, ban=ban, logit_bias=tuple(sorted(bias)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodingConfig:
    """Window and arithmetic of the decode step. Changing any of these compiles again.

    Attributes:
        window: Maximum number of tokens that the model sees, ``W``; None takes the model's ``max_seq_len``.
        window_stride: Tokens dropped at a time once the window is full, in ``[1, window]``. 1 is the exact sliding
            window; ``N`` recomputes the window only every ``N`` tokens.
        overflow: Rule for a full window: ``roll`` slides it, ``stop`` ends the sample, ``error`` refuses a request that
            would overflow it.
        batch_size: Batch size of the decode step, its number of slots; slots never affect each other.
        dtype: Type of the arithmetic and of the KV cache, one of ``DTYPES``. Softmax, the statistics of LayerNorm, the
            logits and sampling are always float32.
        numerics: ``fast``, or ``invariant``: a sample's tokens and statistics do not depend on ``batch_size``, to the
            bit. Slower, in float32 and on CPUs only.
        mesh: ``model=N``: N devices share the model, their weights and KV cache are sharded. None for one device.

    Raises:
        ValueError: A value is out of range, or invariant numerics are not in float32 or have a mesh.
    """

    window: int | None = _field(None, _optional(_integer(1, "tokens that the model may see")))
    window_stride: int = _field(1, _integer(1, "tokens dropped at a time, 1 is exact"))
    overflow: str = _field("roll", _choice(OVERFLOW_RULES))
    batch_size: int = _field(1, _integer(1, "samples decoded in parallel"))
    dtype: str = _field("float32", _choice(DTYPES))
    numerics: str = _field("fast", _choice(NUMERICS))
    mesh: str | None = _field(None, _mesh)

    def __post_init__(self) -> None:
        _validate(self)
        if self.numerics == "invariant" and self.dtype != "float32":
            raise ValueError(f"numerics invariant needs dtype float32: got {self.dtype}")
        if self.numerics == "invariant" and self.mesh is not None:
            raise ValueError(f"numerics invariant excludes mesh: got {self.mesh}")

    def resolve_window(self, model: ModelConfig) -> int:
        """Returns the window ``W`` for ``model``.

        Raises:
            ValueError: The window exceeds the model's positions, or the stride exceeds the window.
        """
        window = model.max_seq_len if self.window is None else self.window
        if window > model.max_seq_len:
            raise ValueError(
                f"window must be at most the run's own {model.max_seq_len} (its learned positions): got {window}"
            )
        if self.window_stride > window:
            raise ValueError(f"window_stride must be at most the window of {window} tokens: got {self.window_stride}")
        return window

    def resolve_mesh(self, model: ModelConfig) -> int:
        """Returns the number of devices that share ``model``.

        Raises:
            ValueError: They do not divide its heads and the width of its feed-forward layers.
        """
        size = 1 if self.mesh is None else int(self.mesh.partition("=")[2])
        if model.num_heads % size or model.ff_hidden_dim % size:
            common = math.gcd(model.num_heads, model.ff_hidden_dim)
            possible = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
            raise ValueError(
                f"mesh must divide the model (of {model.num_heads} heads and {model.ff_hidden_dim} feed-forward "
                f"features): got {self.mesh}. Choose N from {possible}"
            )
        return size

    def check_fits(self, window: int, prompt_tokens: int, num_tokens: int) -> None:
        """Raises ValueError if ``overflow`` is ``error`` and a sample would overflow ``window``."""
        needed = prompt_tokens + num_tokens - 1
        if self.overflow == "error" and num_tokens and needed > window:
            raise ValueError(
                f"a prompt of {prompt_tokens} tokens and {num_tokens} new ones need a window of {needed}: "
                f"it holds {window}. Ask for fewer tokens, or set overflow to roll"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """Number, length and ends of the samples of a prompt.

    Attributes:
        num_tokens: Maximum number of new tokens per sample; at least 0.
        num_samples: Samples per prompt; from 1 to 2**32.
        first_sample: Index of the first of them. Their indices must be below 2**32.
        seed: Seed in ``[0, 2**32)``. The random numbers depend on it, on the prompt's ids, and on the indices of the
            sample and the token.
        eos_id: Token that ends a sample and is not part of its text; -1 for none.
        stop: Strings that end a sample when its text contains one; the text is cut before it. A single string and a
            list are accepted too.
        min_tokens: Number of tokens before which neither an end token nor a stop string ends a sample.
        top_logprobs: Number of most likely alternatives recorded per token; at most 20.

    Raises:
        ValueError: A value is out of range, ``min_tokens`` is above ``num_tokens``, or an index is too large.
    """

    num_tokens: int = _field(50, _integer(0, "new tokens to generate"))
    num_samples: int = _field(1, _integer(1, "samples per prompt", MAX_SAMPLES))
    first_sample: int = _field(0, _integer(0, "index of the first sample", MAX_SAMPLES - 1))
    seed: int = _field(0, _integer(0, "a 32-bit number", MAX_SEED))
    eos_id: int = _field(-1, _integer(-1, "-1 disables it"))
    stop: tuple[str, ...] = _field((), _texts)
    min_tokens: int = _field(0, _integer(0, "tokens before a sample may end"))
    top_logprobs: int = _field(0, _integer(0, "alternatives recorded per token", MAX_ALTERNATIVES))

    def __post_init__(self) -> None:
        _validate(self)
        if self.min_tokens > self.num_tokens:
            raise ValueError(f"min_tokens must be at most num_tokens: got {self.min_tokens} and {self.num_tokens}")
        if self.first_sample + self.num_samples > MAX_SAMPLES:
            raise ValueError(
                f"first_sample and num_samples must add up to at most {MAX_SAMPLES}: got {self.first_sample} and "
                f"{self.num_samples}"
            )

    @property
    def samples(self) -> range:
        """Indices of the samples of a prompt."""
        return range(self.first_sample, self.first_sample + self.num_samples)

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError if ``eos_id`` is not in a vocabulary of ``vocab_size``."""
        require_token("eos_id", self.eos_id, vocab_size)


# Rules of single settings. A prompts file has few settings per line but may have millions of lines.
SAMPLING_RULES = _rules(SamplingConfig)
GENERATION_RULES = _rules(GenerationConfig)
