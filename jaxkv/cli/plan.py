"""`jaxkv plan`: its options and its output."""

import argparse
import json
import re
from collections import Counter
from collections.abc import Sequence

from jaxkv import catalog
from jaxkv.config import QUANTIZATIONS
from jaxkv.groups import decode_pages
from jaxkv.planner.kv_bytes import KV_BITS, SHORT, check_count, kv_cache_bytes
from jaxkv.planner.memory_plan import Device, Plan
from jaxkv.planner.page_size import PageSizeChoice, choose_page_size, expected_lengths
from jaxkv.planner.planning import plan
from jaxkv.planner.shape import ModelShape
from jaxkv.planner.suggest import suggestions
from jaxkv.units import format_bytes, format_mebibytes, parse_bytes

HELP = "whether a model fits a device, for how many sequences of what length"
_FLAGS = {
    "context": "--context",
    "concurrency": "--concurrency",
    "kv_dtype": "--kv-dtype",
    "weights_dtype": "--weights-dtype",
    "tensor_parallel": "--tp",
    "page_size": "--page-size",
    "memory_fraction": "--memory-fraction",
}

# Fields of a plan that need a device.
_OF_A_DEVICE = ("device", "memory", "usable", "headroom", "fits", "risk", "kv_capacity_tokens")
_OF_A_DEVICE += (
    "max_concurrency_ratio",
    "max_context",
    "max_concurrency",
    "decode_tokens_per_second_ceiling",
)


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Adds the options of `jaxkv plan`."""
    dtypes = "auto, f32, bf16, f16, fp8, int8, int4"
    command.epilog = "Exit status: 0, 1 if a model does not fit the device, 2 for a mistake."
    add = command.add_argument
    add(
        "model",
        nargs="?",
        metavar="MODEL",
        help="a config.json or its folder, a GGUF file, or a name: "
        f"{', '.join(catalog.names('models'))} (required without --compare)",
    )
    text = "two models side by side (default: one MODEL)"
    add("--compare", nargs=2, metavar=("A", "B"), help=text)
    where = command.add_mutually_exclusive_group()
    text = f"one of {', '.join(catalog.names('devices'))} (default: none, bytes are only counted)"
    where.add_argument("--device", metavar="NAME", help=text)
    text = "memory of each device, like 24GiB (default: that of --device)"
    where.add_argument("--memory", metavar="AMOUNT", help=text)
    add("--context", default="8192", metavar="N", help="tokens per sequence (default: 8192)")
    add("--concurrency", default="1", metavar="N", help="sequences at once (default: 1)")
    stored = ", ".join(["auto", *SHORT, *QUANTIZATIONS])
    text = f"how K and V are stored: {stored} (default: auto, the model's)"
    add("--kv-dtype", default="auto", metavar="DTYPE", help=text)
    text = f"how weights are stored: {dtypes} (default: auto, as in the files)"
    add("--weights-dtype", default="auto", metavar="DTYPE", help=text)
    add("--tp", default="1", metavar="N", help="devices for tensor parallelism (default: 1)")
    add("--page-size", default="16", metavar="N", help="tokens per page, or auto (default: 16)")
    text = "expected lengths, for --page-size auto (default: several up to --context)"
    add("--lengths", metavar="N,N,...", help=text)
    text = "share of the memory that may be used (default: 0.9)"
    add("--memory-fraction", type=float, default=0.9, metavar="F", help=text)
    add("--json", action="store_true", help="one JSON document (default: a table)")
    text = "print the formulas with the values in them (default: off)"
    add("--explain", action="store_true", help=text)


def run(options: argparse.Namespace) -> int:
    """Prints a plan; returns 1 if it does not fit."""
    if (not options.model) == (options.compare is None):
        raise ValueError("give one MODEL, or --compare A B")
    if options.compare and options.explain:
        raise ValueError("--explain is for one MODEL")
    shapes = [ModelShape.from_config(name) for name in options.compare or [options.model]]
    choice = _page_size(options)
    device = _device(options)
    plans = [_plan(shape, device, options, choice) for shape in shapes]
    if options.json:
        documents = [_document(made, device, choice) for made in plans]
        print(json.dumps(documents if options.compare else documents[0], indent=1))
    elif options.compare:
        print(_table([_column(made, device is not None) for made in plans]))
    else:
        _print_plan(plans[0], device is not None, choice, options)
    return 0 if device is None or all(made.fits for made in plans) else 1


def _number(text: str, name: str) -> int:
    # Thousands may be separated: 8192, 8,192 or 8_192.
    if not re.fullmatch(r"-?(\d{1,3}([,_]\d{3})+|\d{1,18})", text.strip()):
        raise ValueError(f"{name} {text!r} is not a number")
    return int(text.replace(",", "").replace("_", ""))


def _page_size(options: argparse.Namespace) -> PageSizeChoice | int:
    if options.page_size != "auto":
        if options.lengths:
            raise ValueError("--lengths is for --page-size auto")
        return _number(options.page_size, "--page-size")
    if options.lengths:
        return choose_page_size([_length(length, "--lengths") for length in options.lengths.split(",")])
    return choose_page_size(expected_lengths(_length(options.context, "--context")))


def _length(text: str, name: str) -> int:
    tokens = _number(text, name)
    check_count(name, tokens)
    return tokens


def _device(options: argparse.Namespace) -> Device | None:
    if options.memory is not None:
        return Device(options.memory, parse_bytes(options.memory))
    return Device.named(options.device) if options.device is not None else None


def _plan(shape: ModelShape, device: Device | None, options, choice: PageSizeChoice | int) -> Plan:
    counts = dict(
        context=_number(options.context, "--context"),
        concurrency=_number(options.concurrency, "--concurrency"),
        tensor_parallel=_number(options.tp, "--tp"),
        page_size=choice.page_size if isinstance(choice, PageSizeChoice) else choice,
    )
    try:
        return plan(
            shape,
            device or Device("no device given", 2**60),
            **counts,
            kv_dtype=options.kv_dtype,
            weights_dtype=options.weights_dtype,
            memory_fraction=options.memory_fraction,
        )
    except ValueError as error:
        raise ValueError(_with_options(str(error))) from None


def _with_options(message: str) -> str:
    """A message of `plan` with its argument names replaced by the command's options."""
    names = "|".join(_FLAGS)
    return re.sub(rf"\b({names})\b", lambda found: _FLAGS[found[0]], message)


def _document(made: Plan, device: Device | None, choice: PageSizeChoice | int) -> dict[str, object]:
    document = made.as_dict()
    if isinstance(choice, PageSizeChoice):
        document["page_size_reason"] = choice.reason
    if device is None:
        for name in _OF_A_DEVICE:
            del document[name]
        return document
    change = [{"text": found.text, "change": found.change} for found in suggestions(made)]
    return {**document, "suggestions": change}


def _print_plan(made: Plan, has_device: bool, choice: PageSizeChoice | int, options) -> None:
    print(_table([_column(made, has_device)]))
    if has_device:
        print(f"\nGPU KV cache size: {made.kv_capacity_tokens:,} tokens")
        print(
            f"Maximum concurrency for {made.context:,} tokens per request: {made.max_concurrency_ratio:.2f}x"
        )
    for note in made.notes:
        print(f"\nnote: {note}")
    if isinstance(choice, PageSizeChoice):
        print(f"\n{_page_sizes(choice, made)}")
    if options.explain:
        print(f"\n{explain(made)}")
        print(f"\n{made.cache_config or 'no CacheConfig: jaxkv has no such storage'}")
    if has_device and not made.fits:
        print(f"\nIt does not fit: {format_mebibytes(-made.headroom)} too much. What would help:")
        found = suggestions(made)
        for suggestion in found:
            flags = " ".join(f"{_FLAGS[name]} {value}" for name, value in suggestion.change.items())
            print(f"  {suggestion.text}  ({flags})")
        if not found:
            print("  only a smaller model or a larger device")


def _column(made: Plan, has_device: bool) -> dict[str, str]:
    """The rows of one model, by name."""
    shape, kv = made.shape, made.kv
    few = shape.num_parameters < 1_000_000
    billions = f"{shape.num_parameters:,}" if few else f"{shape.num_parameters / 1e9:.3g} billion"
    if shape.routed_parameters:
        active = f"{shape.active_parameters:,}" if few else f"{shape.active_parameters / 1e9:.3g}"
        billions += f", {active} of them active"
    rows = {
        "model": shape.name,
        "parameters": billions,
        "K and V per token and layer": f"{shape.elements_per_token:,} elements in {made.kv_dtype}",
        "layers": _layers(shape),
        "sequences x context": f"{made.concurrency:,} x {made.context:,} tokens",
        "KV exact": format_mebibytes(kv.exact)
        + (f" + {format_mebibytes(kv.scales)} of scales" if kv.scales else ""),
        f"KV in pages of {made.page_size}": format_mebibytes(kv.paged),
        "KV reserved": f"{format_mebibytes(kv.reserved)}, {made.pages:,} pages" + _groups(made),
    }
    if made.tensor_parallel > 1:
        rows["devices"] = f"{made.tensor_parallel}; bytes are per device"
    rows["weights"] = f"{format_mebibytes(made.weights)} {_stored(made)}"
    if made.states:
        rows["states of fixed size"] = format_mebibytes(made.states)
    if not has_device:
        return rows
    rows |= {
        "activations": format_mebibytes(made.activations),
        "tables, overhead": f"{format_mebibytes(made.tables)}, {format_mebibytes(made.overhead)}",
        "needed": format_mebibytes(made.needed),
        "usable": f"{format_mebibytes(made.usable)}, {100 * made.memory_fraction:.0f}% of {made.device.name}",
        "headroom": format_mebibytes(made.headroom),
        "fits": f"yes, risk: {made.risk}" if made.fits else "no",
        "longest context": f"{made.max_context:,} tokens"
        + (f", all {_reach(shape)}" if made.max_context == shape.max_context else ""),
        "most sequences": f"{made.max_concurrency:,}",
    }
    if made.decode_tokens_per_second is not None and made.fits:
        rows["decode at most"] = f"{made.decode_tokens_per_second:,.0f} tokens/s, by memory bandwidth"
    return rows


def _reach(shape: ModelShape) -> str:
    return "its rotary scaling reaches" if shape.is_extended else "it was trained on"


def _layers(shape: ModelShape) -> str:
    windowed = [window for window in shape.windows if window is not None]
    if not windowed:
        return str(shape.num_layers)
    return f"{shape.num_layers}, {len(windowed)} of them with a window of {max(windowed):,}"


def _groups(made: Plan) -> str:
    if len(made.groups) < 2:
        return ""
    return f" for {len(made.groups)} groups of {made.layers_per_page} layers"


def _table(columns: Sequence[dict[str, str]]) -> str:
    names = list(dict.fromkeys(name for column in columns for name in column))
    widths = [max(map(len, names)), *(max(map(len, column.values())) for column in columns)]
    rows = ([name, *(column.get(name, "-") for column in columns)] for name in names)
    lines = ("  ".join(f"{cell:<{width}}" for cell, width in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def _page_sizes(choice: PageSizeChoice, made: Plan) -> str:
    shape = made.shape
    token = kv_cache_bytes(shape, 1, kv_dtype=made.kv_dtype, page_size=1).paged
    lines = [
        f"page size {choice.page_size}: {choice.reason}",
        "  size   pages    empty slots   their bytes   table bytes",
    ]
    lines += [
        f"{cost.page_size:>6}{cost.pages:>8.1f}{cost.wasted_tokens:>9.1f} {100 * cost.waste:>4.1f}%"
        f"{format_bytes(cost.wasted_tokens * token, 'KiB'):>14}{format_bytes(cost.table_bytes, 'KiB'):>14}"
        for cost in choice.costs
    ]
    return "\n".join(lines)


def explain(made: Plan) -> str:
    """The formulas of a plan with its values, one per line."""
    shape, kv, devices = made.shape, made.kv, made.tensor_parallel
    kinds = {window: shape.windows.count(window) for window in dict.fromkeys(shape.windows)}
    kept = " + ".join(
        f"{layers} layers x {made.context if window is None else min(made.context, window):,} tokens"
        for window, layers in kinds.items()
    )
    heads = made.kv_heads_per_device
    latent = f"{shape.head_dim} of the latent vector"
    elements = latent if shape.is_latent else f"2 x {heads} KV heads x {shape.head_dim} head_dim"
    token = f"{elements} x {KV_BITS[made.kv_dtype] / 8:g} bytes"
    q, k = shape.num_q_heads * shape.head_dim, shape.num_kv_heads * shape.head_dim
    prefilled = min(made.prefill_chunk, made.context * made.concurrency)
    scales = f" + {kv.scales:,} of scales" if kv.scales else ""
    lines = [
        f"KV exact = {made.concurrency:,} x ({kept}) x {token}{scales}",
        f"         = {kv.exact:,} bytes" + (f" on each of {devices} devices" if devices > 1 else ""),
        f"KV reserved = {made.pages:,} pages x {made.page_size} tokens x {made.layers_per_page} layers x "
        f"{token}{' and scales' if kv.scales else ''}",
        f"            = {kv.reserved:,} bytes",
        *_pages(made),
        f"weights = {_weights(made)} / {devices} devices = {made.weights:,} bytes",
        f"activations = {prefilled:,} tokens of a prefill step x 2 bytes x "
        f"(4 x {shape.hidden_size:,} + ({q:,} Q + 2 x {k:,} K, V + 2 x {shape.mlp_width:,} MLP) / {devices})",
        f"              + {made.concurrency:,} x {shape.vocab_size:,} logits x 4 bytes",
        f"            = {made.activations:,} bytes",
        *([f"states = {made.states:,} bytes of layers without K and V, in float32"] if made.states else []),
        f"tables = {made.tables:,} bytes of page table, refcounts and free stack",
        f"overhead = {made.overhead:,} bytes for the driver, compiled programs and libraries (assumed)",
    ]
    return "\n".join(lines)


def _pages(made: Plan) -> list[str]:
    """The pages of a cache with layer groups, by kind of group."""
    config = made.cache_config
    if config is None or config.layer_windows is None:
        return []
    each = " + ".join(
        f"{count} x {decode_pages(config, kind, made.context):,} pages of a "
        f"{'full group' if kind.window is None else f'group with window {kind.window:,}'}"
        for kind, count in Counter(group.shape for group in made.groups).items()
    )
    chunk = config.pages_for_chunk(made.context)
    more = f" + {chunk:,} for a prefill chunk of {config.max_chunk:,} tokens" if chunk else ""
    return [f"pages = {made.concurrency:,} x ({each}){more}"]


def _weights(made: Plan) -> str:
    shape, (embedding, routed, rest) = made.shape, made.weight_bits
    if made.weights_dtype == "stored" and shape.stored_bytes is not None:
        return f"{shape.stored_bytes:,} bytes of files"
    kinds = {
        "embeddings": (shape.embedding_parameters, embedding),
        "of experts": (shape.routed_parameters, routed),
        "others": (shape.other_parameters, rest),
    }
    parts = (f"{count:,} {kind} x {bits / 8:g}" for kind, (count, bits) in kinds.items() if count)
    return f"({' + '.join(parts)}) bytes"


def _stored(made: Plan) -> str:
    if made.weights_dtype != "stored":
        return f"in {made.weights_dtype}"
    if made.shape.stored_bytes:
        return "as stored"
    bits = made.shape.quantized_bits
    return f"in {made.shape.quantization}" if bits is None else f"in {bits:g} bits each, scales included"
