"""A profiler's trace and the program's text: device time by scope, with nothing counted twice or guessed."""

import gzip
import json

import jax
import jax.numpy as jnp
import pytest

import jaxkv
from benchmarks.traces import Division, device_events, divide, part_of, read_trace

# As XLA writes a module for a GPU; three kernels of one Pallas name would be three custom calls.
HLO = """HloModule jit_step, is_scheduled=true

%fused_mixed (param_0: f32[8]) -> f32[8] {
  %param_0 = f32[8]{0} parameter(0)
  %mul.1 = f32[8]{0} multiply(%param_0, %param_0), metadata={op_name="jit(step)/jaxkv.attend/mul"}
  ROOT %add.1 = f32[8]{0} add(%mul.1, %mul.1), metadata={op_name="jit(step)/add"}
}

%fused_scatter (param_0.1: f32[8]) -> f32[8] {
  %param_0.1 = f32[8]{0} parameter(0)
  ROOT %neg.1 = f32[8]{0} negate(%param_0.1), metadata={op_name="jit(step)/jaxkv.allocate/scatter"}
}

ENTRY %main.1 (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %wrapped_scatter.2 = f32[8]{0} fusion(%a), kind=kLoop, calls=%fused_scatter
  %append.3 = f32[8]{0} custom-call(%wrapped_scatter.2), custom_call_target="__gpu$xla.gpu.triton", backend_config={ir = "..", name = "append_kv", num_stages = 1 : i32}, metadata={op_name="jit(step)/jaxkv.append/append_kv"}
  %copy.9 = f32[8]{0} copy(%append.3)
  ROOT %loop_add_fusion.4 = f32[8]{0} fusion(%copy.9), kind=kLoop, calls=%fused_mixed, metadata={op_name="jit(step)/add"}
}
"""  # noqa: E501


def process(pid, name):
    return {"ph": "M", "pid": pid, "name": "process_name", "args": {"name": name}}


def thread(pid, tid, name):
    return {"ph": "M", "pid": pid, "tid": tid, "name": "thread_name", "args": {"name": name}}


def ran(name, ts, dur, *, pid=1, tid=1, module="jit_step", **arguments):
    if module is not None:
        arguments["hlo_module"] = module
    return {"ph": "X", "pid": pid, "tid": tid, "ts": ts, "dur": dur, "name": name, "args": arguments}


# As JAX's profiler lays out one GPU: streams of kernels, lines derived from them, and the host.
GPU = [
    process(1, "/device:GPU:0"),
    process(701, "/host:CPU"),
    thread(1, 1, "Stream #13(Compute)"),
    thread(1, 2, "Stream #14(MemcpyD2D)"),
    thread(1, 9, "XLA Ops"),
    thread(701, 3, "python"),
    ran("wrapped_scatter_2", 0, 3, hlo_op="wrapped_scatter.2"),
    ran("append_kv", 3, 20, hlo_op="append.3"),
    ran("loop_add_fusion_4", 30, 50, hlo_op="loop_add_fusion.4"),
    ran("MemcpyD2D", 24, 7, tid=2, hlo_op="copy.9"),
    ran("append.3", 3, 20, tid=9, hlo_op="append.3"),
    ran("cuLaunchKernel", 0, 500, pid=701, tid=3, module=None),
]


def microseconds(division):
    return {part: round(1e6 * seconds, 3) for part, seconds in division.parts.items()}


def test_each_kernel_counts_once_under_the_scope_of_its_instruction():
    division = divide(device_events(GPU), HLO)
    assert microseconds(division) == {"allocate": 3, "append": 20, "rest": 50, "compiler": 7}
    assert division.unnamed == 0
    assert division.share("append") == pytest.approx(0.25)
    assert division.share("attend") == 0


def test_a_fusion_of_several_parts_counts_where_its_result_belongs_and_is_named_mixed():
    assert divide(device_events(GPU), HLO).mixed == pytest.approx(50e-6)


def test_lines_by_operation_serve_where_a_trace_has_no_streams():
    events = [event for event in GPU if event.get("tid") not in (1, 2)]
    assert microseconds(divide(device_events(events), HLO)) == {"append": 20}


def test_a_kernel_without_an_instruction_is_found_by_its_name_or_stays_unnamed():
    events = [
        *GPU[:6],
        ran("append_kv", 0, 10, module=None),
        ran("wrapped_scatter_2", 10, 5, module=None),
        ran("sm90_xmma_gemm", 20, 5, module=None),
    ]
    division = divide(device_events(events), HLO)
    assert microseconds(division) == {"append": 10, "allocate": 5}
    assert division.unnamed_share == pytest.approx(0.25)


def test_other_modules_are_left_out():
    events = [*GPU, ran("loop_fusion", 200, 1000, module="jit_truncate", hlo_op="append.3")]
    assert divide(device_events(events), HLO) == divide(device_events(GPU), HLO)


def test_what_holds_other_events_counts_without_them():
    events = [*GPU[:6], ran("wrapped_scatter_2", 0, 100, hlo_op="wrapped_scatter.2")]
    events += [ran("append_kv", 10, 30, hlo_op="append.3"), ran("append_kv", 60, 40, hlo_op="append.3")]
    assert microseconds(divide(device_events(events), HLO)) == {"allocate": 30, "append": 70}


def test_nothing_seen_is_nothing_named():
    assert divide([], HLO) == Division({}, 0.0, 0.0)
    assert divide([], HLO).unnamed_share == 1


@pytest.mark.parametrize(
    ("op_name", "part"),
    [
        ("jit(step)/jaxkv.attend/while/body/dot_general", "attend"),
        ("jit(step)/jaxkv.allocate/jaxkv.append/x", "allocate"),
        ("jit(step)/dot_general", "rest"),
        (None, "compiler"),
    ],
)
def test_the_outermost_scope_names_the_part(op_name, part):
    assert part_of(op_name) == part


def test_the_newest_trace_of_a_folder_is_read(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_trace(tmp_path)
    run = tmp_path / "plugins" / "profile" / "2026"
    run.mkdir(parents=True)
    with gzip.open(run / "host.trace.json.gz", "wt") as file:
        json.dump({"traceEvents": GPU}, file)
    assert read_trace(tmp_path) == device_events(GPU)


def test_a_real_trace_of_a_step_is_divided_whole(tmp_path):
    config = jaxkv.CacheConfig(num_layers=1, num_kv_heads=2, head_dim=8, num_pages=8, dtype="float32")

    @jax.jit
    def step(cache, k, q):
        cache, batch = jaxkv.allocate(cache, jnp.array([0, 1]), jnp.array([1, 1]))
        cache = jaxkv.append(cache, 0, batch, k, k)
        return cache, jaxkv.attend(cache, 0, batch, q)

    k, q = jnp.ones((2, 2, 8)), jnp.ones((2, 4, 8))
    compiled = step.lower(jaxkv.init(config), k, q).compile()
    with jax.profiler.trace(tmp_path):
        jax.block_until_ready(compiled(jaxkv.init(config), k, q))
    division = divide(read_trace(tmp_path), compiled.as_text())
    assert {"allocate", "append", "attend"} <= set(division.parts)
    assert division.unnamed == 0
    assert division.total == sum(division.parts.values()) > 0
