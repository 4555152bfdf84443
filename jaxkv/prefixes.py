"""Sharing what prompts have in common: whole pages of tokens, found again in whatever order requests come."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxkv import prefix_index
from jaxkv.config import CacheConfig
from jaxkv.entries import check_cache, check_vectors, clean_slots, rows_of, table_rows
from jaxkv.fingerprint import Operation, stamp
from jaxkv.operation import REPLICATED, as_given, operation
from jaxkv.ownership import clear_index, count, hold, reclaim_nodes, share_found
from jaxkv.prefix_sizes import block_tokens, pages_per_node
from jaxkv.state import KVCache, PageTable, PolicyState, PrefixIndex
from pallas_kernels import control_flow
from pallas_kernels.checks import as_int32


def match_prefix(
    cache: KVCache,
    seqs: Int[Array, " entries"],
    tokens: Int[Array, "entries max_tokens"],
    num_tokens: Int[Array, " entries"],
    *,
    salt: Int[Array, " entries"] | None = None,
) -> tuple[KVCache, Int[Array, " entries"]]:
    """Gives empty slots the recorded pages that hold the longest beginning of their tokens.

        recorded            [a b c d][e f g h][i j k l]
        tokens              a b c d e f g h x y z
        the slot afterwards [a b c d][e f g h]            8 tokens matched, 3 are left to compute

    As by a fork: the pages are shared, not copied. Whole pages only, and at most `num_tokens - 1` tokens, so
    that one is left whose logits choose the next. The slot's position is then the number of matched tokens:
    allocate, append and attend for the rest. No free page is needed. In layers with a window only the pages
    that the next tokens can see are installed. A match is exact: tokens are compared, hashes only find them.
    What a policy remembers of the slot starts anew; those that go by attention need a cache without prefixes.

    Args:
      cache: the cache, of a config with `prefix_cache`.
      seqs: slots. An occupied slot, padding and a slot named twice are unchanged and match nothing.
      tokens: token ids of each prompt, from its first one on, padded at the end.
      num_tokens: how many of each are its prompt.
      salt: only what was recorded with the same salt is found: of a user, an adapter, an image. Default 0.

    Returns:
      The cache, and the number of matched tokens of each entry.

    Raises:
      ValueError: for a config without `prefix_cache`, wrong shapes or dtypes, at trace time.

    Example:
      >>> import jax.numpy as jnp, jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4, page_size=2,
      ...                            prefix_cache=True)
      >>> seqs, prompt = jnp.array([0]), jnp.array([[5, 6, 7, 8]])
      >>> cache, batch = jaxkv.allocate(jaxkv.init(config), seqs, jnp.array([4]), total_tokens=4)
      >>> cache = jaxkv.record_prefix(cache, seqs, prompt, jnp.array([4]))  # after append in every layer
      >>> cache, num_matched = jaxkv.match_prefix(cache, jnp.array([1]), prompt, jnp.array([4]))
      >>> int(num_matched[0]), int(cache.table.positions[1])
      (2, 2)
    """
    return _match(cache, *_checked("match_prefix", cache, seqs, tokens, num_tokens, salt))


def record_prefix(
    cache: KVCache,
    seqs: Int[Array, " entries"],
    tokens: Int[Array, "entries max_tokens"],
    num_tokens: Int[Array, " entries"],
    *,
    salt: Int[Array, " entries"] | None = None,
) -> KVCache:
    """Makes the full pages of sequences findable by `match_prefix`, also after the sequences are freed.

    Call it after each chunk of a prompt, once it is appended in every layer, and before `free`: pages that
    a window released since the last call are not recorded. Recording again changes nothing. Entries count in
    order: of equal beginnings the first is kept, and longer parts of later ones continue it.

    Recorded pages that no sequence uses any more are taken when the free stack does not suffice: those first
    that were left first, the end of a text before its beginning.

    Args:
      cache: the cache, of a config with `prefix_cache`.
      seqs: slots; padding and empty slots are passed over.
      tokens: token ids of each sequence, from its first one on, padded at the end: those that were appended
        in every layer. They are not checked.
      num_tokens: how many of each are to be recorded, no more than the sequence holds. Tokens from the first
        that was dropped, rewritten or shifted on are never recorded.
      salt: see `match_prefix`.

    Returns:
      The cache.

    Raises:
      ValueError: as `match_prefix`.

    Example: see `match_prefix`.
    """
    return _record(cache, *_checked("record_prefix", cache, seqs, tokens, num_tokens, salt))


def clear_prefixes(cache: KVCache) -> KVCache:
    """Forgets every recorded page, as new weights demand; sequences keep theirs.

    Raises:
      ValueError: for a config without `prefix_cache`.

    Example:
      >>> import jaxkv
      >>> config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4, prefix_cache=True)
      >>> int(jaxkv.clear_prefixes(jaxkv.init(config)).table.num_free)
      4
    """
    _check_config("clear_prefixes", cache)
    return _clear(cache)


def _checked(name: str, cache: KVCache, seqs, tokens, num_tokens, salt) -> tuple[Array, ...]:
    _check_config(name, cache)
    vectors = dict(seqs=seqs, num_tokens=num_tokens) | ({} if salt is None else dict(salt=salt))
    seqs, num_tokens, *given = check_vectors(**vectors)
    salt = given[0] if given else jnp.zeros_like(seqs)
    tokens = tokens if isinstance(tokens, jax.Array) else np.asarray(tokens)
    integers = jnp.issubdtype(tokens.dtype, jnp.integer)
    if tokens.ndim != 2 or tokens.shape[0] != seqs.shape[0] or not tokens.shape[1] or not integers:
        raise ValueError(
            f"tokens must be int32 [{seqs.shape[0]}, max_tokens], a row for each of seqs, not "
            f"{tokens.dtype}{list(tokens.shape)}"
        )
    return seqs, as_int32(tokens), num_tokens, salt


def _check_config(name: str, cache: KVCache) -> None:
    check_cache(cache)
    if not cache.config.prefix_cache:
        raise ValueError(f"{name} needs a cache of CacheConfig(prefix_cache=True)")


def _blocks(config: CacheConfig, tokens: Array) -> Array:
    """`[entries, blocks, block]`: the whole blocks of tokens, as many as a sequence can have."""
    block = block_tokens(config)
    count = min(tokens.shape[1], config.max_tokens_per_seq) // block
    return tokens[:, : count * block].reshape(tokens.shape[0], count, block)


# Matching -----------------------------------------------------------------------------------


@operation(results=lambda cache, *_: (as_given(cache), REPLICATED))
@jax.named_scope("jaxkv.match_prefix")
def _match(
    cache: KVCache, seqs: Array, tokens: Array, num_tokens: Array, salt: Array
) -> tuple[KVCache, Array]:
    config, table = cache.config, cache.table
    slot = _empty_slots(table, seqs, config.max_seqs)
    asks = slot < config.max_seqs
    blocks = _blocks(config, tokens)
    counted: dict[str, Array] = dict(
        prefix_queries=jnp.sum(asks, dtype=jnp.int32),
        prefix_tokens_asked=jnp.sum(
            jnp.where(asks, jnp.clip(num_tokens, 0, tokens.shape[1]), 0), dtype=jnp.int32
        ),
    )
    if blocks.shape[1] == 0:
        stats = count(cache.stats, None, None, num_taken=0, **counted)
        return replace(cache, stats=stats), jnp.zeros_like(seqs)
    size = blocks.shape[2]
    wanted = jnp.where(asks, jnp.minimum((jnp.maximum(num_tokens, 1) - 1) // size, blocks.shape[1]), 0)
    index = table.prefixes
    assert index is not None
    chain = prefix_index.look_up(index, blocks, salt, wanted)
    matched, installed, pages = _longest(index, chain, config)
    slot = jnp.where(matched > 0, slot, config.max_seqs)
    table, num_taken = _install(table, slot, matched * size, installed, pages, config)
    table = stamp(table, Operation.MATCH_PREFIX, matched > 0, slot, matched, pages[0][:, 0])
    counted["prefix_tokens_matched"] = jnp.sum(matched * size, dtype=jnp.int32)
    stats = count(cache.stats, cache.table, table, num_taken=num_taken, **counted)
    policy = _anew(cache.policy, slot, config)
    return replace(cache, table=table, stats=stats, policy=policy), matched * size


def _anew(
    policy: PolicyState | None, slot: Int[Array, " entries"], config: CacheConfig
) -> PolicyState | None:
    """The policy's state, which has seen nothing of these slots yet: an earlier sequence left its own."""
    if policy is None:
        return None
    first = policy.rule.first_values(config)
    values = {
        name: of.at[slot].set(rows_of(first[name], slot), mode="drop") for name, of in policy.values.items()
    }
    return replace(policy, values=values, least=policy.least.at[slot].set(0, mode="drop"))


def _empty_slots(table: PageTable, seqs: Array, max_seqs: int) -> Int[Array, " entries"]:
    """Slots that are empty and named once; `max_seqs` for every other entry."""
    slot = clean_slots(seqs, max_seqs, once=False)
    times = jnp.zeros(max_seqs, jnp.int32).at[slot].add(1, mode="drop")
    may = (rows_of(times, slot) == 1) & (rows_of(table.positions, slot, 1) == 0)
    return jnp.where(may, slot, max_seqs)


def _longest(
    index: PrefixIndex, chain: prefix_index.Chain, config: CacheConfig
) -> tuple[Array, list[Array], list[Array]]:
    """The longest run of blocks of which every group has the pages that the next token can see.

    Returns:
      Blocks of each entry; of each group the pages to install; and these, `[entries, most]`, `num_pages`
      past the last.
    """
    num_pages, entries, blocks = config.num_pages, *chain.nodes.shape
    held = rows_of(index.pages, chain.nodes, num_pages)
    number = jnp.arange(1, blocks + 1, dtype=jnp.int32)[None]
    fits = number <= chain.num_found[:, None]
    first, groups = 0, list(zip(config.groups, pages_per_node(config), strict=True))
    of_groups = []
    for group, each in groups:
        pages = held[..., first : first + each].reshape(entries, blocks * each)
        first += each
        # Pages without a gap that end with each page.
        place = jnp.arange(blocks * each, dtype=jnp.int32)[None]
        gap = jax.lax.cummax(jnp.where(pages < num_pages, -1, place), axis=1)
        run = (place - gap)[:, each - 1 :: each]
        seen = number * each
        if group.window is not None:
            seen = jnp.minimum(seen, _pages_of(group.window - 1, group.page_size))
        fits &= run >= seen
        of_groups.append((pages, run))
    matched = jnp.max(jnp.where(fits, number, 0), axis=1)
    installed, rows = [], []
    for (group, each), (pages, run) in zip(groups, of_groups, strict=True):
        most = blocks * each
        end = matched * each
        num = end
        if group.window is not None:
            most = max(1, min(most, _pages_of(group.window - 1 + config.rollback, group.page_size)))
            there = jnp.take_along_axis(run, jnp.maximum(matched - 1, 0)[:, None], axis=1)[:, 0]
            num = jnp.minimum(
                jnp.minimum(there, end), _pages_of(group.window - 1 + config.rollback, group.page_size)
            )
            num = jnp.where(matched > 0, num, 0)
        column = jnp.arange(most, dtype=jnp.int32)[None]
        at = (end - num)[:, None] + column
        row = jnp.take_along_axis(pages, jnp.minimum(at, pages.shape[1] - 1), axis=1)
        rows.append(jnp.where(column < num[:, None], row, num_pages))
        installed.append(num)
    return matched, installed, rows


def _pages_of(num_tokens: int, page_size: int) -> int:
    return -(-num_tokens // page_size)


def _install(
    table: PageTable, slot: Array, positions: Array, installed: list[Array], pages: list[Array], config
) -> tuple[PageTable, Array]:
    """Found pages in the rows of their new owners."""
    new, lengths = table.pages, table.lengths
    rows = table_rows(slot, config)
    for group, row, num, of_row in zip(config.groups, rows, installed, pages, strict=True):
        column = jnp.arange(of_row.shape[1], dtype=jnp.int32)[None]
        at = jnp.where(column < num[:, None], row[:, None], config.num_rows)
        new = new.at[at, column].set(of_row, mode="drop")
        lengths = lengths.at[row].set(num * group.page_size, mode="drop")
    table = replace(
        table,
        pages=new,
        lengths=lengths,
        positions=table.positions.at[slot].set(positions, mode="drop"),
    )
    flat = jnp.concatenate([of_row.reshape(-1) for of_row in pages])
    return share_found(table, flat)


# Recording ----------------------------------------------------------------------------------


@operation(results=lambda cache, *_: as_given(cache))
@jax.named_scope("jaxkv.record_prefix")
def _record(cache: KVCache, seqs: Array, tokens: Array, num_tokens: Array, salt: Array) -> KVCache:
    config, table = cache.config, cache.table
    blocks = _blocks(config, tokens)
    if blocks.shape[1] == 0:
        return cache
    slot = clean_slots(seqs, config.max_seqs, once=False)
    index = table.prefixes
    assert index is not None
    whole = jnp.minimum(rows_of(index.intact, slot), rows_of(table.positions, slot))
    counts = jnp.clip(jnp.minimum(num_tokens, whole) // blocks.shape[2], 0, blocks.shape[1])
    order = jnp.argsort(counts == 0, stable=True).astype(jnp.int32)

    def record_one(nth: Array, carry: tuple[PageTable, Array]) -> tuple[PageTable, Array]:
        table, num_recorded = carry
        entry = order[nth]
        pages = _pages_of_blocks(table, slot[entry], blocks.shape[1], config)
        table, more = _record_one(table, blocks[entry], salt[entry], counts[entry], pages)
        return table, num_recorded + more

    carry = control_flow.fori_loop(
        0, jnp.sum(counts > 0, dtype=jnp.int32), record_one, (table, jnp.zeros((), jnp.int32))
    )
    stats = count(cache.stats, cache.table, carry[0], prefix_pages_recorded=carry[1])
    return replace(cache, table=carry[0], stats=stats)


def _pages_of_blocks(
    table: PageTable, slot: Int[Array, ""], blocks: int, config: CacheConfig
) -> Int[Array, "blocks held"]:
    """The pages that a sequence has of each block, all groups beside each other; `num_pages` for none."""
    position = rows_of(table.positions, slot)
    of_groups = []
    for number, (group, each) in enumerate(zip(config.groups, pages_per_node(config), strict=True)):
        row = jnp.where(slot < config.max_seqs, number * config.max_seqs + slot, config.num_rows)
        column = jnp.arange(blocks * each, dtype=jnp.int32)
        full = rows_of(table.lengths, row) // group.page_size
        if group.window is not None:
            column -= (position - rows_of(table.lengths, row)) // group.page_size
            full = position // group.page_size - (position - rows_of(table.lengths, row)) // group.page_size
        inside = (column >= 0) & (column < full)
        column = jnp.where(inside, column, table.pages.shape[1])
        of_groups.append(rows_of(table.pages, (row, column), config.num_pages).reshape(blocks, each))
    return jnp.concatenate(of_groups, axis=1)


def _record_one(
    table: PageTable, blocks: Array, salt: Array, num_blocks: Array, pages: Array
) -> tuple[PageTable, Array]:
    """One sequence; returns how many of its pages were recorded."""
    index = table.prefixes
    assert index is not None
    num_pages = table.refcounts.shape[0]
    inside = jnp.arange(blocks.shape[0], dtype=jnp.int32) < num_blocks
    new = inside[:, None] & (pages < num_pages) & ~prefix_index.is_recorded(index, pages)
    pages = jnp.where(new, pages, num_pages)

    def look_up(table: PageTable) -> prefix_index.Chain:
        assert table.prefixes is not None
        return prefix_index.look_up(table.prefixes, blocks[None], salt[None], num_blocks[None])

    chain = look_up(table)
    last = jnp.max(jnp.where(jnp.any(new, axis=1), jnp.arange(1, blocks.shape[0] + 1, dtype=jnp.int32), 0))
    num_nodes = last - chain.num_found[0]

    def make_room(carry: tuple[PageTable, prefix_index.Chain]) -> tuple[PageTable, prefix_index.Chain]:
        table = reclaim_nodes(carry[0], num_nodes)
        return table, look_up(table)

    # Nodes run out where many stand only for others below them.
    short = (num_nodes > index.num_free_nodes) & (index.num_reclaimable > 0)
    table, chain = control_flow.only_if(short, make_room, (table, chain))
    assert table.prefixes is not None
    index, taken = prefix_index.extend_chain(table.prefixes, chain, blocks, salt, pages)
    table = hold(replace(table, prefixes=index), taken.reshape(-1))
    return table, jnp.sum(taken < num_pages, dtype=jnp.int32)


@operation(results=as_given)
def _clear(cache: KVCache) -> KVCache:
    table = clear_index(cache.table, prefix_index.empty_index(cache.config))
    return replace(cache, table=table, stats=count(cache.stats, cache.table, table))
