"""Parameter count, floating-point operations per token, and model FLOPs utilisation."""

from typing import Any, NamedTuple

import jax

from hipgpt_jax import config

PRECISIONS = ("bfloat16", "tensorfloat32", "float32")


class Size(NamedTuple):
    """Parameter counts of a model: all, and without the position embeddings, which no matrix product uses.

    The head shares its weights with the token embedding, so the two count once.
    """

    total: int
    without_positions: int


class _Peak(NamedTuple):
    """Dense peaks of one device in TFLOP/s, accumulating in float32; None if the device lacks the mode."""

    bfloat16: float
    tensorfloat32: float | None
    float32: float


# The first key contained in the device kind counts, so narrower names come before wider ones. No figure includes
# structured sparsity. float32 is that of the vector units for NVIDIA and of the faster matrix cores for AMD.
_PEAKS: dict[str, _Peak | None] = {
    "A100": _Peak(312, 156, 19.5),  # NVIDIA A100 Tensor Core GPU data sheet, 2022
    "H100 PCIe": _Peak(756, 378, 51),  # NVIDIA H100 Tensor Core GPU data sheet, 2023
    "H100 NVL": _Peak(835.5, 417.5, 60),  # NVIDIA H100 NVL data sheet, 2024; half of its figures with sparsity
    "H100": _Peak(989.4, 494.7, 66.9),  # SXM5: NVIDIA H100 Tensor Core GPU Architecture, 2022, table 2
    "H200 NVL": _Peak(835.5, 417.5, 60),  # NVIDIA H200 Tensor Core GPU data sheet, 2024; half of those with sparsity
    "H200": _Peak(989.4, 494.7, 66.9),  # SXM5, also in GH200: the same data sheet; the chip is H100's
    "L40S": _Peak(362.05, 183, 91.6),  # NVIDIA L40S data sheet, 2023
    "RTX 4090 D": None,  # slower devices of the same name
    "RTX 4090 Laptop": None,
    "RTX 4090": _Peak(165.2, 82.6, 82.6),  # NVIDIA Ada GPU Architecture, 2022, appendix A; sums in float32
    "MI210": _Peak(181.0, None, 45.3),  # AMD Instinct MI210 data sheet, 2022
    "MI250X": _Peak(191.5, None, 47.85),  # AMD Instinct MI250X data sheet, 2021, halved: a device is one of two dies
    "MI300X": _Peak(1307.4, 653.7, 163.4),  # AMD Instinct MI300X data sheet, 2023
    "MI325X": _Peak(1307.4, 653.7, 163.4),  # AMD Instinct MI325X data sheet, 2024
    "MI355X": _Peak(2516.6, None, 157.3),  # AMD Instinct MI355X data sheet, 2025
    "RX 7900 XTX": _Peak(122.8, None, 61.4),  # AMD Radeon RX 7900 XTX product page, 2022
}


def size(params: Any) -> Size:
    """Counts the parameters of a model, given as arrays or as shapes from ``jax.eval_shape``."""
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    return Size(total, total - sum(leaf.size for leaf in jax.tree.leaves(params["wpe"])))


def per_token(model: config.ModelConfig, parameters: Size) -> int:
    """Returns the floating-point operations per token of training, forward and backward: ``6 P + 12 L N H T``.

    ``P`` is the parameters without positions: each multiplies and adds once forward and twice backward. The second term
    is attention over the whole window of ``T = max_seq_len`` tokens, as if it were not causal. Recomputation by
    ``--remat`` does not count.

    References:
        Chowdhery et al., PaLM: Scaling Language Modeling with Pathways, 2022, appendix B,
        https://arxiv.org/abs/2204.02311.
    """
    attention = 12 * model.num_layers * model.num_heads * model.head_dim * model.max_seq_len
    return 6 * parameters.without_positions + attention


def mfu(
    flops_per_token: float, tokens_per_second: float, device_kind: str, devices: int, precision: str
) -> float | None:
    """Returns the model FLOPs utilisation: ``flops_per_token * tokens_per_second / (devices * peak)``.

    Args:
        flops_per_token: From ``per_token``.
        tokens_per_second: Rate of all devices together.
        device_kind: ``jax.Device.device_kind``.
        devices: Number of devices, at least 1.
        precision: Precision of the matrix products, one of ``PRECISIONS``. JAX's default for float32 arrays is
            ``tensorfloat32`` on NVIDIA GPUs since A100.

    Returns:
        A share in [0, 1]; None if the peak is unknown: a CPU, another GPU, or a precision that the device lacks.
    """
    assert precision in PRECISIONS, precision
    known = next((peak for name, peak in _PEAKS.items() if name.lower() in device_kind.lower()), None)
    peak = None if known is None else getattr(known, precision)
    return None if peak is None else flops_per_token * tokens_per_second / (devices * peak * 1e12)


def describe(parameters: Size, flops_per_token: float) -> str:
    """Returns the size and the cost as text, ``2.4 M parameters, 16 MFLOP per token``."""
    return f"{_short(parameters.total, ' kMB').rstrip()} parameters, {_short(flops_per_token, ' kMGT')}FLOP per token"


def _short(number: float, prefixes: str) -> str:
    """Returns two or three digits with an SI prefix: 950, 2.4 M, 17 M."""
    power = 0
    while number >= 999.5 and power < len(prefixes) - 1:
        number, power = number / 1000, power + 1
    digits = f"{number:.{1 if number < 9.95 else 0}f}".removesuffix(".0")
    return f"{digits} {prefixes[power].strip()}"
