"""What goes wrong with models, as errors that each say it in one line."""


class ModelLoadError(ValueError):
    """A model or tokenizer file that cannot be used; names the file and what is wrong with it."""


class TokenizerError(ValueError):
    """Text, token ids or messages that a tokenizer cannot take."""
