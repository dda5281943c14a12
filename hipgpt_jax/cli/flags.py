"""Flags that several programs share, and configs built from flags.

``_FIELDS`` is the only place that relates the fields of configs to flags: it defines the flags, builds the configs from
their values, and translates the names in error messages.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any, TypeVar

import absl.flags

from hipgpt_jax import config, devices, training_config
from hipgpt_jax.text import corpus

# Per config class and field: the flag and its help.
_FIELDS: dict[type, dict[str, tuple[str, str]]] = {
    config.DecodingConfig: {
        "window": ("max_seq_len", "Context window in tokens; the run's own if absent."),
        "window_stride": (
            "window_stride",
            "Tokens dropped at a time once the window is full; 1 is exact, N recomputes the window every N tokens.",
        ),
        "overflow": ("overflow", "When the window is full: slide it, end the sample, or refuse it as an error."),
        "batch_size": ("batch_size", "Samples decoded in parallel; part of the numerics."),
        "dtype": ("dtype", "Compute dtype; part of the numerics."),
        "numerics": (
            "numerics",
            "With invariant, a sample does not depend on --batch_size to the last bit; slower, and on CPUs only.",
        ),
        "mesh": (
            "mesh",
            "Share a model larger than one device between N: model=N; part of the numerics. One device if absent.",
        ),
    },
    config.SamplingConfig: {
        "temperature": ("temp", "Temperature; 0 takes the most likely token."),
        "top_k": ("top_k", "Keep the k most likely tokens; 0 keeps all."),
        "top_p": ("top_p", "Keep the smallest set of tokens whose probability reaches p; 1 keeps all."),
        "repetition_penalty": (
            "rep-penalty",
            "Penalty for tokens already in the text, once per distinct one; 1 is none.",
        ),
        "min_p": ("min_p", "Keep tokens at least this likely, relative to the most likely one; 0 keeps all."),
        "frequency_penalty": ("frequency_penalty", "Subtracted from a token's logit per occurrence; 0 is none."),
        "presence_penalty": (
            "presence_penalty",
            "Subtracted once from the logit of a token already in the text; 0 is none.",
        ),
        "penalty_scope": ("penalty_scope", "Text whose tokens the penalties count: all (prompt and output) or output."),
        "no_repeat_ngram": (
            "no_repeat_ngram",
            "Never repeat a sequence of this many tokens of the window; 0 allows all.",
        ),
        "logit_bias": (
            "logit_bias",
            "ID=VALUE: add a value to the logit of a token, given by its id or a text that is one token; may be "
            "repeated.",
        ),
        "ban": ("ban", "Never sample this token, given by its id or a text that is one token; may be repeated."),
        "allow": ("allow", "Sample only tokens that are given so; may be repeated."),
    },
    config.GenerationConfig: {
        "num_tokens": ("num_tokens", "Tokens to generate after the prompt."),
        "num_samples": ("num_samples", "Samples to generate per prompt."),
        "first_sample": ("first_sample", "Index of the first of them; more samples continue earlier ones."),
        "seed": ("seed", "Random seed; -1 draws one and prints it."),
        "eos_id": (
            "eos_id",
            "Token that ends the text and is not printed; -1 for none. If absent, the run's end token where it was "
            "trained on several documents, else none.",
        ),
        "stop": ("stop", "String that ends a sample and is cut off; may be repeated."),
        "min_tokens": ("min_tokens", "Tokens before which neither the end token nor a stop string ends a sample."),
        "top_logprobs": (
            "top_logprobs",
            f"Most likely alternatives to record per token, at most {config.MAX_ALTERNATIVES}.",
        ),
    },
    config.ModelConfig: {
        "max_seq_len": ("seq", "Context length: tokens per training sequence."),
        "vocab_size": ("vocab-size", "Vocabulary size of the tokenizer, at least 256; 256 is plain bytes."),
        "embed_dim": ("dim", "Width of the model."),
        "num_heads": ("heads", "Attention heads; must divide the width."),
        "ff_hidden_dim": ("ff", "Width of the feed-forward layers."),
        "num_layers": ("layers", "Transformer blocks."),
    },
    training_config.TrainConfig: {
        "batch_size": ("batch", "Sequences per step."),
        "steps": ("steps", "Total optimizer steps; the learning rate schedule ends there."),
        "learning_rate": ("lr", "Peak learning rate."),
        "warmup_steps": ("warmup-steps", "Steps of linear warm-up to the peak."),
        "min_lr": ("min-lr", "Learning rate at the last step; a tenth of --lr if absent."),
        "beta2": ("beta2", "AdamW's decay rate of the second moment."),
        "weight_decay": ("weight-decay", "AdamW's weight decay, of matrices only."),
        "clip": ("clip", "Maximum global norm of the gradient."),
        "dropout": ("dropout", "Dropout rate."),
        "dtype": ("dtype", "Compute dtype."),
        "grad_accum": ("grad-accum", "Micro-batches per step, to save memory."),
        "remat": ("remat", "Recompute activations in the backward pass, to save memory."),
        "seed": ("seed", "Seed of the weights, the data order and dropout."),
        "log_every": ("log-every", "Steps between log lines."),
        "eval_every": ("eval-every", "Steps between evaluations; 0: at each checkpoint."),
        "eval_batches": ("eval-batches", "Batches per evaluation; 0: the whole validation split."),
        "patience": (
            "patience",
            "Stop early after this many evaluations without a lower validation loss; 0: never.",
        ),
        "sample_every": ("sample-every", "Steps between text samples; 0: none."),
        "ckpt_every": ("ckpt-every", "Steps between checkpoints; 0: only the last."),
        "keep_last": ("keep-last", "Number of newest checkpoints to keep, in addition to the best one."),
    },
}

VERBOSE_HELP = "Also report settings of the C library and of JAX that only affect speed."

# Per flag that belongs to no config: its default and its help.
_SHARED: dict[str, tuple[str | None, str]] = {
    "run-name": (None, "Run to load: a name in checkpoints/ or in the package, or the path of its directory."),
    "step": (
        None,
        "Checkpoint step to load, or best for the one with the lowest validation loss; the latest if absent.",
    ),
    "device": ("auto", "Device of the computation; auto takes a GPU if JAX finds one."),
    "devices": (
        None,
        "Number of devices, or all: each has --batch_size samples of its own, and the same tokens. As many as a model "
        "needs if absent.",
    ),
    "text-field": (corpus.DEFAULT_TEXT_FIELD, "Field or column of the text in .jsonl, .csv and .parquet files."),
    "records": (None, "The record file; the flag's name may be omitted."),
}

_DEFINE: dict[Any, Any] = {
    bool: absl.flags.DEFINE_boolean,
    int: absl.flags.DEFINE_integer,
    int | None: absl.flags.DEFINE_integer,
    float: absl.flags.DEFINE_float,
    float | None: absl.flags.DEFINE_float,
    str: absl.flags.DEFINE_string,
    str | None: absl.flags.DEFINE_string,
    tuple[str, ...]: absl.flags.DEFINE_multi_string,
    tuple[int | str, ...]: absl.flags.DEFINE_multi_string,
    tuple[tuple[int | str, float], ...]: absl.flags.DEFINE_multi_string,
}

_CHOICES: dict[str, Sequence[str]] = {
    "device": devices.DEVICES,
    "dtype": config.DTYPES,
    "numerics": config.NUMERICS,
    "overflow": config.OVERFLOW_RULES,
    "penalty_scope": config.PENALTY_SCOPES,
}

# Groups of --help: of the configs, and of the flags that belong to none.
_TITLES: dict[type, str] = {
    config.GenerationConfig: "Samples",
    config.SamplingConfig: "Sampling",
    config.DecodingConfig: "Window and numerics",
    config.ModelConfig: "Model",
    training_config.TrainConfig: "Optimization and checkpoints",
}
_GROUPS: dict[str, tuple[str, ...]] = {
    "Input": (
        *("run-name", "run-dir", "step", "records", "folder", "ids", "prompt", "prompt_ids", "parse_special"),
        *("command", "prompts_file", "choices", "data-path", "split", "text-field", "tokenizer-path", "init-from"),
    ),
    "Evaluation": ("as-sampled", "stride"),
    "Replay": ("batch_size", "forced"),
    "Checks": ("verify", "deep"),
    "Output": (
        *("stream", "echo", "separator", "output", "overwrite", "missing"),
        *("html", "title", "metrics", "unit", "smooth", "mean"),
        *("sample-prompt", "weights-dtype", "tensorboard", "verbose"),
    ),
    "Several and existing runs": ("seeds", "reset", "resume", "extend"),
    "Parts of the samples": ("shard", "only", "num_samples", "first_sample"),
    "Devices": ("device", "devices", "mesh", "distributed", "coordinator", "num_processes", "process_id"),
}

# Names that other programs have for a flag.
_SYNONYMS = {
    "max_new_tokens": "num_tokens",
    "max_tokens": "num_tokens",
    "max_length": "num_tokens",
    "n": "num_samples",
    "num_return_sequences": "num_samples",
    "t": "temp",
    "stop_sequence": "stop",
    "random_seed": "seed",
    "model": "run-name",
    "run_name": "run-dir",
    "epochs": "steps",
    "max_steps": "steps",
    "block_size": "seq",
}

# Arguments of the package's functions whose flags have the same name.
_ARGUMENTS = ("device", "devices", "mesh", "shard", "step")

# A name in an error message is translated, but not in explanations in parentheses, in quoted values or in choices.
_NAME = re.compile(r"\([^)]*\)|'[^']*'|one of [^:]*|(?P<name>\b[a-z_0-9]+\b)")

_Config = TypeVar("_Config")


def define_config(values: absl.flags.FlagValues, config_class: type, **defaults: Any) -> None:
    """Defines the flag of each field of a config.

    Args:
        values: The program's flags.
        config_class: The config, one of ``_FIELDS``.
        defaults: Defaults that differ from the config's.
    """
    for field in dataclasses.fields(config_class):
        define_field(values, config_class, field.name, **defaults)


def define_field(values: absl.flags.FlagValues, config_class: type, name: str, **defaults: Any) -> None:
    """Defines the flag of one field of a config; see ``define_config``."""
    (field,) = (field for field in dataclasses.fields(config_class) if field.name == name)
    flag, text = _FIELDS[config_class][name]
    default: Any = defaults.get(name, field.default)
    default = list(default) if isinstance(default, tuple) else default
    if name in _CHOICES:
        absl.flags.DEFINE_enum(flag, default, _CHOICES[name], text, flag_values=values)
    else:
        _DEFINE[field.type](flag, default, text, flag_values=values)


def build(config_class: type[_Config], values: absl.flags.FlagValues, **given: Any) -> _Config:
    """Returns a config with the values of its flags.

    Args:
        config_class: The config, one of ``_FIELDS``.
        values: The program's flags; a field without a flag there gets its default.
        given: Values that replace those of flags, by field.

    Raises:
        ValueError: A value is out of range.
    """
    fields = {field: values[flag].value for field, (flag, _) in _FIELDS[config_class].items() if flag in values}
    return config_class(**fields | given)


def given(config_class: type, values: absl.flags.FlagValues) -> dict[str, Any]:
    """Returns the fields of a config whose flags were given on the command line, with their values."""
    fields = _FIELDS[config_class].items()
    return {field: values[flag].value for field, (flag, _) in fields if flag in values and values[flag].present}


def aliases(values: absl.flags.FlagValues) -> dict[str, str]:
    """Returns other names of flags: those of the configs' fields, as in Python, records and settings files."""
    fields = [(field, flag) for each in _configs(values) for field, (flag, _) in _FIELDS[each].items()]
    return {field: flag for field, flag in fields if flag in values and flag.replace("-", "_") != field}


def synonyms(values: absl.flags.FlagValues) -> dict[str, str]:
    """Returns names that other programs have for flags."""
    return {name: flag for name, flag in _SYNONYMS.items() if flag in values}


def groups(values: absl.flags.FlagValues) -> dict[str, list[str]]:
    """Returns the flags of a program in groups with titles, in the order of their definition."""
    own = {flag: title for title, names in _GROUPS.items() for flag in names}
    of_configs = {flag: _TITLES[each] for each in _configs(values) for flag, _ in _FIELDS[each].values()}
    found: dict[str, list[str]] = {}
    for flag in values:
        if values[flag].name == flag:
            found.setdefault({**own, **of_configs}.get(flag, "Other"), []).append(flag)
    return found


def _configs(values: absl.flags.FlagValues) -> list[type]:
    """Returns the configs that a program has: those of whose first field the flag is defined."""
    return [each for each, fields in _FIELDS.items() if next(iter(fields.values()))[0] in values]


def translate(message: str, values: absl.flags.FlagValues) -> str:
    """Returns an error message about fields of a config with the names of their flags.

    Only a message that begins with a field's name is about fields: ``temperature must be at least 0: got -1.0`` becomes
    ``--temp must be at least 0: got -1.0``.
    """
    names = {field: flag for fields in _FIELDS.values() for field, (flag, _) in fields.items() if flag in values}
    names |= {name: name for name in _ARGUMENTS if name in values}
    if message.partition(" ")[0] not in names:
        return message

    subject = message.partition(":")[0]

    def replace(match: re.Match[str]) -> str:
        # After the colon, a name without an underscore is probably just a word.
        is_name = match["name"] in names and ("_" in match["name"] or match.start() < len(subject))
        return f"--{names[match['name']]}" if is_name else match[0]

    return _NAME.sub(replace, message)


def define_shared(values: absl.flags.FlagValues, name: str) -> absl.flags.FlagHolder[Any]:
    """Defines a flag that several programs have, one of ``_SHARED``."""
    default, text = _SHARED[name]
    if name in _CHOICES:
        return absl.flags.DEFINE_enum(name, default, _CHOICES[name], text, flag_values=values)
    return absl.flags.DEFINE_string(name, default, text, flag_values=values)
