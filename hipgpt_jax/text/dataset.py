"""Token ids of a run, memory-mapped, and the batch of each training step."""

import hashlib
from pathlib import Path

import numpy as np

from hipgpt_jax.text import manifest

_BLOCK_BYTES = 1 << 22


class Dataset:
    """Memory-mapped token ids of a run.

    Attributes:
        manifest: Contents and origin of the ids.
        train: Ids of the training split.
        validation: Ids of the validation split.
    """

    def __init__(self, directory: Path, *, verify: bool = True) -> None:
        """Opens the ids of a run.

        Args:
            directory: Directory of the run.
            verify: Whether to check the digest of ``tokens.bin`` and the range of its ids.

        Raises:
            FileNotFoundError: A file does not exist.
            ValueError: ``data.json`` is not a manifest, or does not describe ``tokens.bin``.
        """
        self.manifest = data = manifest.Manifest.read(directory / manifest.MANIFEST_NAME)
        path = directory / manifest.TOKENS_NAME
        size, tokens = path.stat().st_size, data.train_tokens + data.validation_tokens
        if size != tokens * data.token_bytes:
            raise ValueError(
                f"{path} must hold {tokens} ids of {data.token_bytes} bytes according to {manifest.MANIFEST_NAME}: got "
                f"{size} bytes. Prepare the data again with --reset"
            )
        if verify:
            _verify(path, data)
        # An empty file cannot be mapped.
        ids = np.memmap(path, dtype=f"<u{data.token_bytes}", mode="r") if tokens else np.zeros(0, "<u2")
        self.train = ids[: data.train_tokens]
        self.validation = ids[data.train_tokens :]

    def check_length(self, length: int) -> None:
        """Raises ValueError if a split is too short for windows of ``length`` tokens."""
        for name, ids, needed in (("training", self.train, length + 1), ("validation", self.validation, 2)):
            if len(ids) < needed:
                raise ValueError(
                    f"{self.manifest.name} is too short: its {name} split has {len(ids)} tokens and needs "
                    f"{needed}. Use more text, or a shorter --seq"
                )

    def batch_at(self, step: int, *, seed: int, batch_size: int, length: int, rows: slice = slice(None)) -> np.ndarray:
        """Returns the training batch of a step, a pure function of the arguments.

        Windows start at uniformly drawn positions, with replacement.

        Args:
            step: Training step, from 0.
            seed: Seed of the data order.
            batch_size: Number of rows, ``B``.
            length: Predicted tokens per row, ``T``.
            rows: Rows to return, all by default; the ids of no others are read.

        Returns:
            int32 ids ``[B, T + 1]``: inputs are ``[:, :-1]``, targets ``[:, 1:]``.
        """
        starts = len(self.train) - length
        # NumPy guarantees the raw stream of Philox across versions, unlike that of its distributions.
        words = np.random.Philox(key=[seed, step]).random_raw(batch_size)
        return np.stack([self.train[start : start + length + 1] for start in words[rows] % starts]).astype(np.int32)


def _verify(path: Path, data: manifest.Manifest) -> None:
    """Raises ValueError if ``tokens.bin`` was changed or holds an id that is not in the vocabulary."""
    digest, highest = hashlib.sha256(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK_BYTES):
            digest.update(block)
            highest = max(highest, int(np.frombuffer(block, f"<u{data.token_bytes}").max()))
    if digest.hexdigest() != data.tokens_sha256:
        raise ValueError(
            f"{path} is not the file that {manifest.MANIFEST_NAME} describes: it was changed (sha256 "
            f"{digest.hexdigest()[:12]}…, expected {data.tokens_sha256[:12]}…). Restore it, or prepare the data "
            f"again with --reset"
        )
    # JAX does not raise for an index beyond the embedding table: training would silently go wrong.
    if highest >= data.vocab_size:
        raise ValueError(
            f"{path} has the id {highest}, beyond the vocabulary of {data.vocab_size} in {manifest.MANIFEST_NAME}"
        )
