"""Everything that differs between decoding on a CPU and on a GPU."""

import dataclasses
import os
from collections.abc import Mapping

from hipgpt_jax import config
from hipgpt_jax.generation import topk
from hipgpt_jax.model import cache as kv

_REGION_ANALYSIS = "xla_cpu_copy_insertion_use_region_analysis"

# XLA compiles a sum, and what is fused with it, for YNNPACK or by itself, whichever it estimates to be faster for the
# number of rows. The two sum in different orders, and their exponentials differ in the last bit. Single products remain
# YNNPACK's: with transposed kernels, and from two rows on, a row's bits do not depend on their number. XLA's own
# products are 2 to 15 times slower, and those of 768 inputs depend on it.
_FUSION_TYPE = "xla_cpu_experimental_ynn_fusion_type"
_INVARIANT_OPTIONS = {_FUSION_TYPE: "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}
_FEWEST_INVARIANT_ROWS = 2

_SMALLEST_BUCKET = 8

# Steps per program. One token of GPT-2 keeps an H200 busy for 0.45 ms and its host, which passes 160 arrays, updates
# 216 captured kernels and fetches, for 1.4 ms. On a CPU, eight steps make a single slot of the documented default 2.5
# times as fast as one, of D256 L8 1.17 times. Several slots on a CPU gain nearly as much from four steps, and a slot
# that ends idles half as long: 64 slots of D256 L8 that stop at different tokens make 3382 tokens/s with four steps,
# 2907 with eight and 3306 with one; slots that end together 4189, 4420 and 4016.
_MAX_STEPS = 8
_MAX_STEPS_OF_SEVERAL_ON_CPU = 4
# On a CPU, a model with more weights gains nothing from several steps, and its text would arrive in bursts.
_MOST_WEIGHTS_FOR_SEVERAL_STEPS = 2**24

_SMALLEST_DIVIDED = 16
_PRODUCT_ON_ALL_CORES = 4 * 2**20  # bytes of float32


@dataclasses.dataclass(frozen=True, kw_only=True)
class Backend:
    """Everything that differs between a CPU and a GPU; see ``backend_for``.

    Attributes:
        layout: Blocks of the KV cache.
        plan: Candidates of a slide step, which serves all slots.
        decode_plans: Candidates of each decode program. Slots that need the full vocabulary use the last program, all
            others the first.
        max_steps: Most steps of a decode program.
        waits_for_ends: Whether a decode program ends when no slot is active, and a program that may be the last of a
            slot is awaited before the next is dispatched. On a GPU, wasted steps cost less than waiting.
        crosses_blocks: Whether a program may take steps beyond the last block that it needs at first.
        freezes_blocks: Whether all blocks but the last are only read. Possible with one slot that crosses no blocks.
        transposes_kernels: Whether kernels are stored transposed; see ``parameters.transpose_kernels``.
        exports_programs: Whether traced programs are cached on disk. Neither cuDNN's attention nor shardings can be
            exported.
        fewest_rows: Least number of rows of a program: 2 if a row's bits must not depend on the number of rows.
        compiler_options: XLA options of all programs.
        decode_options: Further XLA options of the decode programs.
        num_replicas: Number of engines that the slots are divided among.
        num_slots: Slots of each.
    """

    layout: kv.Layout
    plan: topk.Plan
    decode_plans: tuple[topk.Plan, ...]
    max_steps: int
    waits_for_ends: bool
    crosses_blocks: bool
    freezes_blocks: bool
    transposes_kernels: bool
    exports_programs: bool
    fewest_rows: int
    compiler_options: Mapping[str, str]
    decode_options: Mapping[str, bool]
    num_replicas: int
    num_slots: int

    def with_rule(self, rule: topk.Rule) -> "Backend":
        """Returns the backend whose programs apply a rule; a rule may not be exported."""
        plans = tuple(plan._replace(rule=rule) for plan in self.decode_plans)
        return dataclasses.replace(self, plan=self.plan._replace(rule=rule), decode_plans=plans, exports_programs=False)

    def plan_steps(self, longest: int) -> tuple[int, int]:
        """Returns the cache blocks that a decode program reads for a longest context, and the most steps it takes.

        On a CPU it stops at the end of the block that holds the next position, since reading a block before it is
        needed costs time. On a GPU it reads all blocks that its steps might need, so that steps never depend on a
        request's end.
        """
        layout, most = self.layout, self.max_steps
        if self.crosses_blocks:
            return layout.num_blocks(min(longest + most, layout.bounds[-1])), most
        num_blocks = layout.num_blocks(longest + 1)
        return num_blocks, min(most, layout.bounds[num_blocks] - longest)

    def split(self, blocks: tuple[kv.Block, ...]) -> kv.Cache:
        """Divides blocks into those that a decode program only reads and those that it may write."""
        num_frozen = len(blocks) - 1 if self.freezes_blocks else 0
        return kv.Cache(blocks[:num_frozen], blocks[num_frozen:])


def backend_for(
    platform: str,
    model: config.ModelConfig,
    window: int,
    batch_size: int,
    *,
    invariant: bool = False,
    mesh_size: int = 1,
) -> Backend:
    """Returns the backend of a platform, ``cpu`` or a GPU's name.

    Args:
        platform: The platform.
        model: Shape of the model.
        window: Tokens that the model sees.
        batch_size: Slots of all replicas.
        invariant: Whether the bits of a sample must not depend on the batch size. There are at least two slots then.
        mesh_size: Devices that share the model.

    Raises:
        ValueError: ``invariant`` on a GPU, or against an option in ``XLA_FLAGS``.
    """
    is_cpu = platform == "cpu"
    if invariant and not is_cpu:
        raise ValueError(f"numerics invariant is available on a CPU only: got the platform {platform!r}")
    if invariant and _FUSION_TYPE in os.environ.get("XLA_FLAGS", ""):
        raise ValueError(f"numerics invariant sets {_FUSION_TYPE}, which is in XLA_FLAGS too: remove it there")
    plan = topk.plan_for(model.vocab_size, platform)
    # Devices that share a model communicate in the order of their programs, so one thread dispatches all of them.
    num_replicas = _num_replicas(model, batch_size) if is_cpu and mesh_size == 1 else 1
    fewest_rows = _FEWEST_INVARIANT_ROWS if invariant else 1
    num_slots = max(batch_size // num_replicas, fewest_rows)
    return Backend(
        # XLA gathers a sharded array to constrain its memory layout, so blocks of several devices are not stacked.
        layout=kv.cpu_layout(window) if is_cpu else kv.gpu_layout(window, stacked=mesh_size == 1),
        plan=plan,
        # One plan if the smallest bucket is the whole vocabulary already.
        decode_plans=(plan,) if is_cpu else tuple(dict.fromkeys((plan.smallest, plan.full_vocab))),
        max_steps=_max_steps_on_cpu(model, num_slots) if is_cpu else _MAX_STEPS,
        waits_for_ends=is_cpu,
        crosses_blocks=not is_cpu,
        freezes_blocks=is_cpu and num_slots == 1,
        transposes_kernels=not is_cpu or invariant,
        exports_programs=is_cpu and mesh_size == 1,
        fewest_rows=fewest_rows,
        compiler_options=_INVARIANT_OPTIONS if invariant else {},
        decode_options=in_place_options(os.environ) if is_cpu else {},
        num_replicas=num_replicas,
        num_slots=num_slots,
    )


def _num_replicas(model: config.ModelConfig, batch_size: int) -> int:
    """Returns the number of engines that step side by side on a CPU.

    The number of cores does not enter, because the slots of a replica are part of the arithmetic.
    """
    # XLA's products and attention of up to 64 rows keep one core busy. D256 L8, 2 cores: a step of 16 slots takes 3.7
    # ms in two replicas and 5.1 ms in one; with 256 tokens in the cache 7.0 and 11.3 ms. 8 slots gain nothing.
    # Products of 4 MB and more keep both cores busy, and two replicas read them twice: 16 slots of D512 L8 take 22.6
    # ms in two and 19.9 ms in one; of GPT-2, 91 and 68 ms, and 64 slots 174 and 151 ms.
    largest = 4 * model.embed_dim * model.ff_hidden_dim
    is_divided = batch_size >= _SMALLEST_DIVIDED and batch_size % 2 == 0 and largest < _PRODUCT_ON_ALL_CORES
    return 2 if is_divided else 1


def _max_steps_on_cpu(model: config.ModelConfig, num_slots: int) -> int:
    D, F = model.embed_dim, model.ff_hidden_dim
    weights = model.num_layers * (4 * D * D + 2 * D * F) + model.vocab_size * D
    if weights > _MOST_WEIGHTS_FOR_SEVERAL_STEPS:
        return 1
    return _MAX_STEPS if num_slots == 1 else _MAX_STEPS_OF_SEVERAL_ON_CPU


def in_place_options(environ: Mapping[str, str]) -> dict[str, bool]:
    """Returns the XLA options by which a decode program on a CPU updates the cache in place.

    Without the analysis, XLA copies every buffer that is both read and written: 96 copies of 3 MB for GPT-2, 108 to
    160 ms per token. If ``XLA_FLAGS`` sets the option, that value is used.
    """
    return {} if _REGION_ANALYSIS in environ.get("XLA_FLAGS", "") else {_REGION_ANALYSIS: True}


def prefill_bucket(length: int, window: int) -> int:
    """Returns the padded length of a context: 8, 12, 16, 24, 32, 48, … or the window.

    All lengths of a bucket share one program, and at most a third of a bucket above 8 is padding.

    >>> [prefill_bucket(length, window=100) for length in (1, 9, 13, 70, 100)]
    [8, 12, 16, 96, 100]
    """
    size = _SMALLEST_BUCKET
    while size < length:
        size = size * 3 // 2 if size & (size - 1) == 0 else size * 4 // 3
    return min(size, window)
