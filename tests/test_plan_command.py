"""`jaxkv plan`: what it prints, its exit codes, and how it takes bad input."""

import json
import shlex

import pytest

from jaxkv.cli import main
from tests.test_planner import LLAMA


def run(capsys, command: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `jaxkv plan ...`."""
    try:
        code = main(["plan", *shlex.split(command)])
    except SystemExit as stop:
        code = int(stop.code or 0)
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def rows(text: str) -> dict[str, str]:
    """The table's rows by name."""
    pairs = (line.split("  ", 1) for line in text.splitlines() if "  " in line)
    return {name.strip(): value.strip() for name, value in pairs}


def test_a_model_that_fits_says_how_much_and_how_many(capsys):
    code, out, _ = run(capsys, "llama-3.1-8b --device H100 --concurrency 4")
    table = rows(out)
    assert code == 0
    assert table["KV exact"] == "4,096 MiB"
    assert table["fits"] == "yes, risk: low"
    assert "GPU KV cache size: " in out
    assert "Maximum concurrency for 8,192 tokens per request: " in out


@pytest.mark.parametrize(
    ("model", "exact"), [("gemma-2-9b", "2,016 MiB"), ("gemma-3-1b", "43 MiB"), ("gpt-oss-20b", "195 MiB")]
)
def test_without_a_device_only_bytes_are_counted(capsys, model, exact):
    code, out, _ = run(capsys, f"{model} --kv-dtype bf16")
    assert (code, rows(out)["KV exact"]) == (0, exact)
    assert "fits" not in rows(out)


def test_a_70b_on_one_h100_does_not_fit_and_every_suggestion_works(capsys):
    code, out, _ = run(capsys, "llama-3.1-70b --device H100")
    assert code == 1
    assert "It does not fit" in out
    flags = [
        line.rsplit("(", 1)[1].rstrip(")")
        for line in out.splitlines()
        if line.startswith("  ") and "(--" in line
    ]
    assert "--tp 2" in flags
    for flag in flags:
        assert run(capsys, f"llama-3.1-70b --device H100 {flag}")[0] == 0, flag


def test_json_is_one_document_with_the_suggestions(capsys):
    code, out, _ = run(capsys, "llama-2-7b --memory 8GiB --json")
    document = json.loads(out)
    assert (code, document["fits"], document["kv"]["exact"]) == (1, False, 4 * 2**30)
    assert document["suggestions"]
    parts = ("weights", "tables", "activations", "overhead")
    assert document["needed"] == document["kv"]["reserved"] + sum(document[part] for part in parts)
    document = json.loads(run(capsys, "llama-2-7b --json")[1])
    assert "fits" not in document
    groups = json.loads(run(capsys, "gpt-oss-20b --json")[1])["groups"]
    assert [(len(group["layers"]), group["window"]) for group in groups] == [(12, None), (12, 128)]


def test_a_device_with_no_room_at_all_is_no_error(capsys):
    assert run(capsys, "llama-2-7b --memory 1 --json")[0] == 1
    assert run(capsys, "llama-2-7b --memory-fraction 1e-300 --memory 24G")[0] == 1


def test_two_models_side_by_side(capsys):
    code, out, _ = run(capsys, "--compare llama-2-7b llama-3.1-8b --memory 24GiB --context 4096")
    assert code == 0
    assert rows(out)["model"].split() == ["llama-2-7b", "llama-3.1-8b"]
    assert "2,048 MiB" in rows(out)["KV exact"]
    assert len(json.loads(run(capsys, "--compare llama-2-7b llama-3.1-8b --json")[1])) == 2


def test_the_formula_is_explained_with_its_values(capsys):
    _, out, _ = run(capsys, "llama-3.1-8b --explain --kv-dtype fp8")
    assert "1 x (32 layers x 8,192 tokens) x 2 x 8 KV heads x 128 head_dim x 1 bytes" in out
    assert "536,870,912 bytes" in out
    assert "quantization='fp8'" in out
    assert "512 pages x 16 tokens x 32 layers" in out
    assert "12 layers x 128 tokens + 12 layers x 8,192 tokens" in run(capsys, "gpt-oss-20b --explain")[1]
    out = run(capsys, "gemma-3-1b --explain --concurrency 2")[1]
    assert rows(out)["KV reserved"].endswith("1,612 pages for 7 groups of 4 layers")
    assert "KV reserved = 1,612 pages x 16 tokens x 4 layers x " in out
    each = "1 x 512 pages of a full group + 6 x 33 pages of a group with window 512"
    assert f"pages = 2 x ({each}) + 192 for a prefill chunk of 512 tokens" in out
    assert "576 of the latent vector" in run(capsys, "deepseek-v3 --explain")[1]


def test_the_page_size_can_be_chosen_from_lengths(capsys):
    _, out, _ = run(capsys, "llama-3.1-8b --page-size auto --lengths 100,200,300")
    assert "page size 16: lengths of 200 tokens on average: 16 by rule" in out
    assert "KV in pages of 64" in run(capsys, "llama-3.1-8b --page-size auto --context 10000")[1]


@pytest.mark.parametrize(
    ("command", "complaint"),
    [
        ("llama-2-7b --memory '12 parsecs'", "'12 parsecs' is not an amount of memory"),
        ("llama-2-7b --memory -1", "'-1' is not an amount of memory"),
        ("llama-2-7b --memory 0GiB", "'0GiB' is not an amount"),
        ("llama-2-7b --device H900", "'H900' is not one of the known devices"),
        ("llama-2-7b --device H100 --memory 1GiB", "not allowed with"),
        ("llama-2-7b --context many", "--context 'many' is not a number"),
        ("llama-2-7b --context 0", "--context=0 must be a positive integer"),
        ("llama-2-7b --tp 3", "--tp=3 must divide the 32 query heads"),
        ("llama-2-7b --kv-dtype f8", "--kv-dtype='f8' is not known"),
        ("llama-2-7b --page-size 0", "--page-size=0 must be"),
        ("llama-2-7b --page-size auto --context 0", "--context=0 must be a positive integer"),
        ("llama-2-7b --page-size auto --lengths 0", "--lengths=0 must be a positive integer"),
        ("llama-2-7b --lengths 5", "--lengths is for --page-size auto"),
        ("llama-2-7b --page-size auto --lengths 5,x", "--lengths 'x' is not a number"),
        ("llama-2-7b --memory-fraction 2", "--memory-fraction=2.0"),
        ("llama-2-7b --memory-fraction nan", "--memory-fraction=nan"),
        ("nobody-8b", "'nobody-8b' is not one of the known models"),
        ("", "give one MODEL, or --compare A B"),
        ("llama-2-7b --compare a b", "give one MODEL, or --compare A B"),
        ("''  --memory 1GiB", "give one MODEL, or --compare A B"),
        ("--compare llama-2-7b llama-2-13b --explain", "--explain is for one MODEL"),
        ("llama-2-7b --context 1,2,3", "--context '1,2,3' is not a number"),
        ("llama-2-7b --context 8k", "--context '8k' is not a number"),
        ("gemma-3-1b --memory 100TiB --context 32768 --concurrency 40000", "--context x --concurrency takes"),
        ("gemma-3-1b --json --context 32768 --concurrency 40000", "--context x --concurrency takes"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, command, complaint):
    code, out, err = run(capsys, command)
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("config", "complaint"),
    [
        ("{not json", "is not JSON"),
        ("[]", "must hold a JSON object"),
        ("{}", "field 'model_type' is missing"),
        (json.dumps({k: v for k, v in LLAMA.items() if k != "vocab_size"}), "field 'vocab_size' is missing"),
        (json.dumps(LLAMA | {"num_hidden_layers": -4}), "num_hidden_layers must be an integer from 1"),
        (json.dumps(LLAMA | {"hidden_size": 10**12}), "hidden_size must be an integer from 1 to 131072"),
        (json.dumps(LLAMA | {"model_type": "rwkv"}), "model_type 'rwkv' is not known"),
        (json.dumps(LLAMA | {"text_config": {"model_type": "rwkv"}}), "model_type 'rwkv' is not known"),
    ],
)
def test_a_bad_config_is_one_line_and_exit_code_2(capsys, tmp_path, config, complaint):
    (tmp_path / "config.json").write_text(config)
    code, out, err = run(capsys, str(tmp_path))
    assert (code, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


def test_weights_kept_in_an_unknown_way_are_planned_with_the_option_that_the_error_names(capsys, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(LLAMA | {"quantization_config": {"quant_method": "awq"}})
    )
    code, _, err = run(capsys, str(tmp_path))
    assert code == 2 and "say how with --weights-dtype" in err
    assert run(capsys, f"{tmp_path} --weights-dtype int4")[0] == 0


def test_a_context_that_rotary_scaling_extends_is_not_called_trained_on(capsys, tmp_path):
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 2048}
    for positions in (2048, 8192):
        config = LLAMA | {"max_position_embeddings": positions, "rope_scaling": yarn}
        (tmp_path / "config.json").write_text(json.dumps(config))
        _, out, _ = run(capsys, f"{tmp_path} --memory 100GiB --context 9000")
        assert rows(out)["longest context"] == "8,192 tokens, all its rotary scaling reaches"
        assert "note: its rotary scaling reaches 8,192 tokens" in out
