# %% [markdown]
# # A first tour of hipgpt_jax
#
# Install the package from the root of a clone, `pip install .`, and run this file, or open it as a notebook. It uses
# the small model that is bundled with the package, and needs neither a GPU nor a network.

# %%
import hipgpt_jax

run = hipgpt_jax.load_run("shakespeare")
print(run)

# %% [markdown]
# `generate` returns a record per sample. A notebook shows the list as a page: each token has the colour of its
# surprisal, and pointing at it shows its alternatives.

# %%
records = run.generate(["ROMEO:", "JULIET:"], seed=7, num_samples=2, num_tokens=60, top_logprobs=5)
print(records)

# %% [markdown]
# A record is plain data: the text, and of each token its id, log-probability, rank and more.

# %%
first = records[0]
for token, logprob, rank in list(zip(first.tokens, first.logprobs, first.ranks, strict=True))[:5]:
    print(f"{token!r:10} log-probability {logprob:6.2f}  rank {rank}")

# %% [markdown]
# The same weights, prompt, settings and seed give the same tokens, alone or among others, streamed or not.

# %%
for piece in run.stream("ROMEO:", seed=7, num_tokens=60):
    print(piece, end="", flush=True)
print()
(again,) = run.generate("ROMEO:", seed=7, num_tokens=60)
assert again.ids == first.ids

# %% [markdown]
# At one seed, different settings share their noise, so that samples are paired.

# %%
for temperature in (0.5, 1.0, 1.5):
    (sample,) = run.generate("ROMEO:", seed=7, num_tokens=12, temperature=temperature, top_k=0, top_p=1.0)
    print(f"{temperature}: {sample.text!r}")

# %% [markdown]
# `score` measures a text of your own.

# %%
for scored in run.score(["To be, or not to be", "To be, or not to bee"]):
    print(f"{scored.score.bits_per_byte:.2f} bits per byte, perplexity {scored.score.perplexity:.1f}")

# %% [markdown]
# Records are written one JSON line each. `hipgpt-replay quickstart.jsonl` generates them again and compares, a year
# later or on another machine; `hipgpt-inspect quickstart.jsonl --html quickstart.html` writes the page.

# %%
with open("quickstart.jsonl", "w", encoding="utf-8") as file:
    file.writelines(record.to_json() + "\n" for record in records)
