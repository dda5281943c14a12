"""Settings of training. Importing this module does not import JAX."""

import dataclasses

from hipgpt_jax import config

WEIGHTS_DTYPES = ("float32", "float16", "bfloat16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of training.

    Attributes:
        batch_size: Sequences per step, ``B``.
        steps: Number of optimizer steps; the cosine schedule ends there.
        learning_rate: Peak of the schedule, above 0.
        warmup_steps: Steps of linear warm-up from 0; at least 0.
        min_lr: Learning rate at the last step, in [0, learning_rate]; None takes a tenth of the peak.
        beta2: AdamW's decay of the second moment, in [0, 1).
        weight_decay: AdamW's decoupled decay of weight matrices; at least 0.
        clip: Largest global norm of the gradient, above 0.
        dropout: Probability of dropping an activation while training, in [0, 1).
        dtype: Type of the arithmetic, one of ``config.DTYPES``; parameters, optimizer, softmax, LayerNorm statistics
            and the loss are float32 in any case.
        grad_accum: Parts of a batch that are computed one after the other; a divisor of ``batch_size``.
        remat: Whether the backward pass recomputes activations instead of keeping them.
        seed: Seed of the initial weights, the data order and dropout, in ``[0, 2**32)``.
        log_every: Steps between log lines.
        eval_every: Steps between evaluations; 0 evaluates with each checkpoint.
        eval_batches: Batches per evaluation; 0 takes the whole validation split.
        patience: Evaluations without a lower validation loss after which training stops early; 0 never does.
        sample_every: Steps between samples of text; 0 writes none.
        ckpt_every: Steps between checkpoints; 0 writes only the last.
        keep_last: Number of checkpoints kept, the newest by step.

    Raises:
        ValueError: A value is out of range, infinite or NaN.
    """

    batch_size: int = 4
    steps: int = 2000
    learning_rate: float = 1e-3
    warmup_steps: int = 100
    min_lr: float | None = None
    beta2: float = 0.99
    weight_decay: float = 0.1
    clip: float = 1.0
    dropout: float = 0.0
    dtype: str = "float32"
    grad_accum: int = 1
    remat: bool = False
    seed: int = 0
    log_every: int = 50
    eval_every: int = 0
    eval_batches: int = 0
    patience: int = 0
    sample_every: int = 0
    ckpt_every: int = 500
    keep_last: int = 5

    def __post_init__(self) -> None:
        for name, low, meaning in (
            ("batch_size", 1, "sequences in a step"),
            ("steps", 1, "optimizer steps"),
            ("warmup_steps", 0, "0 is no warm-up"),
            ("seed", 0, "the same seed gives the same weights"),
            ("log_every", 1, "steps between log lines"),
            ("eval_every", 0, "0 evaluates with each checkpoint"),
            ("eval_batches", 0, "0 takes the whole split"),
            ("patience", 0, "0 never stops early"),
            ("grad_accum", 1, "parts of a step's batch"),
            ("sample_every", 0, "0 writes no samples"),
            ("ckpt_every", 0, "0 writes only the last"),
            ("keep_last", 1, "checkpoints kept"),
        ):
            config.require_int(name, getattr(self, name), low, meaning)
        if self.seed > config.MAX_SEED:
            raise ValueError(f"seed must be at most {config.MAX_SEED} (32 bits): got {self.seed}")
        config.require_finite("learning_rate", self.learning_rate, "the peak learning rate")
        config.require_finite("weight_decay", self.weight_decay, "0 is none")
        config.require_finite("clip", self.clip, "the gradient's largest norm")
        for name in ("learning_rate", "clip"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} must be above 0: got {getattr(self, name)}")
        config.require_dtype(self.dtype)
        if self.batch_size % self.grad_accum:
            raise ValueError(f"grad_accum must divide the batch of {self.batch_size}: got {self.grad_accum}")
        if self.weight_decay < 0:
            raise ValueError(f"weight_decay must be at least 0: got {self.weight_decay}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be at least 0 and below 1: got {self.dropout}")
        if not 0 <= self.beta2 < 1:
            raise ValueError(f"beta2 must be at least 0 and below 1: got {self.beta2}")
        if self.min_lr is not None and not 0 <= self.min_lr <= self.learning_rate:
            raise ValueError(f"min_lr must be between 0 and learning_rate {self.learning_rate}: got {self.min_lr}")

    @property
    def final_learning_rate(self) -> float:
        """Learning rate at the last step."""
        return self.learning_rate / 10 if self.min_lr is None else self.min_lr
