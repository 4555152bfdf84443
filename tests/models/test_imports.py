"""What a user of the cache alone does not pay for."""

import subprocess
import sys


def test_importing_jaxkv_brings_none_of_the_models_packages():
    heavy = "{'flax', 'gguf', 'tokenizers', 'safetensors', 'jinja2', 'jaxkv.models'}"
    program = f"import sys, jaxkv; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
