"""A cache for Hugging Face transformers that keeps keys and values in a kvtide pool.

>>> from kvtide.transformers import KvtideCache
>>> model.generate(**inputs, past_key_values=KvtideCache(model))                       # doctest: +SKIP

Two modes. **Materialise** (default) works with every model and every attention: each layer gets its keys and values back as
tensors, decoded where they are coded. **Attend** leaves them in the pool, which attends over them where they lie:

>>> model.set_attn_implementation("kvtide")                                            # doctest: +SKIP
>>> model.generate(**inputs, past_key_values=KvtideCache(model))                       # doctest: +SKIP
"""

from .aliases import IsoQuantCache, PlanarQuantCache, RotorQuantCache, TurboQuantCache
from .attention import register as _register
from .cache import KvtideCache

_register()

__all__ = ["IsoQuantCache", "KvtideCache", "PlanarQuantCache", "RotorQuantCache", "TurboQuantCache"]
