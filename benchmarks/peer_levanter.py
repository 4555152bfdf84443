"""Levanter's page bookkeeping, as a peer to time: `PageTable` and `SequenceTable`.

Only the three files that hold them are loaded, without importing the package. They are run, never
copied. It needs `levanter==1.2.dev1644` and `haliax` (both without their dependencies), `equinox`,
and what haliax imports: `aqtp`, `jmp`, `safetensors`.
"""

import importlib.util
import sys
from dataclasses import replace
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Peer(NamedTuple):
    """The modules, and the version they came from."""

    version: str
    page_table: ModuleType
    jit_scheduler: ModuleType
    haliax: ModuleType


def load() -> Peer:
    """Loads the peer.

    Raises:
      ImportError: when it, or something it needs, is not installed.
    """
    haliax = importlib.import_module("haliax")
    files = metadata.distribution("levanter")
    for package in ("levanter", "levanter.inference"):
        sys.modules.setdefault(package, ModuleType(package))
    modules = {}
    for name in ("utils", "page_table", "jit_scheduler"):
        full_name = f"levanter.inference.{name}"
        path = str(files.locate_file(f"levanter/inference/{name}.py"))
        spec = importlib.util.spec_from_file_location(full_name, path)
        if spec is None or spec.loader is None:
            raise ImportError(f"no file {path}")
        modules[name] = sys.modules[full_name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(modules[name])
    return Peer(files.version, modules["page_table"], modules["jit_scheduler"], haliax)


class Operations:
    """The peer's operations on `(sequences, pages)`, each jitted with its state donated."""

    def __init__(self, peer: Peer, *, num_pages: int, max_seqs: int, page_size: int, row_pages: int):
        named = peer.haliax.named
        sequences = peer.jit_scheduler.SequenceTable.init(max_seqs, row_pages, page_size)
        everyone = named(jnp.ones(max_seqs, bool), "seq")
        self.empty: Any = (
            replace(sequences, used_mask=everyone),
            peer.page_table.PageTable.init(num_pages, max_seqs, page_size, row_pages),
        )

        def allocate(state, slots, positions):
            sequences, pages = state
            sequences, pages, batch = sequences.allocate_for_seq(
                pages, named(slots, "position"), named(positions, "position")
            )
            return (sequences, pages), batch

        def fork(state, children):
            return jax.lax.fori_loop(
                1, children + 1, lambda child, state: state[0].clone_pages_from(state[1], 0, child), state
            )

        def free(state, finished):
            sequences, pages = state[0].free_pages_for_finished(state[1], finished)
            # A slot is given up with its pages: taken again here, it is ready for the next run.
            return replace(sequences, used_mask=everyone, seq_lens=sequences.seq_lens * 0), pages

        self.allocate = jax.jit(allocate, donate_argnums=0)
        self.fork = jax.jit(fork, static_argnums=1, donate_argnums=0)
        self.free = jax.jit(free, donate_argnums=0)
