"""jaxkv: a paged KV cache for JAX.

The cache is one immutable pytree, and these are pure functions on it, to be called inside `jax.jit`.
Only what is exported here is supported. Exports are in reading order.
"""

from jaxkv.config import CacheConfig as CacheConfig
from jaxkv.state import KVCache as KVCache
from jaxkv.state import KVPool as KVPool
from jaxkv.state import PageTable as PageTable
from jaxkv.state import AllocationStats as AllocationStats
from jaxkv.state import Batch as Batch
from jaxkv.state import Status as Status
from jaxkv.state import PolicyState as PolicyState
from jaxkv.initial import init as init
from jaxkv.packing import pack as pack
from jaxkv.allocation import allocate as allocate
from jaxkv.pages import free as free
from jaxkv.pages import truncate as truncate
from jaxkv.pages import lengths as lengths
from jaxkv.forking import fork as fork
from jaxkv.reordering import reorder as reorder
from jaxkv.prefixes import match_prefix as match_prefix
from jaxkv.prefixes import record_prefix as record_prefix
from jaxkv.prefixes import clear_prefixes as clear_prefixes
from jaxkv.pool import append as append
from jaxkv.pool import gather as gather
from jaxkv.pool import keys as keys
from jaxkv.pool import values as values
from jaxkv.attention import attend as attend
from jaxkv.attention import attention_mass as attention_mass
from jaxkv.eviction import observe as observe
from jaxkv.eviction import evict as evict
from jaxkv.merge import merge_attention as merge_attention
from pallas_kernels import use_backend as use_backend
from pallas_kernels.ordering import after as after
from jaxkv.rope import Rope as Rope
from jaxkv.positions import shift_positions as shift_positions
from jaxkv import policies as policies
from jaxkv import sizing as sizing
from jaxkv.compaction import compact as compact
from jaxkv.compaction import should_compact as should_compact
from jaxkv.compaction import maybe_compact as maybe_compact
from jaxkv.memory.profile import MemoryProfile as MemoryProfile
from jaxkv.memory.profile import memory_profile as memory_profile
from jaxkv.policies import Policy as Policy
from jaxkv.sampling import Sampling as Sampling
from jaxkv.causal_lm import CausalLM as CausalLM
from jaxkv.decode import Finish as Finish
from jaxkv.generation import Generation as Generation
from jaxkv.generating import generate as generate
from jaxkv.beams import BeamSearch as BeamSearch
from jaxkv.beams import beam_search as beam_search
from jaxkv import serving as serving
from jaxkv.invariants import check_invariants as check_invariants
from jaxkv.invariants import raise_for_status as raise_for_status
from jaxkv.errors import JaxKVError as JaxKVError
from jaxkv.errors import OutOfPagesError as OutOfPagesError
from jaxkv.errors import RollbackTooLongError as RollbackTooLongError
from jaxkv.errors import SequenceTooLongError as SequenceTooLongError
from jaxkv.errors import InvalidSequenceError as InvalidSequenceError
from jaxkv.errors import SlotOccupiedError as SlotOccupiedError
from jaxkv.errors import InvalidLengthError as InvalidLengthError
from jaxkv.errors import RequestTableFullError as RequestTableFullError
from jaxkv.errors import CacheCorruptedError as CacheCorruptedError

__version__ = "0.1.0"
