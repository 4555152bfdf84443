"""Plans the memory of a model before it runs: does it fit, with how many sequences, how long?"""

from jaxkv.planner.shape import ModelShape as ModelShape
from jaxkv.planner.kv_bytes import KVBytes as KVBytes
from jaxkv.planner.kv_bytes import kv_cache_bytes as kv_cache_bytes
from jaxkv.planner.kv_bytes import cache_config as cache_config
from jaxkv.planner.memory_plan import Device as Device
from jaxkv.planner.memory_plan import Plan as Plan
from jaxkv.planner.planning import plan as plan
from jaxkv.planner.suggest import Suggestion as Suggestion
from jaxkv.planner.suggest import suggestions as suggestions
from jaxkv.planner.page_size import PageCost as PageCost
from jaxkv.planner.page_size import PageSizeChoice as PageSizeChoice
from jaxkv.planner.page_size import choose_page_size as choose_page_size
