"""vLLM's bookkeeping of blocks, as a peer to time: hashes of tokens, `BlockPool`, `FullAttentionManager`.

Four files of vLLM 0.33.0 in plain Python, read by path and run, never copied; `make peers` and `make
prefixes` put them in the folder that `JAXKV_PEERS` names, by default `.peers`. What else they import has
stand-ins: types that are only named in annotations or asked about, and a logger. Left out is what surrounds
them in a server (the coordinator of groups, `KVCacheManager`), and so are events, metrics, adapters and
images.
"""

import logging
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

VERSION = "0.33.0"
# In the order in which one needs another.
_FILES = (
    "vllm.utils.hashing",
    "vllm.v1.core.kv_cache_utils",
    "vllm.v1.core.block_pool",
    "vllm.v1.core.single_type_kv_cache_manager",
)
_PACKAGES = (
    "vllm",
    "vllm.distributed",
    "vllm.multimodal",
    "vllm.utils",
    "vllm.v1",
    "vllm.v1.core",
    "vllm.v1.hisparse",
)
_STAND_INS: dict[str, dict[str, Any]] = {
    "cbor2": {},  # of a hash that is not used
    "vllm.config": {},
    "vllm.distributed.kv_events": dict(MEDIUM_GPU="GPU", MEDIUM_CPU="CPU"),
    "vllm.envs": {},
    "vllm.logger": dict(init_logger=logging.getLogger),
    "vllm.multimodal.utils": {},
    "vllm.utils.math_utils": dict(cdiv=lambda a, b: -(-a // b)),
    "vllm.v1.core.kv_cache_metrics": {},
    "vllm.v1.hisparse.block_pool": {},
    "vllm.v1.kv_cache_interface": {},
    "vllm.v1.kv_cache_spec_registry": {},
    "vllm.v1.request": {},
    "vllm.v1.utils": {},
}


class _StandIn(ModuleType):
    """A module that has a class of every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        setattr(self, name, type(name, (), {}))
        return getattr(self, name)


def load(folder: Path | None = None) -> SimpleNamespace:
    """The four modules, by the last parts of their names.

    Raises:
      ImportError: when a file is absent.
    """
    folder = folder or Path(os.environ.get("JAXKV_PEERS", ".peers"))
    for name in _FILES:
        if not (path := folder / f"{name.rpartition('.')[2]}.py").exists():
            raise ImportError(f"no file {path}")
    for name in _PACKAGES:
        sys.modules[name] = ModuleType(name)
    for name, attributes in _STAND_INS.items():
        sys.modules[name] = _StandIn(name)
        vars(sys.modules[name]).update(attributes)
    sys.modules["vllm"].__dict__["envs"] = sys.modules["vllm.envs"]
    loaded = {}
    for name in _FILES:
        short = name.rpartition(".")[2]
        spec = util.spec_from_file_location(name, folder / f"{short}.py")
        assert spec is not None and spec.loader is not None
        loaded[short] = sys.modules[name] = util.module_from_spec(spec)
        spec.loader.exec_module(loaded[short])
    return SimpleNamespace(**loaded)


@dataclass(slots=True)
class Request:
    """What these files read of vLLM's `Request`."""

    request_id: str
    all_token_ids: list[int]
    block_hashes: list[bytes] = field(default_factory=list)
    mm_features: tuple[()] = ()
    lora_request: None = None
    cache_salt: None = None
    prompt_embeds: None = None
    shared_prefix_boundary: int = 0

    @property
    def num_tokens(self) -> int:
        return len(self.all_token_ids)


class Operations:
    """The peer's operations on a pool of blocks, one group of layers with full attention."""

    def __init__(self, peer: SimpleNamespace, *, num_pages: int, page_size: int):
        hashes = peer.kv_cache_utils
        hashes.init_none_hash(peer.hashing.sha256)  # the default of a server
        self._hasher: Callable[[Request], list[bytes]] = hashes.get_request_block_hasher(
            page_size, peer.hashing.sha256
        )
        # Block 0 stands for none.
        self.pool = peer.block_pool.BlockPool(num_pages + 1, True, page_size)
        manager = peer.single_type_kv_cache_manager.FullAttentionManager
        spec = sys.modules["vllm.v1.kv_cache_interface"].FullAttentionSpec()
        spec.block_size, spec.dcp_sharded, spec.prefix_cacheable = page_size, False, True
        self.manager = manager(spec, self.pool, True, 0, page_size)
        self.page_size, self._spec, self._made = page_size, spec, 0

    def request(self, tokens: Sequence[int]) -> Request:
        """A request whose blocks have no hashes yet."""
        self._made += 1
        return Request(str(self._made), list(tokens))

    def hash(self, request: Request) -> None:
        """Hashes of its whole blocks, as a server takes when it creates a request."""
        request.block_hashes = []
        request.block_hashes.extend(self._hasher(request))

    def match(self, request: Request) -> int:
        """The request's cached blocks become its own; returns the number of their tokens."""
        (blocks,), num_tokens = self.manager.find_longest_cache_hit(
            request.block_hashes,
            request.num_tokens - 1,
            [0],
            self.pool,
            self._spec,
            drop_eagle_block=False,
            alignment_tokens=self.page_size,
        )
        self.manager.add_local_computed_blocks(request.request_id, blocks, num_tokens, 0)
        return num_tokens

    def allocate(self, request: Request) -> int:
        """Blocks for all its tokens; returns how many are new."""
        done = len(self.manager.req_to_blocks.get(request.request_id, ())) * self.page_size
        length, name = request.num_tokens, request.request_id
        need = self.manager.get_num_blocks_to_allocate(name, length, [], done, done, length)
        if need > self.pool.get_num_free_blocks():
            raise MemoryError(f"{need} blocks are not free")
        return len(self.manager.allocate_new_blocks(name, length, length))

    def record(self, request: Request) -> None:
        """Makes its whole blocks findable."""
        self.manager.cache_blocks(request, request.num_tokens, replay_boundaries=())

    def free(self, request: Request) -> None:
        """Its blocks have one owner less."""
        self.manager.free(request.request_id)
