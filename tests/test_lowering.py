"""Lowering of all programs for AMD's and NVIDIA's GPUs, which needs neither a GPU nor a plugin."""

import dataclasses
import functools
from typing import Any

import fakes
import jax
import jax.export
import jax.numpy as jnp
import pytest

from hipgpt_jax import training_config
from hipgpt_jax.generation import backends, executables
from hipgpt_jax.model import mesh, transformer
from hipgpt_jax.training import optimizer, train_step

# JAX guarantees compatibility of few custom calls. This one is an annotation that XLA itself removes; any other needs
# a kernel in the plugin.
_CHECKS = [jax.export.DisabledSafetyCheck.custom_call("LayoutConstraint")]

MODEL = dataclasses.replace(fakes.MODEL, num_layers=1)

pytestmark = pytest.mark.slow
GPUS = pytest.mark.parametrize(("platform", "dtype"), [("rocm", "float32"), ("rocm", "bfloat16"), ("cuda", "bfloat16")])


def lower(function: Any, platform: str, *shapes: Any) -> None:
    """Lowers a jitted function for a platform, without custom calls but ``_CHECKS``."""
    exported = jax.export.export(function, platforms=[platform], disabled_checks=_CHECKS)(*shapes)
    assert exported.platforms == (platform,)


@GPUS
def test_generation_lowers(platform: str, dtype: str) -> None:
    lowered = set()
    for stride, slots in ((1, 3), (4, 1)):
        backend = backends.backend_for(platform, MODEL, MODEL.max_seq_len, slots)
        programs = executables.Executables(MODEL, dtype, MODEL.max_seq_len, stride, "xla", backend)
        programs.load(fakes.random_params(MODEL))
        needed = {
            executables.Program("prefill", rows=slots, length=8),
            executables.Program("insert", blocks=1, rows=slots),
            *programs.programs_for(8, 20, top_logprobs=True),
        }
        for program in needed:
            lower(programs.functions[program.name], platform, *programs.shapes(program))
        lowered |= {program.name for program in needed}
        assert lowered <= set(programs.functions)
    assert lowered == set(programs.functions)


@GPUS
def test_training_lowers(platform: str, dtype: str) -> None:
    model = transformer.Transformer(MODEL, dtype)
    key = jax.random.key(0, impl="threefry2x32")
    layout = mesh.Layout.create({"data": 1, "fsdp": 1, "model": 1})
    tokens = jax.ShapeDtypeStruct((4, 9), jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # Optax 0.2.8 itself promotes a Python float with an integer count
        for dropout, grad_accum in ((0.0, 1), (0.1, 2)):
            train = training_config.TrainConfig(dropout=dropout, grad_accum=grad_accum)
            tx = optimizer.make(train)
            make_state = functools.partial(train_step.init_state, model, tx)
            lower(jax.jit(make_state), platform, key)
            step = train_step.make_train_step(model, tx, train, key, layout)
            lower(step, platform, jax.eval_shape(make_state, key), tokens)
