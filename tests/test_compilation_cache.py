"""Which compiled programs the command keeps for its next run, and where."""

import os
import subprocess
import sys

import jax
import pytest

from jaxkv.cli.compilation_cache import default_directory, keep_programs
from tests import command_models
from tests.command_models import PROMPT


@pytest.fixture
def settings(monkeypatch):
    """JAX's settings of the cache as a user has them, put back afterwards."""
    names = "compilation_cache_dir", "enable_compilation_cache", "persistent_cache_min_compile_time_secs"
    before = {f"jax_{name}": getattr(jax.config, f"jax_{name}") for name in names}
    monkeypatch.setattr("warnings.showwarning", lambda *_: None)
    jax.config.update("jax_enable_compilation_cache", True)
    yield jax.config
    for name, value in before.items():
        jax.config.update(name, value)


def test_programs_are_kept_in_the_users_cache_directory(monkeypatch, settings, tmp_path, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep_programs()
    assert settings.jax_compilation_cache_dir == str(tmp_path / "cache" / "jaxkv")
    assert settings.jax_persistent_cache_min_compile_time_secs == 0
    assert (tmp_path / "cache" / "jaxkv").stat().st_mode & 0o077 == 0
    for unset in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unset)
        monkeypatch.setenv("HOME", str(tmp_path))
        assert default_directory() == tmp_path / ".cache" / "jaxkv"
    # What JAX was told holds, but for a place given on the command line.
    keep_programs()
    assert settings.jax_compilation_cache_dir == str(tmp_path / "cache" / "jaxkv")
    keep_programs(tmp_path / "mine")
    assert settings.jax_compilation_cache_dir == str(tmp_path / "mine")
    keep_programs(enabled=False)
    assert settings.jax_enable_compilation_cache is False
    keep_programs()
    assert settings.jax_enable_compilation_cache is False
    assert capsys.readouterr().err == ""


def test_a_cache_directory_that_cannot_be_used_is_a_warning(monkeypatch, settings, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    keep_programs(tmp_path / "file" / "cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "jaxkv").mkdir()
    (tmp_path / "jaxkv").chmod(0o777)
    keep_programs()
    lines = capsys.readouterr().err.splitlines()
    said = "jaxkv: warning: compiled programs are not kept"
    assert [line.partition(f" in {tmp_path}")[0] for line in lines] == [said] * 2
    assert "Not a directory; choose another with --compilation-cache DIR" in lines[0]
    assert "jaxkv: another user can write there" in lines[1]
    assert settings.jax_compilation_cache_dir is None


def in_process(code: str, **env: str) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "1"} | env
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True)


DAMAGE = """
from pathlib import Path
import jax, jax.numpy as jnp
from jaxkv.cli.compilation_cache import keep_programs
directory = Path({directory!r})
keep_programs(directory)
def run():
    jax.clear_caches()
    print(jax.jit(lambda x: jnp.sin(x) + 1)(0.0), jax.jit(lambda x: jnp.cos(x) + 1)(0.0))
run()
for path in directory.iterdir():
    if path.is_file():
        path.write_bytes(path.read_bytes()[:40])
run()
"""


def test_damaged_programs_are_compiled_again_with_one_line(tmp_path):
    done = in_process(DAMAGE.format(directory=str(tmp_path / "cache")))
    assert done.stdout.splitlines() == ["1.0 2.0"] * 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("jaxkv: warning: Error reading persistent compilation cache entry")
    assert line.endswith(f"if this repeats, empty {tmp_path / 'cache'}")


def test_a_second_run_compiles_nothing_and_says_nothing_more(tmp_path):
    model = command_models.tiny(tmp_path)
    code = f"from jaxkv.cli import main; main(['generate', '--model', {model!r}, *{PROMPT!r}])"
    runs, kept = [], []
    for _ in range(2):
        runs.append(in_process(code, XDG_CACHE_HOME=str(tmp_path), PYTHONIOENCODING="ascii"))
        kept.append(sorted(path.name for path in (tmp_path / "jaxkv").glob("*-cache")))
    assert runs[0].stdout == runs[1].stdout and "\\u0175" in runs[0].stdout
    assert kept[0] == kept[1] and any("decode" in name for name in kept[0])
    for run in runs:
        assert [line.split(" ")[0] for line in run.stderr.splitlines() if line] == [
            "compiled",
            "prefill",
            "2",
        ]
