"""Plan of training GPT-2 XL on 8 and 64 GPUs, as the tables of ``docs/scale.md``; nothing is allocated or run.

``python scripts/plan.py`` counts memory with ``jax.eval_shape`` and the shardings of ``model/mesh.py`` on abstract
meshes, and derives traffic and utilisation from the assumptions below.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh

from hipgpt_jax import config
from hipgpt_jax.evaluation import loss
from hipgpt_jax.model import mesh, transformer
from hipgpt_jax.training import flops, train_step

XL = config.ModelConfig(
    vocab_size=50257, max_seq_len=1024, embed_dim=1600, num_heads=25, ff_hidden_dim=6400, num_layers=48
)
STEP_ROWS, PART_ROWS = 512, 8  # rows per step, and rows that a device computes at once
GPUS_PER_NODE = 8
PEAK = 989.4e12  # H100 SXM, bfloat16, FLOP/s
UTILISATION = 0.365  # of one H200 that trains GPT-2 124M, see docs/speed.md; without --remat
NVLINK, NETWORK = 0.8 * 450e9, 0.8 * 50e9  # bytes/s per GPU and direction: 80 % of NVLink 4, and of 400 Gbit/s
MESHES = ({"data": 8}, {"fsdp": 8}, {"data": 64}, {"data": 8, "fsdp": 8}, {"fsdp": 64})


def main() -> None:
    """Prints the tables."""
    print("\n".join([*memory(), "", *traffic()]))


def memory() -> Iterator[str]:
    """Yields a table of GB per device."""
    plain, rematerialised = _row_bytes(remat=False), _row_bytes(remat=True)
    yield "| mesh | parameters and AdamW | gradients | 8 rows | + scores | 8 rows, `--remat` | sum, `--remat` |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    for sizes in MESHES:
        held, parts = _held_bytes(sizes), _parts(sizes)
        gradients = held * (1 if parts == 1 else 2)  # of a part, and their sum over the parts
        # The backward pass recomputes one block at a time.
        remat = PART_ROWS * (rematerialised.total + plain.total / XL.num_layers)
        cells = (3 * held, gradients, PART_ROWS * (plain.total - plain.scores), PART_ROWS * plain.scores, remat)
        yield _table_row(_name(sizes), *cells, 3 * held + gradients + remat)


def traffic() -> Iterator[str]:
    """Yields a table of GB per device and step over the links, seconds per step, and utilisation."""
    yield "| mesh | parts | NVLink | network | computing | communicating | MFU |"
    yield "|---|--:|--:|--:|--:|--:|--:|"
    size = flops.size(train_step.param_shapes(XL))
    step_flops = flops.per_token(XL, size) * STEP_ROWS * XL.max_seq_len
    for sizes in MESHES:
        devices, parts, data, fsdp = (
            math.prod(sizes.values()),
            _parts(sizes),
            sizes.get("data", 1),
            sizes.get("fsdp", 1),
        )
        # Gathers of parameters before the forward and the backward pass, and a reduce-scatter of gradients.
        sharded = parts * 3 * (fsdp - 1) / fsdp * 4 * size.total
        # A ring all-reduce of the shards of gradients.
        reduced = parts * 2 * (data - 1) / data * _held_bytes(sizes)
        inside = (sharded if fsdp <= GPUS_PER_NODE else 0) + (reduced if devices <= GPUS_PER_NODE else 0)
        network = sharded + reduced - inside
        # --remat computes the forward pass twice: 4 instead of 3 times its operations.
        computing = step_flops * 4 / 3 / (devices * PEAK * UTILISATION)
        communicating = inside / NVLINK + network / NETWORK
        worst, best = (
            step_flops / (devices * PEAK * seconds)
            for seconds in (computing + communicating, max(computing, communicating))
        )
        yield (
            f"| {_name(sizes)} | {parts} | {inside / 1e9:.1f} | {network / 1e9:.1f} | {computing:.2f} s | "
            f"{communicating:.2f} s | {worst:.2f} to {best:.2f} |"
        )


def _held_bytes(sizes: dict[str, int]) -> int:
    """Returns the bytes of the shards of float32 parameters on one device."""
    shape = tuple(sizes.get(axis, 1) for axis in mesh.AXES)
    abstract = AbstractMesh(shape, mesh.AXES, axis_types=(AxisType.Auto,) * len(mesh.AXES))
    layout = mesh.Layout(cast(Mesh, abstract))  # without devices, for shapes alone
    params = train_step.param_shapes(XL)
    pairs = zip(jax.tree.leaves(params), jax.tree.leaves(layout.shardings_for(params)), strict=True)
    return sum(4 * math.prod(sharding.shard_shape(leaf.shape)) for leaf, sharding in pairs)


class _Kept(NamedTuple):
    """Bytes that the backward pass keeps: all, and of the scores of ``xla`` attention, which cuDNN does not keep."""

    total: int
    scores: int


def _row_bytes(*, remat: bool) -> _Kept:
    """Returns the bytes per row in bfloat16, without the parameters, which are among the residuals of both."""
    one, two = (_residuals(rows, remat) for rows in (1, 2))
    return _Kept(two.total - one.total, two.scores - one.scores)


def _residuals(rows: int, remat: bool) -> _Kept:
    model = transformer.Transformer(XL, "bfloat16", remat)

    def loss_fn(params: Any, tokens: jax.Array) -> jax.Array:
        logits = model.bind({"params": params})(tokens[:, :-1], dropout=0.0)
        return jnp.mean(loss.score_tokens(logits, tokens[:, 1:]).nll_BT)

    tokens = jax.ShapeDtypeStruct((rows, XL.max_seq_len + 1), jnp.int32)
    vjp = jax.eval_shape(lambda *given: jax.vjp(loss_fn, *given)[1], train_step.param_shapes(XL), tokens)
    sizes = [(leaf.size * leaf.dtype.itemsize, leaf.shape) for leaf in jax.tree.leaves(vjp)]
    # Heads, queries and keys; queries, keys and values themselves end in the width of a head.
    scores = sum(size for size, shape in sizes if len(shape) == 4 and shape[-1] > XL.head_dim)
    return _Kept(sum(size for size, _ in sizes), scores)


def _parts(sizes: dict[str, int]) -> int:
    return max(1, STEP_ROWS // math.prod(sizes.values()) // PART_ROWS)


def _name(sizes: dict[str, int]) -> str:
    return f"`{','.join(f'{axis}={size}' for axis, size in sizes.items())}`"


def _table_row(name: str, *numbers: float) -> str:
    return f"| {name} | {' | '.join(f'{number / 1e9:.1f}' for number in numbers)} |"


if __name__ == "__main__":
    main()
