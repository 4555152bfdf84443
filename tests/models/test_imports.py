"""What a user of the cache alone does not pay for."""

import importlib
import subprocess
import sys

import pytest

import jaxkv
import jaxkv.memory.pictures
import jaxkv.telemetry
from jaxkv.extras import missing, needs_extra


def test_importing_jaxkv_brings_none_of_the_models_packages():
    heavy = "{'flax', 'gguf', 'tokenizers', 'safetensors', 'jinja2', 'jaxkv.models'}"
    program = f"import sys, jaxkv; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("package", ["flax", "tokenizers"])
def test_importing_the_models_without_their_extra_says_what_to_install(package):
    program = f"""
import sys
sys.modules[{package!r}] = None
try:
    import jaxkv.models
except ImportError as error:
    print(error, "|", error.name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{package} is missing; pip install 'jaxkv[models]' | {package}"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("prometheus_client", "metrics", "jaxkv.telemetry.Telemetry()"),
        ("matplotlib", "plot", "jaxkv.memory.pictures._figure(1, 1)"),
    ],
)
def test_what_needs_another_extra_says_so_too(monkeypatch, package, extra, call):
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package} is missing; pip install 'jaxkv\[{extra}\]'"):
        eval(call, {"jaxkv": jaxkv})


def test_another_missing_module_is_not_blamed_on_an_extra():
    with pytest.raises(ModuleNotFoundError, match="No module named 'nowhere'"), needs_extra():
        importlib.import_module("nowhere")
    assert missing(ModuleNotFoundError(name="nowhere.deep")) == "nowhere is missing"
