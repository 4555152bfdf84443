"""Reports and plots of a cache's memory use, on the device and on the host."""

from jaxkv.memory.profile import MemoryProfile as MemoryProfile
from jaxkv.memory.profile import memory_profile as memory_profile
from jaxkv.memory.profile import unused_share as unused_share
from jaxkv.memory.device import DeviceMemory as DeviceMemory
from jaxkv.memory.device import PeakMemory as PeakMemory
from jaxkv.memory.device import device_memory as device_memory
from jaxkv.memory.page_owners import PageMap as PageMap
from jaxkv.memory.page_owners import page_map as page_map
from jaxkv.memory.pictures import plot_generation as plot_generation
from jaxkv.memory.pictures import plot_memory as plot_memory
from jaxkv.memory.pictures import plot_pages as plot_pages
from jaxkv.memory.pictures import plot_waste as plot_waste
from jaxkv.memory.telemetry import Telemetry as Telemetry
