"""Let transformers load a model from tensors that were read here, so that what comes out is what `from_pretrained` gives.

Renaming, fusing, types, ties and buffers follow the library's own rules in every loader. Code that lies in a checkpoint is
never run and never asked for, and nothing that a checkpoint lacks is filled in.
"""

from __future__ import annotations

import logging
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from connito.data.documents import parse_json
from connito.errors import Invalid
from connito.v1 import reasons_pb2

if TYPE_CHECKING:
    import torch
    from torch import nn

# Changes a model without storage before tensors are put into it.
Prepare = Callable[[Any], None]

# Bytes of a config.json, the largest whole number in one, and how many modules and how many entries of one a model may have.
_MAX_CONFIG, _MAX_SIZE, _MAX_MODULES, _MAX_ENTRIES = 1 << 22, 1 << 40, 1 << 10, 1 << 16
_MODULES = re.compile(r"(^|_)(layers?|depth|blocks?|stages?)$")
_ENTRIES = re.compile(r"(^|_)(experts?|labels?)$")


def parse_config(data: bytes) -> Any:
    """Return the configuration in a config.json, as the library reads it. Raises `Invalid` for a family it does not know."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    check_config(data)
    try:
        with tempfile.TemporaryDirectory() as folder, quiet():
            (Path(folder) / "config.json").write_bytes(data)
            config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except (ValueError, TypeError, KeyError, AttributeError, OSError, RecursionError, StrictDataclassError) as error:
        family = _family(data)
        if family is not None and family not in CONFIG_MAPPING:
            raise Invalid(
                f"the model family {family!r} is not part of the installed transformers, and code that comes with a "
                "checkpoint is never run; update transformers, or use another model",
                reason=reasons_pb2.REASON_BAD_SPEC,
            ) from error
        # Not where the library was shown it, which nobody else knows.
        why = _first_line(error).replace(f"{folder}/", "").replace(f"model in {folder}", "model")
        raise Invalid(
            f"config.json cannot be read: {why}; copy it again from where the weights are from",
            reason=reasons_pb2.REASON_BAD_SPEC,
        ) from error
    return _causal(config)[1]


def check_config(data: bytes) -> None:
    """Raise `Invalid` for a configuration that asks for more parts than any model has.

    A model is built of its parts one by one, also without their weights: a number alone would keep a service busy for days.
    """
    try:
        if len(data) > _MAX_CONFIG:
            raise ValueError(f"it has {len(data)} bytes, more than {_MAX_CONFIG}")
        _check_counts("", parse_json(data))
    except (ValueError, RecursionError) as error:
        raise Invalid(
            f"config.json cannot be read: {error or 'it is nested too deep'}; copy it again from where the weights are from",
            reason=reasons_pb2.REASON_BAD_SPEC,
        ) from error


def _check_counts(name: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _check_counts(key, inner)
    elif isinstance(value, list):
        if len(value) > _MAX_ENTRIES:
            raise ValueError(f"{name[:80]} has {len(value)} entries, more than {_MAX_ENTRIES}")
        for inner in value:
            _check_counts(name, inner)
    elif isinstance(value, int):
        most = _MAX_MODULES if _MODULES.search(name) else _MAX_ENTRIES if _ENTRIES.search(name) else _MAX_SIZE
        if value > most:
            raise ValueError(f"{name[:80]} is more than {most}")


def _family(data: bytes) -> str | None:
    try:
        family = parse_json(data)["model_type"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return family if isinstance(family, str) else None


def _causal(config: Any) -> tuple[type[Any], Any]:
    """Return the class of the causal language model of a configuration, and the part of the configuration it takes."""
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.auto_factory import _get_model_class

    known = AutoModelForCausalLM._model_mapping
    if type(config) not in known:
        raise Invalid(
            f"no causal language model can be made from this config.json ({config.model_type}); give the folder of a text "
            "model",
            reason=reasons_pb2.REASON_BAD_SPEC,
        )
    kind = _get_model_class(config, known)
    text = config.sub_configs.get("text_config")
    if text is not None and kind.config_class is text:
        whole, config = config, config.get_text_config()
        if getattr(whole, "quantization_config", None) is not None:
            config.quantization_config = whole.quantization_config
    return kind, config


def from_tensors(config: Any, tensors: Mapping[str, Any], *, dtype: Any = None, prepare: Prepare | None = None) -> Any:
    """Return the model of `config` with `tensors`, by the names of a checkpoint: frozen, in eval mode, on the CPU.

    A tensor may be anything that gives its values as `tensor[...]`, which is asked once, when its turn comes. What is of
    the right type already is not copied. Raises `Invalid` naming what is missing, of another shape or left over by a rule.
    """
    model, missing = _load(config, tensors, dtype, prepare, {})
    if missing:
        raise lacking(missing)
    return model.requires_grad_(False)


def on_meta(config: Any, tensors: Mapping[str, torch.Tensor], *, dtype: Any = None) -> tuple[Any, list[str]]:
    """Return what `from_tensors` would make, without storage, and the names of what is missing. `tensors` are meta tensors."""

    def keep_apart(model: Any) -> None:
        # Whether two tensors that may be tied are equal cannot be seen without their values.
        kind: Any = type(model).__mro__[1]

        def tie_absent(missing_keys: set[str] | None = None, recompute_mapping: bool = True) -> None:
            there = () if missing_keys is None else model.all_tied_weights_keys.items()
            apart = [pair for pair in there if not {*pair} & (missing_keys or set())]
            for target, _ in apart:
                model.all_tied_weights_keys.pop(target)
            kind.tie_weights(model, missing_keys=missing_keys, recompute_mapping=recompute_mapping)

        model.tie_weights = tie_absent

    return _load(config, tensors, dtype, keep_apart, {"device_map": {"": "meta"}})


def in_types(model: Any, types: Mapping[str, torch.dtype]) -> None:
    """Give parameters of a model without storage the types that they are to be loaded in, by name."""
    for name, dtype in types.items():
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)


def modules_of(config: Any) -> Any:
    """Return the modules of a configuration without storage, in eval mode, frozen. Raises `Invalid` where none can be made."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"), _explained(config):
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=config.dtype)
    return model.eval().requires_grad_(False)


def _load(
    config: Any, tensors: Mapping[str, Any], dtype: Any, prepare: Prepare | None, more: Mapping[str, Any]
) -> tuple[Any, list[str]]:
    kind, config = _causal(config)

    def make(self: Any, *arguments: Any, **named: Any) -> None:
        kind.__init__(self, *arguments, **named)
        if prepare is not None:
            prepare(self)

    # The library makes the model and fills it in one call; a subclass of the same name is what can step in between.
    between: Any = type(kind.__name__, (kind,), {"__init__": make, "__module__": kind.__module__})
    # One after the other, when a tensor's turn comes: read ahead in threads, every source would be in memory at once.
    os.environ.setdefault("HF_DEACTIVATE_ASYNC_LOAD", "1")
    with _explained(config), quiet():
        model, info = between.from_pretrained(
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=dtype or config.dtype or "auto",
            experts_implementation="eager",
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            local_files_only=True,
            **more,
        )
    model.__class__ = kind
    model.__dict__.pop("tie_weights", None)
    if info["mismatched_keys"]:
        name, stored, wanted = min((n, tuple(a), tuple(b)) for n, a, b in info["mismatched_keys"])
        raise Invalid(
            f"the checkpoint does not fit its configuration: {name} has shape {stored} where config.json describes "
            f"{wanted}; copy both again from where they are from",
            reason=reasons_pb2.REASON_WRONG_SHAPE,
        )
    return model, sorted(info["missing_keys"])


@contextmanager
def _explained(config: Any) -> Iterator[None]:
    """Say as `Invalid` why the library makes no model of a configuration, or of that and tensors."""
    try:
        yield
    except ImportError as error:
        raise Invalid(
            f"config.json asks for what is not installed here: {_first_line(error)}; take the field (attn_implementation, say) "
            "out of it, or install that",
            reason=reasons_pb2.REASON_BAD_SPEC,
        ) from error
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
        raise Invalid(
            f"the checkpoint does not fit its configuration ({config.model_type}): {_first_line(error)}; copy both again from "
            "where they are from",
            reason=reasons_pb2.REASON_WRONG_TENSORS,
        ) from error


def lacking(names: list[str]) -> Invalid:
    """Return the error for a checkpoint without some of the model's tensors."""
    return Invalid(
        f"{names[0]} is missing from the checkpoint ({len(names)} missing): a file of it is incomplete, or it was saved for "
        "another architecture than its config.json names; fetch it again",
        reason=reasons_pb2.REASON_WRONG_TENSORS,
    )


def _first_line(error: BaseException) -> str:
    """Return what an error says first: its first line, and the next where that only announces it."""
    if isinstance(error, KeyError):
        return f"it names {error}, which the installed transformers does not know"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 1 + lines[0].endswith(":")])[:300]


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the library's reports and progress bars off the terminal: what is wrong is said in our own words."""
    from transformers.utils import logging as library

    logger, bars = logging.getLogger("transformers"), library.is_progress_bar_enabled()
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    library.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            library.enable_progress_bar()
