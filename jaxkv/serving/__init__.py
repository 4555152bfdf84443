"""Serving: continuous batching as one compiled program.

A state, pure functions on it, and a compiled loop; no engine object and no thread:

    state = serving.init(config)
    state, status = submit(state, serving.Requests.of([serving.Request(tokens=[1, 2, 3])], config))
    state = run(model, state, until)            # one while loop: schedule, model, sampling
    state, events = take(state)                 # new tokens, finished requests

where `submit`, `run` and `take` are those of this module under the caller's `jax.jit`, which donates the
state. `serve` is that loop for the host.
"""

from jaxkv.serving.config import ServingConfig as ServingConfig
from jaxkv.serving.state import Phase as Phase
from jaxkv.serving.state import RequestTable as RequestTable
from jaxkv.serving.state import ServingState as ServingState
from jaxkv.serving.state import ServingStats as ServingStats
from jaxkv.serving.state import init as init
from jaxkv.serving.requests import Request as Request
from jaxkv.serving.requests import Requests as Requests
from jaxkv.serving.submitting import Events as Events
from jaxkv.serving.submitting import submit as submit
from jaxkv.serving.running import run as run
from jaxkv.serving.submitting import take as take
from jaxkv.serving.submitting import cancel as cancel
from jaxkv.serving.speculation import Drafter as Drafter
from jaxkv.serving.speculation import PromptLookup as PromptLookup
from jaxkv.serving.hosting import Event as Event
from jaxkv.serving.hosting import serve as serve
from jaxkv.serving.metrics import ServingMetrics as ServingMetrics
