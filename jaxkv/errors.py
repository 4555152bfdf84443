"""Every error of jaxkv. Static mistakes are plain `ValueError`s; what depends on data is a `Status` first."""


class JaxKVError(Exception):
    """Base of the errors that a cache raises on the host."""


class OutOfPagesError(JaxKVError):
    """The pool has too few free pages."""


class SequenceTooLongError(JaxKVError):
    """A sequence does not fit its row of the page table."""


class InvalidSequenceError(JaxKVError):
    """A slot beyond `max_seqs`, named twice, or an empty parent."""


class SlotOccupiedError(JaxKVError):
    """A fork's child is in use."""


class InvalidLengthError(JaxKVError):
    """`num_tokens` or a length is negative, or more tokens are asked for than one call takes."""


class RollbackTooLongError(JaxKVError):
    """`truncate` would need tokens that were released or rewritten."""


class CacheCorruptedError(JaxKVError):
    """The page table contradicts itself: a bug, or a cache edited by hand."""


class ModelLoadError(ValueError):
    """A model or tokenizer file that cannot be used; names the file and what is wrong with it."""


class TokenizerError(ValueError):
    """Text, token ids or messages that a tokenizer cannot take."""
