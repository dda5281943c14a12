"""Conversion of runs to Hugging Face GPT-2 folders."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hipgpt_jax import files, json_files
from hipgpt_jax.runs import huggingface, loading, weights

CARD = "README.md"
NAMES = frozenset(
    {
        CARD,
        huggingface.CONFIG,
        huggingface.GENERATION,
        huggingface.WEIGHTS,
        huggingface.TOKENIZER,
        huggingface.TOKENIZER_CONFIG,
    }
)


def write(source: loading.RunFiles, folder: Path, card: Callable[[str], str]) -> None:
    """Writes a run as a Hugging Face folder, which replaces an earlier one.

    Args:
        source: The run.
        folder: The folder; if it exists, it is replaced, with all that is in it.
        card: Returns the model card for the SHA-256 digest of the folder's weights.
    """
    target = Path(os.path.realpath(folder))
    new, old = (target.with_name(f".{target.name}.{os.getpid()}.{suffix}") for suffix in ("tmp", "old"))
    checkpoint, vocabulary = source.checkpoint, source.vocabulary
    end_id = None if checkpoint.eos_id < 0 else checkpoint.eos_id
    ends = {"bos_token_id": end_id, "eos_token_id": end_id}
    settings = {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        **{theirs: getattr(checkpoint.model, ours) for ours, theirs in huggingface.SIZES.items()},
        **huggingface.ARITHMETIC,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0),
        **ends,
        "dtype": "float32",
    }
    # A class of tokenizers that reads the file as it is: GPT2TokenizerFast would add an end token where there is none.
    spelling: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": checkpoint.model.max_seq_len,
        "clean_up_tokenization_spaces": False,
    }
    for text, token_id in vocabulary.special_tokens.items():
        if token_id == end_id:
            # GPT-2's own has the same three; CTranslate2 needs them.
            spelling |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), text)
    new.mkdir()
    try:
        weights.write(new / huggingface.WEIGHTS, weights.read(checkpoint.weights, checkpoint.model), checkpoint.model)
        files.write_text(new / huggingface.TOKENIZER, vocabulary.to_json())
        for name, value in (
            (huggingface.CONFIG, settings),
            (huggingface.GENERATION, ends),
            (huggingface.TOKENIZER_CONFIG, spelling),
        ):
            json_files.write(new / name, value)
        files.write_text(new / CARD, card(files.sha256(new / huggingface.WEIGHTS)))
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    shutil.rmtree(old, ignore_errors=True)
