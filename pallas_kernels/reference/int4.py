"""Four-bit K and V in NumPy, a row at a time: what `pallas_kernels.formats.int4` is held to, bit for bit."""

from functools import cache

import numpy as np


def quantize(values, *, keys):
    """Words of codes, and words of scales: of keys, the spikes behind them."""
    rows = np.asarray(values).astype(np.float32).reshape(-1, values.shape[-1])
    words, scales = zip(*(quantize_row(row, keys) for row in rows), strict=True)
    return tuple(np.array(part).reshape(*values.shape[:-1], -1) for part in (words, scales))


def dequantize(words, scales):
    rows = zip(words.reshape(-1, words.shape[-1]), scales.reshape(-1, scales.shape[-1]), strict=True)
    values = [dequantize_row(*row) for row in rows]
    return np.array(values).reshape(*words.shape[:-1], -1)


def quantize_row(row, keys):
    most = np.max(np.abs(row), where=np.isfinite(row), initial=0)
    most = min(most, np.float32(2.0**90)) if most > 2.0**-90 else np.float32(0)
    row = np.clip(np.where(np.isnan(row), 0, row), -most, most).astype(np.float32)
    size = len(row) // num_groups(len(row))
    spike_words = []
    if keys:
        spikes = np.zeros_like(row)
        for first in range(0, len(row), 2 * size):
            peaks = [np.argmax(np.abs(row[at : at + size])) for at in (first, first + size)]
            found = [row[first + nth * size + peak] for nth, peak in enumerate(peaks)]
            unit = power(max(abs(found[0]), abs(found[1])), 5)
            counts = [int(np.clip(np.round(x / unit), -31, 31)) if unit else 0 for x in found]
            for nth, (peak, count) in enumerate(zip(peaks, counts, strict=True)):
                spikes[first + nth * size + peak] = count * unit
            spike_words.append(pack(unit, (6, *peaks), (6, *(count + 32 for count in counts))))
        row = row - spikes
    unit = power(np.max(np.abs(row)), 16)
    if unit:
        whole = np.round(row / unit)
        row = (hadamard(len(row), stored=True) @ whole.astype(np.float64) * unit).astype(np.float32)
    else:
        row = np.zeros_like(row)
    groups = [quantize_group(row[at : at + size]) for at in range(0, len(row), size)]
    scale_words = []
    for (_, one, one_zero), (_, other, other_zero) in zip(groups[::2], groups[1::2], strict=True):
        unit = power(max(one, other), 7)
        steps = [int(np.clip(np.round(step / unit), 0, 127)) if unit else 0 for step in (one, other)]
        scale_words.append(pack(unit, (7, *steps), (5, one_zero, other_zero)))
    codes = np.concatenate([codes for codes, _, _ in groups]).reshape(8, -1)
    words = np.sum([codes[part].astype(np.int64) << (4 * part) for part in range(8)], axis=0)
    return words.astype(np.uint32).view(np.int32), np.array(scale_words + spike_words, np.int32)


def quantize_group(group):
    """Codes, the step that makes their product with the group right, and the zero point in half steps."""
    low, high = min(group.min(), np.float32(0)), max(group.max(), np.float32(0))
    step = (high - low) * np.float32(1 / 15.5)
    inverse = np.float32(64) / step if step > 2.0**-105 else np.float32(0)
    fine = np.round(group * inverse).astype(int)
    zero = int(np.clip((15 * 64 - int(np.round((low + high) * inverse)) + 32) >> 6, 0, 31))
    codes = np.clip((fine + 32 * zero + 32) >> 6, 0, 15)
    squares, product = np.sum(fine * fine), np.sum(fine * (2 * codes - zero))
    return codes, step * (np.float32(squares) / np.float32(max(product * 32, 1))), zero


def dequantize_row(words, scales):
    head_dim = 8 * len(words)
    pairs, size = num_groups(head_dim) // 2, head_dim // num_groups(head_dim)
    codes = np.concatenate([(words >> (4 * part)) & 15 for part in range(8)])
    row, spikes = np.zeros((2, head_dim))
    for pair in range(pairs):
        for nth in range(2):
            group = slice((2 * pair + nth) * size, (2 * pair + nth + 1) * size)
            unit, (step, zero) = unpack(scales[pair], nth, (7, 5))
            row[group] = unit * step * (codes[group] - zero / 2)
            if len(scales) > pairs:
                unit, (peak, count) = unpack(scales[pairs + pair], nth, (6, 6))
                spikes[group.start + peak] += unit * (count - 32)
    return hadamard(head_dim, stored=False) @ row + spikes


def num_groups(head_dim):
    return max(count for count in (2, 4, 8) if count == 2 or head_dim >= 32 * count)


def power(value, bits):
    """The power of two of which `value` holds between `2**(bits - 1)` and `2**bits`."""
    return 2.0 ** (np.frexp(value)[1] - bits) if value > 2.0**-105 else 0.0


def pack(unit, *fields):
    """The exponent as float32 has it, and two integers of so many bits for each field."""
    word = int(np.float32(unit).view(np.int32)) >> 23
    for bits, one, other in fields:
        word = (word << bits | int(one)) << bits | int(other)
    return np.uint32(word).view(np.int32)


def unpack(word, nth, widths):
    word, fields = int(word) & 0xFFFFFFFF, []
    for bits in reversed(widths):
        fields.append(word >> (bits * (1 - nth)) & (1 << bits) - 1)
        word >>= 2 * bits
    unit = (np.uint32(word << 23)).view(np.float32).astype(np.float64)
    return unit, fields[::-1]


@cache
def hadamard(head_dim, *, stored):
    """Blocks of powers of two, the largest first: each row to a power of two, and both kinds make one."""
    matrix, first = np.zeros((head_dim, head_dim)), 0
    while first < head_dim:
        doublings = int(np.log2(head_dim - first))
        block = np.ones((1, 1))
        for _ in range(doublings):
            block = np.kron([[1, 1], [1, -1]], block)
        here = slice(first, first + len(block))
        matrix[here, here] = block / 2.0 ** ((doublings + stored) // 2)
        first += len(block)
    return matrix
