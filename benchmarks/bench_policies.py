"""What does a bounded memory cost in quality? SmolLM2 on English prose, by policy and budget.

A text of 4,096 tokens goes through the cache a page at a time, as a decode loop would take it: a policy
evicts whenever a page is full. Every token is predicted from what is kept then. `PromptCompress` cuts once:
the first three quarters are its prompt, and the last quarter is predicted.

    python -m benchmarks.bench_policies [--quick]
"""

import argparse
import json
import sys
from functools import partial
from pydoc_data.topics import topics

import jax
import jax.numpy as jnp
import numpy as np

import jaxkv
from jaxkv.models import load
from jaxkv.policies import HeavyHitter, LeastRecentlyUsed, PromptCompress, SemanticMerge, SlidingWindow

PAGE_SIZE, TOKENS = 16, 4096
LAST = TOKENS // 4


@partial(jax.jit, donate_argnames=("cache", "state"), static_argnames=("size", "evicts"))
def read(model, cache, state, tokens, targets, *, size: int, evicts: bool):
    """The text in chunks of `size`, to one sequence; the negative log-likelihood of each target."""
    seqs = jnp.zeros(1, jnp.int32)

    def step(carry, chunk):
        cache, state = carry
        tokens, targets = chunk
        policy = None if state is None else state.policy
        if evicts:
            cache, state, _ = policy.evict(cache, state, seqs)
        cache, batch = jaxkv.allocate(cache, seqs, jnp.full(1, size), total_tokens=size)
        if policy is None:
            logits, cache = model(tokens, cache, batch)
        elif not policy.needs_mass:
            logits, cache = model(tokens, cache, policy.view(batch))
        else:
            logits, cache, mass = model(tokens, cache, policy.view(batch), return_mass=True)
            state = policy.observe(state, cache, batch, mass)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(targets, 0)[:, None], axis=1)
        return (cache, state), (jnp.where(targets >= 0, -chosen[:, 0], 0.0), batch.status)

    chunks = tokens.reshape(-1, size), targets.reshape(-1, size)
    (cache, state), (nll, status) = jax.lax.scan(step, (cache, state), chunks)
    return cache, state, nll.reshape(-1), status


def nll_of(loaded, tokens, policy, dtype="float32"):
    """Of each token but the first, given those before it that are kept."""
    most = TOKENS if policy is None or policy.observe_last else None
    row = most // PAGE_SIZE if most else policy.capacity(loaded.config.cache_config(num_pages=512)) // PAGE_SIZE
    config = loaded.config.cache_config(num_pages=row, page_size=PAGE_SIZE, max_seqs=1, dtype=dtype)
    cache, state = jaxkv.init(config), policy.init(config) if policy else None
    targets = np.append(tokens[1:], -1).astype(np.int32)
    evicts = policy is not None and policy.observe_last is None
    if evicts or policy is None:
        *_, nll, status = read(loaded.model, cache, state, tokens, targets, size=PAGE_SIZE, evicts=evicts)
        return np.asarray(nll)
    prompt, tail = TOKENS - LAST, policy.observe_last
    parts, nll = np.split(np.arange(TOKENS), [prompt - tail, prompt]), []
    cache, _, one, _ = read(loaded.model, cache, None, tokens[parts[0]], targets[parts[0]], size=PAGE_SIZE, evicts=False)
    cache, state, two, _ = read(loaded.model, cache, state, tokens[parts[1]], targets[parts[1]], size=tail, evicts=False)
    cache, state, dropped = jax.jit(policy.evict, donate_argnums=(0, 1))(cache, state, jnp.zeros(1, jnp.int32))
    cache, _, three, _ = read(loaded.model, cache, None, tokens[parts[2]], targets[parts[2]], size=PAGE_SIZE, evicts=False)
    return np.concatenate([one, two, three])


def main():
    loaded = load("smollm2-135m")
    prose = "\n\n".join(topics[name] for name in sorted(topics))
    ids = np.asarray(loaded.tokenizer.encode(prose[: 16 * TOKENS]), np.int32)[:TOKENS]
    def show(name, nll):
        print(f"{name:50} {np.exp(nll[:-1].mean()):10.3f} {np.exp(nll[-LAST - 1:-1].mean()):10.3f}", flush=True)
    import time
    t=time.time(); full = nll_of(loaded, ids, None); show("full", full); print(time.time()-t)
    for part in (2, 4, 8):
        b = TOKENS // part
        for policy in [SlidingWindow(b - 4, 4)] if 0 else CHOOSE(b):
            t=time.time()
            show(str(policy)[:50], nll_of(loaded, ids, policy))
            print('   ', round(time.time()-t,1), flush=True)

def CHOOSE(b):
    return [LeastRecentlyUsed(b, 0.01), HeavyHitter(b, b // 2), SemanticMerge(b, b // 2), PromptCompress(b, 32)]

if __name__ == "__main__":
    sys.exit(main())
