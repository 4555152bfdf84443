"""Block sizes of Triton."""


def next_power_of_two(n: int) -> int:
    """The least power of two that is at least `n`; Triton's blocks must have such sizes."""
    return 1 << (n - 1).bit_length()
