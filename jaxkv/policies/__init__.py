"""Eviction policies: which tokens to drop when a sequence exceeds its budget; each a frozen dataclass."""

from jaxkv.policies.base import Policy as Policy
from jaxkv.policies.base import Step as Step
from jaxkv.policies.token_policy import TokenPolicy as TokenPolicy
from jaxkv.policies.token_policy import Tokens as Tokens
from jaxkv.policies.sliding_window import SlidingWindow as SlidingWindow
from jaxkv.policies.least_recently_used import LeastRecentlyUsed as LeastRecentlyUsed
from jaxkv.policies.heavy_hitter import HeavyHitter as HeavyHitter
from jaxkv.policies.semantic_merge import SemanticMerge as SemanticMerge
from jaxkv.policies.prompt_compress import PromptCompress as PromptCompress
