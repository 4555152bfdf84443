"""Which places a token sees: the same for every backend."""

from jaxtyping import Array, Bool, Int


def sees(
    row_places: Int[Array, "..."], places: Int[Array, "..."], *, window: int | None, sink_tokens: int
) -> Bool[Array, "..."]:
    """Those up to its own; with a window, of these the last and the sequence's first `sink_tokens`.

    Args:
      row_places: of the tokens that look, along one axis.
      places: of those that may be seen, along the other.
      window, sink_tokens: as in `paged_attention`.
    """
    visible = places <= row_places
    if window is None:
        return visible
    near = places > row_places - window
    return visible & ((near | (places < sink_tokens)) if sink_tokens else near)
