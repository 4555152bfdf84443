"""A decoder on the paged cache, and its loaders. Needs `pip install 'jaxkv[models]'`."""

from jaxkv.extras import needs_extra as _needs_extra

with _needs_extra():
    from jaxkv.models.config import ModelConfig as ModelConfig
    from jaxkv.models.decoder import Decoder as Decoder
    from jaxkv.models.decoder import Llama as Llama
    from jaxkv.models.decoder import abstract_model as abstract_model
    from jaxkv.models.decoder import random_model as random_model
    from jaxkv.models.dense import dense_logits as dense_logits
    from jaxkv.models.loading import KNOWN_MODELS as KNOWN_MODELS
    from jaxkv.models.loading import LoadedModel as LoadedModel
    from jaxkv.models.loading import load as load
    from jaxkv.models.tokenizer import Tokenizer as Tokenizer
    from jaxkv.models.text_stream import TextStream as TextStream
    from jaxkv.models.text_stream import TextStreams as TextStreams
    from jaxkv.errors import ModelLoadError as ModelLoadError
    from jaxkv.errors import TokenizerError as TokenizerError
