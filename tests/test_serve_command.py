"""`jaxkv serve`: requests as JSON lines in, events as JSON lines out, metrics, and how it ends."""

import io
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import urllib.request
from contextlib import contextmanager
from dataclasses import replace

import jax.numpy as jnp
import pytest

import jaxkv
from jaxkv import Finish, serving
from jaxkv.cli import main
from jaxkv.cli.command_line import parser
from jaxkv.cli.request_lines import fields_of
from jaxkv.cli.serve import serving_config
from jaxkv.models import load
from jaxkv.serving import Event, ServingConfig, ServingMetrics, ServingStats
from tests import command_models

# One server, compiled once.
SMALL = ("--slots", "2", "--page-size", "4", "--max-tokens", "64")
SIZES = (*SMALL, "--token-budget", "2", "--no-prefix-cache", "--log-probs")
SECONDS = 120


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory) -> str:
    return command_models.tiny(tmp_path_factory.mktemp("models"))


@pytest.fixture
def answers(capsys, tiny_model, tmp_path):
    """Serves lines, and returns the events."""

    def of(*lines: dict | str | bytes, options=(), sizes=SIZES) -> list[dict]:
        written = [json.dumps(line) if isinstance(line, dict) else line for line in lines]
        path = tmp_path / "requests.jsonl"
        path.write_bytes(b"\n".join(line.encode() if isinstance(line, str) else line for line in written))
        assert main(["serve", "--model", tiny_model, "--requests", str(path), *sizes, *options]) == 0
        return [json.loads(line) for line in capsys.readouterr().out.splitlines()]

    return of


def texts(events: list[dict]) -> dict:
    """The whole text of each sample, by id and number."""
    joined = {}
    for event in events:
        key = event["id"], event["sample"]
        joined[key] = joined.get(key, "") + event["text"]
    return joined


def figures(capsys) -> str:
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_greedy_texts_are_those_of_generate_and_every_token_has_its_log_probability(
    answers, capsys, tiny_model
):
    prompts = {"a": "ŵ1 ŵ2 ŵ3", 7: "ŵ9 ŵ4", 2.5: "ŵ50"}
    lines = [{"id": name, "prompt": prompt, "max_new_tokens": 24} for name, prompt in prompts.items()]
    events = answers(*lines)
    arguments = [part for prompt in prompts.values() for part in ("--prompt", prompt)]
    assert main(["generate", "--model", tiny_model, *arguments, "--max-new-tokens", "24"]) == 0
    out = capsys.readouterr().out
    expected = {(name, 0): out.split(f"\n> {prompt}\n")[1].split("\n")[0] for name, prompt in prompts.items()}
    assert {key: text.strip() for key, text in texts(events).items()} == expected
    for name in prompts:
        *goes_on, end = [event["finish"] for event in events if event["id"] == name]
        assert set(goes_on) == {None} and end in ("stop", "length")
    for event in events:
        assert len(event["log_probs"]) == len(event["tokens"])
        assert all(value <= 0 for value in event["log_probs"])


def test_tokens_messages_samples_and_stop_strings(answers, capsys):
    prompt = {"prompt": "ŵ1 ŵ2 ŵ3", "max_new_tokens": 24}
    (whole,) = texts(answers(prompt)).values()
    words = whole.split()
    stop = f"{words[3]} {words[4][:2]}"
    events = answers(
        {"tokens": [1, 2, 3], "max_new_tokens": 24, "id": "tokens"},
        prompt | {"id": "samples", "num_samples": 2, "temperature": 1.5, "top_k": 50, "seed": 3},
        prompt | {"id": "stop", "stop": stop, "priority": 3},
        prompt | {"id": "token", "stop_tokens": [int(words[2][1:])], "salt": 4, "top_p": None},
    )
    found = texts(events)
    assert found["tokens", 0] == whole
    assert found["samples", 0] != found["samples", 1]
    assert found["stop", 0] == whole[: whole.index(stop)]
    last = {event["id"]: event for event in events}
    assert last["stop"]["finish"] == last["token"]["finish"] == "stop"
    assert found["token", 0].split() == words[: words.index(words[2]) + 1]


def test_a_line_that_is_wrong_is_answered_and_the_rest_goes_on(answers):
    good = {"prompt": "ŵ1", "max_new_tokens": 2}
    wrong = {
        b"not json": "the line is not JSON: Expecting value at column 1",
        b"\xff": "the line is not UTF-8 at byte 0",
        b"[1]": "must be a JSON object",
        b"[" * 100_000: "the line is not JSON",
        b'{"prompt": "a", "temperature": NaN}': "NaN is not a number",
        b'{"id": [1], "prompt": "a"}': "id=[1] must be a string or a number",
        b'{"id": true, "prompt": "a"}': "id=True",
        b'{"prompt": "a", "frob": 1}': "unknown field 'frob'; a request may have prompt",
        b"{}": "this one has none of them",
        b'{"prompt": "a", "tokens": [1]}': "this one has prompt and tokens",
        b'{"prompt": 5}': "prompt=5 must be a string",
        b'{"prompt": " "}': "prompt is empty",
        b'{"prompt": "\\ud800"}': "not valid UTF-8",
        b'{"messages": "a"}': "messages='a' must be a list",
        b'{"messages": [{"role": "user", "content": "a"}]}': "has no chat template",
        b'{"tokens": 1}': "tokens=1 must be a list",
        b'{"tokens": []}': "tokens is empty",
        b'{"tokens": [96]}': "token id 96 is beyond the vocabulary of 96 tokens",
        b'{"tokens": ["a"]}': "'a' is not a token id",
        b'{"prompt": "a", "max_new_tokens": 0}': "max_new_tokens=0",
        b'{"prompt": "a", "temperature": "hot"}': "temperature='hot'",
        b'{"prompt": "a", "top_p": 2}': "top_p=2",
        b'{"prompt": "a", "min_p": -1}': "min_p=-1",
        b'{"prompt": "a", "seed": -1}': "seed=-1",
        b'{"prompt": "a", "salt": "b"}': "salt='b'",
        b'{"prompt": "a", "stop": 5}': "stop=5",
        b'{"prompt": "a", "stop": [""]}': "a stop string must be a text that is not empty",
        b'{"prompt": "a", "stop_tokens": [1,2,3,4,5,6,7,8,9]}': "has 9 token ids; at most 8",
        b'{"prompt": "a", "num_samples": 3}': "num_samples=3 is more than --slots 2",
        json.dumps({"tokens": [1] * 64}).encode(): "the prompt has 64 tokens; at most 63 fit",
    }
    lines = [b"\xef\xbb\xbf" + json.dumps(good).encode(), b"", *wrong, b" \r", json.dumps(good).encode()]
    events = answers(*lines)
    refused = {event["line"]: event for event in events if "error" in event}
    for number, message in enumerate(wrong.values(), 3):
        assert message in refused.pop(number)["error"]
    assert not refused
    ends = {event["line"]: event["finish"] for event in events if event.get("finish")}
    assert ends == {1: "length", len(wrong) + 4: "length"}


def test_an_error_carries_the_requests_id(answers):
    (event,) = answers({"id": "☕", "prompt": "a", "top_k": 0})
    assert event["id"] == "☕" and "top_k=0" in event["error"] and "line" not in event


@contextmanager
def standard_input(monkeypatch):
    """Writes to standard input while the command reads it."""
    reads, writes = os.pipe()
    with open(reads) as file, open(writes, "wb", buffering=0) as into:
        monkeypatch.setattr(sys, "stdin", file)
        yield into


def wait_for(path, count: int) -> None:
    """Until so many samples have ended in a file of events."""
    began = time.monotonic()
    while time.monotonic() < began + SECONDS:
        if path.exists() and sum('"finish": "' in line for line in path.read_text().splitlines()) >= count:
            return
        time.sleep(0.01)
    raise TimeoutError(path.read_text())


def served_slowly(monkeypatch, tiny_model, output, write, *options: str) -> int:
    """Runs the command beside a thread that writes its standard input, and closes it."""
    faults = []
    with standard_input(monkeypatch) as into:

        def run():
            try:
                write(into)
            except BaseException as fault:
                faults.append(fault)
            finally:
                into.close()

        writer = threading.Thread(target=run)
        writer.start()
        where = ["--requests", "-", "--output", str(output)]
        code = main(["serve", "--model", tiny_model, *SIZES, *where, *options])
        writer.join()
    assert not faults
    return code


def test_standard_input_is_answered_as_it_comes_and_an_id_is_free_again(
    monkeypatch, capsys, tiny_model, tmp_path
):
    output = tmp_path / "events.jsonl"
    line = b'{"id": "a", "prompt": "\xc5\xb51", "max_new_tokens": 5}\n'

    def write(into):
        into.write(line[:20])
        time.sleep(0.05)
        into.write(line[20:])
        wait_for(output, 1)
        into.write(line + line)
        wait_for(output, 2)
        into.write(line[:-1])  # a last line without its end

    assert served_slowly(monkeypatch, tiny_model, output, write) == 0
    events = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    errors = [event["error"] for event in events if "error" in event]
    assert errors == ["id='a' is that of a request that has not ended"]
    assert sum(event.get("finish") == "length" for event in events) == 3
    assert len({event["text"] for event in events if event.get("finish")}) == 1
    line = figures(capsys)
    assert re.match(
        r"4 requests \(1 refused\), 15 tokens at [\d.]+ tokens/s, first token after [\d.]+ s", line
    )
    assert line.endswith("0 preemptions, 0 tokens found in the prefix cache")


def scrape(port: str) -> dict[str, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as response:
        text = response.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(jaxkv_\S+) (\S+)$", text, re.MULTILINE)}


def test_metrics_of_the_server_and_of_its_cache_are_served(monkeypatch, tiny_model, tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    output, seen = tmp_path / "events.jsonl", {}

    def write(into):
        for prompt in (b"a", b"b", b""):
            into.write(b'{"prompt": "%s", "max_new_tokens": 20, "num_samples": 2}\n' % prompt)
        wait_for(output, 4)
        seen.update(scrape(port))

    assert served_slowly(monkeypatch, tiny_model, output, write, "--metrics-port", port) == 0
    assert seen["jaxkv_generation_tokens_total"] == 80
    assert seen['jaxkv_request_success_total{finished_reason="length"}'] == 4
    assert seen["jaxkv_requests_refused_total"] == 1
    assert seen["jaxkv_time_to_first_token_seconds_count"] == 4
    # 8 tokens of each sample come in its first block, the rest after it.
    assert 0 < seen["jaxkv_time_per_output_token_seconds_count"] < 80
    assert seen["jaxkv_e2e_request_latency_seconds_sum"] >= seen["jaxkv_time_to_first_token_seconds_sum"] > 0
    assert seen["jaxkv_num_requests_running"] == seen["jaxkv_num_requests_waiting"] == 0
    assert seen["jaxkv_num_preemptions_total"] == 0
    assert 'jaxkv_pages_used{cache="default"}' in seen


def test_ctrl_c_ends_with_what_is_finished_and_says_how_much_is_left(tiny_model, tmp_path):
    path, count = tmp_path / "requests.jsonl", 3000
    path.write_text("".join(f'{{"id": {n}, "prompt": "a", "max_new_tokens": 60}}\n' for n in range(count)))
    process = command_models.run("serve", "--model", tiny_model, "--requests", str(path), *SIZES)
    assert process.stdout is not None
    first = process.stdout.readline()
    process.send_signal(signal.SIGINT)
    out, error = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert "Traceback" not in error
    events = [json.loads(line) for line in (first + out).splitlines()]
    ended = sum(event["finish"] is not None for event in events)
    assert int(re.search(r"stopped; requests left: (\d+)$", error)[1]) == count - ended > 0


@pytest.mark.slow
def test_a_reader_that_leaves_ends_it_quietly(tiny_model, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"prompt": "a", "max_new_tokens": 60}\n' * 3000)
    process = command_models.run("serve", "--model", tiny_model, "--requests", str(path), *SIZES)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    with process.stderr:
        error = process.stderr.read()
    assert process.wait(SECONDS) == 141
    assert "Traceback" not in error and "Exception" not in error


@pytest.mark.slow
def test_prompts_that_begin_alike_are_found_and_speculation_changes_nothing(answers):
    lines = [{"tokens": [*range(3, 25), end], "max_new_tokens": 24, "id": end} for end in (1, 30, 31, 32)]
    alone = texts(answers(*lines))
    found = texts(answers(*lines, sizes=(*SMALL, "--speculate", "2:3")))
    assert found == alone


def test_characters_that_the_output_lacks_are_escapes_of_json(monkeypatch, tiny_model, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text('{"id": "é☕😀", "prompt": "ŵ1", "max_new_tokens": 5}', encoding="utf-8")
    written = []
    for encoding in ("utf-8", "ascii", "latin-1"):
        out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["serve", "--model", tiny_model, "--requests", str(path), *SIZES]) == 0
        out.flush()
        written.append(out.buffer.getvalue().decode(encoding))
    assert "é☕😀" in written[0] and "ŵ" in written[0] and "ŵ" not in written[1] + written[2]
    (event,) = {json.dumps(json.loads(line)) for line in written}
    assert json.loads(event)["id"] == "é☕😀"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-tokens", "129"], "--max-tokens 129: tiny was trained on 128"),
        (["--max-tokens", "1"], "max_tokens=1 must be at least 2"),
        (["--slots", "4", "--token-budget", "3"], "token_budget=3 must be at least 4"),
        (["--output", "nowhere/events.jsonl"], "nowhere/events.jsonl"),
    ],
)
def test_sizes_that_do_not_fit_are_one_line(capsys, tiny_model, tmp_path, options, message):
    path = tmp_path / "requests.jsonl"
    path.write_text("")
    assert main(["serve", "--model", tiny_model, "--requests", str(path), *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_the_file_of_requests_is_not_written_over(capsys, tmp_path):
    path = tmp_path / "requests.jsonl"
    path.write_text("{}")
    assert main(["serve", "--model", "x", "--requests", str(path), "--output", str(path)]) == 2
    assert "is the file of requests" in capsys.readouterr().err
    assert path.read_text() == "{}"


def config_of(model: str, *options: str) -> ServingConfig:
    loaded = load(model)
    arguments = parser().parse_args(["serve", "--model", model, "--requests", "-", *options])
    return serving_config(loaded, loaded.tokenizer, arguments)


def test_default_sizes_hold_every_slot_at_its_longest_within_a_bound(monkeypatch, tiny_model):
    config = config_of(tiny_model)
    assert config.cache.prefix_cache and config.speculate is None and not config.log_probs
    assert config.max_tokens == 128 and config.cache.max_seqs == 8
    assert config.cache.num_pages == 8 * 128 // 16
    monkeypatch.setattr("jaxkv.cli.serve._MOST_BYTES", 20 * (config.cache.page_bytes + 8))
    assert config_of(tiny_model).cache.num_pages == 20
    monkeypatch.setattr("jaxkv.cli.serve._MOST_BYTES", 1)
    assert config_of(tiny_model).cache.num_pages == 8  # one sample at its longest
    few = config_of(tiny_model, "--num-pages", "3", "--kv-dtype", "int8").cache
    assert (few.num_pages, few.max_pages_per_seq, few.quantization) == (3, 3, "int8")


def test_null_is_as_if_a_field_were_not_there():
    assert fields_of(b'{"prompt": "a", "top_k": null}') == {"prompt": "a"}


def state_with(**counters: int) -> serving.ServingState:
    sizes = jaxkv.CacheConfig(num_layers=1, num_kv_heads=1, head_dim=8, num_pages=4, max_seqs=2)
    state = serving.init(ServingConfig(sizes))
    values = [counters.get(name, 0) for name in ServingStats.names()]
    return replace(state, stats=ServingStats(jnp.asarray(values, jnp.int32)))


def test_counters_go_on_where_the_servers_wrap_around_and_where_a_new_one_begins():
    metrics, sums = ServingMetrics(), []
    for steps, tokens in ((5, 9), (6, 2**31 - 1), (7, -(2**31)), (3, 4)):
        metrics.observe(state_with(steps=steps, new_tokens=tokens))
        sums.append(metrics.registry.get_sample_value("jaxkv_generation_tokens_total"))
    assert sums == [9, 2**31 - 1, 2**31, 2**31 + 4]


def test_times_are_those_from_event_to_event():
    metrics = ServingMetrics()
    metrics.see(Event(1, tokens=(1, 2), seconds=3.0))
    metrics.see(Event(2, tokens=(7,), seconds=1.0))
    metrics.see(Event(1, tokens=(3, 4), seconds=4.0))
    metrics.see(Event(1, finish=Finish.CANCELLED, seconds=6.0))
    metrics.see(Event(3, error="no"))
    metrics.see(Event(1, tokens=(3,), finish=Finish.STOP, seconds=2.0))  # the id is used again
    value = metrics.registry.get_sample_value
    assert value("jaxkv_time_to_first_token_seconds_sum") == 3 + 1 + 2
    assert value("jaxkv_time_per_output_token_seconds_sum") == 1
    assert value("jaxkv_time_per_output_token_seconds_count") == 2
    assert value("jaxkv_e2e_request_latency_seconds_sum") == 8
    assert value("jaxkv_request_success_total", {"finished_reason": "cancelled"}) == 1
    assert value("jaxkv_requests_refused_total") == 1
