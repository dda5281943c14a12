"""GPT-2-style models on your own text, with generation that can be replayed token for token."""

from hipgpt_jax.version import __version__ as __version__
