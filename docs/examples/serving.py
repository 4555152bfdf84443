"""Continuous batching: from the host, and as pure functions in a loop of your own."""

from collections import defaultdict
from dataclasses import replace

import jax
import numpy as np

import jaxkv
from jaxkv import serving
from jaxkv.models import ModelConfig, random_model
from jaxkv.serving import Request, Requests, ServingConfig

MODEL = ModelConfig(
    vocab_size=64,
    hidden_size=32,
    num_layers=2,
    num_q_heads=4,
    num_kv_heads=2,
    head_dim=8,
    intermediate_size=64,
    max_context=256,
)
model = random_model(MODEL, jax.random.key(0))

# --8<-- [start:serve]
config = ServingConfig(
    model.cache_config(
        num_pages=48,
        page_size=8,
        max_seqs=4,
        max_pages_per_seq=16,
        prefix_cache=True,
    ),
    max_requests=16,
    token_budget=32,  # most tokens of a step: new ones, and chunks of prompts
)
requests = [
    Request(tokens=[1, 2, 3], max_new_tokens=8),
    Request(tokens=list(range(40)), max_new_tokens=8, priority=1),
    Request(
        tokens=[5],
        max_new_tokens=8,
        num_samples=2,
        sampling=jaxkv.Sampling(temperature=0.8),
        seed=7,
    ),
]
streamed = defaultdict(list)
for event in serving.serve(model, config, requests):
    print(event.id, event.sample, event.tokens, event.finish.name)
    streamed[event.id, event.sample] += event.tokens
# --8<-- [end:serve]

# --8<-- [start:functions]
# `serve` is these functions and a loop on the host. The state is one pytree: the
# cache, the request table, counters.
submit = jax.jit(serving.submit, donate_argnums=0)
run = jax.jit(serving.run, donate_argnums=1)
take = jax.jit(serving.take, donate_argnums=0)

numbered = [
    replace(request, id=number) for number, request in enumerate(requests)
]
state, status = submit(serving.init(config), Requests.of(numbered, config))
jaxkv.raise_for_status(status)
texts = defaultdict(list)
while np.any(state.requests.phase != serving.Phase.EMPTY):
    state = run(
        model, state, state.stats.steps + 8
    )  # eight steps, compiled as one loop
    state, events = take(state)
    for row in np.flatnonzero(events.counts):
        sample = int(events.ids[row]), int(events.samples[row])
        texts[sample] += events.tokens[row, : events.counts[row]].tolist()
print(state.stats)
# --8<-- [end:functions]

assert texts == streamed and len(texts) == 4
