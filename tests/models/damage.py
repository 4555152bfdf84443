"""Damages checkpoints in ways that a reader can notice: `damaged(seed, folder)` writes one.

Values in a weight, a token or a scalar such as `rope_theta` are not changed, except to NaN: the formats have
no checksums, so that any other value reads as the right one.
"""

import json
import random
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import gguf
import numpy as np

from tests.models import gguf_files
from tests.models.gguf_files import Types

FIXTURES = Path(__file__).parents[1] / "fixtures"
FAMILIES = FIXTURES / "families"
FOLDERS = {
    folder.name: folder
    for folder in (
        *(FIXTURES / name for name in ("llama_tied_sharded", "llama_untied", "qwen2_bf16", "mistral_window")),
        *(FAMILIES / name for name in ("gemma3_nested", "gpt_oss_mxfp4", "mixtral", "phi3", "cohere2")),
    )
}
OF_GGUF = ("llama_untied", "qwen2_bf16", "quantized")
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
SIZES = (
    "hidden_size", "num_hidden_layers", "vocab_size", "head_dim", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "num_local_experts",
)  # fmt: skip
HUGE = (2**31, 2**40, 2**62, 2**63, 2**64 - 1)


def damaged(seed: int, folder: Path) -> tuple[Path, str, str, bool]:
    """Writes a damaged checkpoint into an empty folder.

    Returns:
      Its path, the name of the checkpoint that it was, the damage in words, and whether a reader must refuse
      it; else it may also read it, as the checkpoint that it was.
    """
    rng = random.Random(seed)
    if seed % 2:
        name = rng.choice(OF_GGUF)
        path = folder / "model.gguf"
        path.write_bytes(whole_gguf(name))
        damage = rng.choice(GGUF_DAMAGES)
        must = damage(path, rng)
    else:
        name = rng.choice(sorted(FOLDERS))
        path = folder / "model"
        shutil.copytree(FOLDERS[name], path, ignore=shutil.ignore_patterns("*.npz"))
        damage = rng.choice([one for one in FOLDER_DAMAGES if one not in OF_INDEX or (path / INDEX).exists()])
        must = damage(path, rng)
    return path, name, damage.__name__, must


@cache
def whole_gguf(name: str) -> bytes:
    """A fixture as a GGUF file; "quantized" has matrices of Q8_0."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.gguf"
        if name != "quantized":
            return gguf_files.write_checkpoint(path, FOLDERS[name]).read_bytes()
        raw, tensors = gguf_files.convert(FOLDERS["llama_untied"])
        types = {
            one: Types.Q8_0 for one in tensors if tensors[one].ndim == 2 and not tensors[one].shape[1] % 32
        }
        tensors = {one: gguf.quantize(tensors[one], types.get(one, Types.F32)) for one in tensors}
        fields = gguf_files.metadata(raw) | gguf_files.TOKENIZER
        return gguf_files.write(path, fields, tensors, types).read_bytes()


def cut_off(path: Path, rng: random.Random) -> bool:
    whole = path.read_bytes()
    # The last tensor is followed by at most 31 bytes of padding.
    path.write_bytes(whole[: rng.randrange(len(whole) - 32)])
    return True


def cut_off_in_the_header(path: Path, rng: random.Random) -> bool:
    path.write_bytes(path.read_bytes()[: rng.randrange(gguf.GGUFReader(path).data_offset)])
    return True


def _tensor_part(part: int, value: Callable[[random.Random, np.ndarray], object]):
    def change(path: Path, rng: random.Random) -> None:
        reader = gguf.GGUFReader(path, "r+")
        target = rng.choice(reader.tensors).field.parts[part]
        target[...] = value(rng, target)
        reader.data.flush()

    return change


def tensor_elsewhere(path: Path, rng: random.Random) -> bool:
    step = rng.choice([-4096, -32, -1, 1, 32, 4096, *HUGE])
    _tensor_part(5, lambda rng, was: np.uint64((int(was[0]) + step) % 2**64))(path, rng)
    return True


def tensors_exchanged(path: Path, rng: random.Random) -> bool:
    """Two tensors' offsets, so that each has the other's data."""
    reader = gguf.GGUFReader(path, "r+")
    first, second = (one.field.parts[5] for one in rng.sample(reader.tensors, 2))
    first[...], second[...] = second.copy(), first.copy()
    reader.data.flush()
    return True


def tensor_misshapen(path: Path, rng: random.Random) -> bool:
    reader = gguf.GGUFReader(path, "r+")
    matrices = [one.field.parts[3] for one in reader.tensors if len(one.shape) == 2]
    target = rng.choice([one for one in matrices if one[0] != one[1]])
    changed = rng.choice([target[::-1].copy(), target * 2, target * 0, [rng.choice(HUGE), target[1]]])
    target[...] = np.asarray(changed, np.uint64)
    reader.data.flush()
    return True


def tensor_of_other_dimensions(path: Path, rng: random.Random) -> bool:
    _tensor_part(
        2, lambda rng, was: rng.choice([n for n in (0, 1, 2, 3, 4, 5, 255, 2**32 - 1) if n != was[0]])
    )(path, rng)
    return True


def tensor_of_another_type(path: Path, rng: random.Random) -> bool:
    # BF16 for F16 could not be noticed; there is no F16 here.
    _tensor_part(4, lambda rng, was: rng.choice([n for n in range(50) if n != was[0]]))(path, rng)
    return True


def count_of_the_header(path: Path, rng: random.Random) -> bool:
    reader = gguf.GGUFReader(path, "r+")
    target = reader.fields[rng.choice(["GGUF.tensor_count", "GGUF.kv_count"])].parts[0]
    target[...] = rng.choice([0, int(target[0]) - 1, int(target[0]) + 1, *HUGE])
    reader.data.flush()
    return True


def length_of_a_field(path: Path, rng: random.Random) -> bool:
    """Of its name, or of the text or the list that it holds."""
    reader = gguf.GGUFReader(path, "r+")
    field = rng.choice([one for one in reader.fields.values() if not one.name.startswith("GGUF.")])
    inner = {gguf.GGUFValueType.ARRAY: 4, gguf.GGUFValueType.STRING: 3}.get(field.types[0], 0)
    target = field.parts[rng.choice([0, inner])]
    target[...] = rng.choice([int(target[0]) + rng.randint(1, 40), *HUGE])
    reader.data.flush()
    return True


def type_of_a_list(path: Path, rng: random.Random) -> bool:
    """Its elements become bytes, lists or of no type, and their number huge."""
    reader = gguf.GGUFReader(path, "r+")
    lists = [one for one in reader.fields.values() if one.types[0] == gguf.GGUFValueType.ARRAY]
    field = rng.choice(lists)
    field.parts[3][...] = rng.choice([0, 1, 7, 9, 10, 12, 13, 2**32 - 1])
    field.parts[4][...] = rng.choice([int(field.parts[4][0]), *HUGE])
    reader.data.flush()
    return True


def bytes_of_the_header(path: Path, rng: random.Random) -> bool:
    """May hit a name or a value that nothing else contradicts."""
    whole = bytearray(path.read_bytes())
    end = gguf.GGUFReader(path).data_offset
    for _ in range(rng.randint(1, 4)):
        whole[rng.randrange(4, end)] = rng.randrange(256)
    path.write_bytes(whole)
    return False


def not_a_number(path: Path, rng: random.Random) -> bool:
    """A weight, or the scale of a block."""
    reader = gguf.GGUFReader(path, "r+")
    tensor = rng.choice(reader.tensors)
    bad = rng.choice([np.nan, np.inf, -np.inf])
    flat = tensor.data.reshape(-1)
    if tensor.tensor_type == Types.Q8_0:
        block = rng.randrange(len(flat) // 34) * 34
        flat[block : block + 2] = np.asarray([bad], np.float16).view(np.uint8)
    else:
        flat[rng.randrange(len(flat))] = bad
    reader.data.flush()
    return True


def sizes_that_contradict(path: Path, rng: random.Random) -> bool:
    """A size of the header that the tensors do not have."""
    reader = gguf.GGUFReader(path, "r+")
    names = ("block_count", "embedding_length", "feed_forward_length", "attention.head_count",
             "attention.head_count_kv", "attention.key_length", "attention.value_length")  # fmt: skip
    name = rng.choice([one for one in reader.fields if one.partition(".")[2] in names])
    target = reader.fields[name].parts[-1]
    was = int(target[0])
    target[...] = rng.choice([0, was * 2, was + 1, 2**16, 2**31, 2**32 - 1])
    reader.data.flush()
    return True


def weights_cut_off(path: Path, rng: random.Random) -> bool:
    file = rng.choice(sorted(path.glob("*.safetensors")))
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    return True


def weights_bytes_of_the_header(path: Path, rng: random.Random) -> bool:
    file = rng.choice(sorted(path.glob("*.safetensors")))
    whole = bytearray(file.read_bytes())
    end = 8 + int.from_bytes(whole[:8], "little")
    for _ in range(rng.randint(1, 4)):
        whole[rng.randrange(end)] = rng.randrange(256)
    file.write_bytes(whole)
    return False


def weights_of_another_header(path: Path, rng: random.Random) -> bool:
    """A tensor's offsets, shape, dtype or name; or the length of the whole."""
    file = rng.choice(sorted(path.glob("*.safetensors")))
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header, data = json.loads(whole[8 : 8 + length]), whole[8 + length :]
    name = rng.choice([one for one in header if one != "__metadata__"])
    tensor = header[name]
    start, end = tensor["data_offsets"]
    changes = [
        {"data_offsets": [start, end + 4]},
        {"data_offsets": [start + 4, end + 4]},
        {"data_offsets": [end, start]},
        {"data_offsets": [0, 2**62]},
        {"data_offsets": [-8, end]},
        {"data_offsets": None},
        {"shape": [*tensor["shape"], 2]},
        {"shape": [2**40, 2**40]},
        {"shape": [-1, *tensor["shape"][1:]]},
        {"shape": "all"},
        {"shape": []},
        *({"dtype": other} for other in ("I32", "I64", "BOOL", "F8_E4M3", "C64", "F128", "", None, 7)),
    ]
    if len(set(tensor["shape"])) == 2 and len(tensor["shape"]) == 2:
        changes += [{"shape": tensor["shape"][::-1]}] * 3
    choice = rng.choice(["change"] * 4 + ["name", "missing", "length"])
    if choice == "change":
        header[name] = tensor | rng.choice(changes)
    if choice in ("name", "missing"):
        del header[name]
    if choice == "name":
        header[name + rng.choice(["s", " ", "\n", "\x00", "x" * 500])] = tensor
    text = json.dumps(header).encode()
    size = len(text) if choice != "length" else rng.choice([0, 1, len(text) - 1, len(text) + 1, *HUGE])
    file.write_bytes(size.to_bytes(8, "little") + text + data)
    return True


def weights_not_a_number(path: Path, rng: random.Random) -> bool:
    file = rng.choice(sorted(path.glob("*.safetensors")))
    whole = bytearray(file.read_bytes())
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    name = rng.choice([one for one in header if one != "__metadata__" and header[one]["dtype"] != "U8"])
    start, end = (8 + length + offset for offset in header[name]["data_offsets"])
    bad = {"F32": b"\0\0\xc0\x7f", "BF16": b"\xc0\x7f", "F16": b"\0\x7e"}[header[name]["dtype"]]
    at = start + rng.randrange((end - start) // len(bad)) * len(bad)
    whole[at : at + len(bad)] = bad
    file.write_bytes(whole)
    return True


def weights_missing(path: Path, rng: random.Random) -> bool:
    rng.choice(sorted(path.glob("*.safetensors"))).unlink()
    return True


def weights_that_are_a_folder(path: Path, rng: random.Random) -> bool:
    file = rng.choice(sorted(path.glob("*.safetensors")))
    file.unlink()
    file.mkdir()
    return True


def config_that_contradicts(path: Path, rng: random.Random) -> bool:
    """Sizes that the tensors do not have, or a feature that is not built."""
    raw = json.loads((path / "config.json").read_text())
    part = raw.get("text_config", raw)
    sizes = [one for one in SIZES if one in part]
    choices = [
        (one, value) for one in sizes for value in (0, -1, part[one] * 2, part[one] + 2, 2**16, 2**24, "32")
    ]
    choices += [("hidden_act", "no such function"), ("model_type", "nothing"), ("model_type", None),
                ("rope_parameters", {"rope_type": "new", "factor": 2.0}), ("rope_scaling", [1]),
                ("quantization_config", {"quant_method": "fp8"})]  # fmt: skip
    name, value = rng.choice(choices)
    part[name] = value
    (path / "config.json").write_text(json.dumps(raw))
    return True


def config_that_is_none(path: Path, rng: random.Random) -> bool:
    file = path / "config.json"
    whole = file.read_bytes()
    texts = [
        b"",
        b"[]",
        b"null",
        b"\xff\xfe\x00",
        b"{" * 10**5,
        whole[: len(whole) // 2],
        b'{"model_type": 1e999}',
    ]
    file.write_bytes(rng.choice(texts))
    return True


def index_of_something_else(path: Path, rng: random.Random) -> bool:
    file = path / INDEX
    raw = json.loads(file.read_text())
    name = rng.choice(sorted(raw["weight_map"]))
    names = ["../" + raw["weight_map"][name], "/etc/passwd", "none.safetensors", "", ".", "config.json", None]
    names += [7, "x\0y", "y" * 5000]
    others = sorted(set(raw["weight_map"].values()) - {raw["weight_map"][name]})
    raw["weight_map"][name] = rng.choice([*names, *others])
    if rng.random() < 0.2:
        raw["weight_map"] = rng.choice([None, [], 5, {}, "all", {name: others[0]}])
    file.write_text(rng.choice(["[]", "{", "{}", ""]) if rng.random() < 0.2 else json.dumps(raw))
    return True


GGUF_DAMAGES = (
    cut_off, cut_off_in_the_header, tensor_elsewhere, tensors_exchanged, tensor_misshapen,
    tensor_of_other_dimensions, tensor_of_another_type, count_of_the_header, length_of_a_field,
    type_of_a_list, bytes_of_the_header, bytes_of_the_header, not_a_number, sizes_that_contradict,
)  # fmt: skip
OF_INDEX = (index_of_something_else,)
FOLDER_DAMAGES = (
    weights_cut_off, weights_bytes_of_the_header, weights_bytes_of_the_header, weights_of_another_header,
    weights_of_another_header, weights_not_a_number, weights_missing, weights_that_are_a_folder,
    config_that_contradicts, config_that_contradicts, config_that_is_none, *OF_INDEX, *OF_INDEX,
)  # fmt: skip
