"""Errors that depend on data, raised on the host from a `Status`. Static mistakes raise `ValueError`."""


class JaxKVError(Exception):
    """Base class of the errors that a cache raises on the host."""


class OutOfPagesError(JaxKVError):
    """The pool has too few free pages."""


class SequenceTooLongError(JaxKVError):
    """A sequence does not fit its row of the page table."""


class InvalidSequenceError(JaxKVError):
    """A slot is beyond `max_seqs`, named twice, or an empty parent of a fork."""


class SlotOccupiedError(JaxKVError):
    """A fork's child is in use."""


class InvalidLengthError(JaxKVError):
    """`num_tokens` or a length is negative, or more tokens are asked for than one call takes."""


class RollbackTooLongError(JaxKVError):
    """`truncate` would need tokens that were released or rewritten."""


class RequestTableFullError(JaxKVError):
    """The request table of a server has too few empty rows."""


class CacheCorruptedError(JaxKVError):
    """The page table is inconsistent: a bug, or a cache edited by hand."""


class ModelLoadError(ValueError):
    """A model or tokenizer file cannot be used; the message names the file and the fault."""


class TokenizerError(ValueError):
    """A tokenizer cannot process the text, token ids or messages."""
