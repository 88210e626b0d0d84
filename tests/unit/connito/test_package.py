from __future__ import annotations

import subprocess
import sys

import connito
import pytest


@pytest.mark.parametrize("name", ["Client", "compress", "load_expert", "select"])
def test_the_public_names_resolve(name):
    assert getattr(connito, name).__name__ == name


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = connito.nonsense


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, connito; print([name for name in ('torch', 'transformers', 'grpc', 'nats') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
