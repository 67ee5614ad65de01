"""llama.cpp: a cache for llama-cpp-python, and the slot files of llama-server, kept compressed in a pool.

>>> from kvtide.llama_cpp import KvtideCache
>>> llama.set_cache(KvtideCache(llama))          # llama = llama_cpp.Llama(...)

``python -m kvtide.llama_cpp save|restore|forget`` does the same with slot files.
"""

from .cache import KvtideCache
from .geometry import ModelShape
from .slots import SlotFile
from .state import State, parse_state

__all__ = ["KvtideCache", "ModelShape", "SlotFile", "State", "parse_state"]
