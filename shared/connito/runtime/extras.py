"""Packages that come with an extra, by the module that is missing without it: one sentence names the extra."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

from connito.errors import Invalid

_MODULES = {
    "model": "accelerate bitsandbytes gguf huggingface_hub jinja2 openskill safetensors scipy tokenizers torch transformers",
    "data": "aiohttp charset_normalizer fsspec pyarrow s3fs zstandard",
    "demo": "cryptography nats_server psutil seaweedfs",
    "console": "markdown_it",
    "oidc": "jwt",
    "serve": "starlette uvicorn",
    "evaluate": "datasets lm_eval",
    "tracing": "opentelemetry",
    "bittensor": "bittensor_wallet",
}
# The extra of each module.
EXTRA = {module: extra for extra, modules in _MODULES.items() for module in modules.split()}
# Extras that are of no use without another.
_BESIDE = {"serve": "model,serve", "evaluate": "model,evaluate"}


def sentence(error: ImportError) -> str:
    """Return what to install for a module that is not there; the empty string for one that no extra brings."""
    module = (error.name or "").partition(".")[0]
    extra = EXTRA.get(module, "")
    return f"{module} is not installed; `pip install 'connito[{_BESIDE.get(extra, extra)}]'` brings it" if extra else ""


def require(*modules: str) -> None:
    """Raise `Invalid` for the first of these modules that is not there. Imports none of them."""
    for module in modules:
        if find_spec(module) is None:
            raise Invalid(sentence(ModuleNotFoundError(name=module)))


@contextmanager
def extras_named() -> Iterator[None]:
    """Raise `Invalid` that names the extra where a module of one is missing. Also a decorator."""
    try:
        yield
    except ModuleNotFoundError as error:
        if said := sentence(error):
            raise Invalid(said) from error
        raise
