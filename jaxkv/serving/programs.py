"""The functions of a server, compiled. They donate the state: for callers who made it themselves."""

import jax

from jaxkv.serving import running, submitting

submit = jax.jit(submitting.submit, donate_argnames="state")
run = jax.jit(running.run, static_argnames="logits_fn", donate_argnames="state")
take = jax.jit(submitting.take, static_argnames="width", donate_argnames="state")
cancel = jax.jit(submitting.cancel, donate_argnames="state")
