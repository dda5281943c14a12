"""What a model and a generation are made of: frozen, validated values. ``training_config`` has those of training.

Every default in the package stands here, once. Nothing here imports JAX, so the command line can
refuse a bad flag before the slow imports begin.
"""

import dataclasses
import math
import re

DTYPES = ("float32", "bfloat16")
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


def require_int(name: str, value: object, low: int, meaning: str) -> None:
    """Raises ValueError where a value is no integer of at least ``low``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be an integer of at least {low} ({meaning}): got {value!r}")


def require_text(name: str, value: object) -> None:
    """Raises ValueError where a value is no text of at least one character that UTF-8 can hold."""
    if not isinstance(value, str) or not value or any("\ud800" <= char <= "\udfff" for char in value):
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
                f"embed_dim (--dim) must be a multiple of num_heads (--heads): got {self.embed_dim} "
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
        require_finite("temp", self.temperature, "0 takes the most likely token, 1 is neutral")
        require_finite("rep_penalty", self.repetition_penalty, "1 is neutral")
        require_int("top_k", self.top_k, 0, "0 keeps every token")
        if self.temperature < 0:
            raise ValueError(f"temp must be at least 0 (0 takes the most likely token): got {self.temperature}")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1 (1 keeps every token): got {self.top_p}")
        if not 1e-6 <= self.repetition_penalty <= 1e6:  # beyond that, float32 logits overflow
            raise ValueError(
                f"rep_penalty must be above 0, from 1e-6 to 1e6 (1 is neutral): got {self.repetition_penalty}"
            )


OVERFLOW_RULES = ("roll", "stop", "error")
MAX_SEED = 2**32 - 1
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
        if self.window is not None:
            require_int("max_seq_len", self.window, 1, "tokens the model may see")
        require_int("window_stride", self.window_stride, 1, "tokens dropped at a time, 1 is exact")
        require_int("batch_size", self.width, 1, "rows decoded side by side")
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
    """What one request asks for, beside the prompt and the way a token is chosen.

    Attributes:
        num_tokens: New tokens for each sample; at least 0.
        num_samples: Samples for each prompt; at least 1.
        seed: In ``[0, 2**32)``; with the prompt's ids, the sample's index and the token's index it is
            all that the random numbers depend on.
        eos_id: Token that ends a sample and is not part of its text; -1 for none.
        stop: Strings that end a sample where its text comes to hold one; the text is cut before it.
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
        require_int("num_tokens", self.num_tokens, 0, "new tokens to generate")
        require_int("num_samples", self.num_samples, 1, "samples for each prompt")
        require_int("eos_id", self.eos_id, -1, "-1 disables it")
        require_int("seed", self.seed, 0, "the same seed gives the same tokens")
        if self.seed > MAX_SEED:
            raise ValueError(f"seed must be at most {MAX_SEED} (32 bits): got {self.seed}")
        if not isinstance(self.stop, tuple):
            raise ValueError(f"stop must be a tuple of texts: got {self.stop!r}")
        for text in self.stop:
            require_text("stop", text)
        require_int("top_logprobs", self.top_logprobs, 0, "alternatives recorded with each token")
        if self.top_logprobs > MAX_ALTERNATIVES:
            raise ValueError(f"top_logprobs must be at most {MAX_ALTERNATIVES}: got {self.top_logprobs}")

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raises ValueError where ``eos_id`` is no token of a vocabulary of ``vocab_size``."""
        if self.eos_id >= vocab_size:
            raise ValueError(f"eos_id must be -1 or below the vocabulary's size {vocab_size}: got {self.eos_id}")
