"""Text that comes with a base on this machine: corpora of every domain, tokenised once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from connito.base.recipes import cache_root, fresh_folder, source_digest
from connito.data.corpus import ENDS, WHOLE, Corpus
from connito.data.domains import DEMO_DOMAINS
from connito.data.encoding import encoder_of

_MAKERS = (
    "connito.data.domains",
    "connito.data.prepare",
    "connito.data.dedup",
    "connito.base.tiny",
    "connito.data.corpus",
    "connito.data.encoding",
)
TINY_DOMAINS = ("recipes", "logs", "poems", "ledgers")
# Parts of a domain's text, with the share that generated text gives each.
PARTS = {"probe": 0.05, "train": 0.75, "holdout": 0.2}
# Enough to be left with the tokens asked for after duplicates are gone.
_CHARACTERS_PER_TOKEN = 8
# Text that the tiny base was neither trained nor clustered on.
_TINY_TEXT_SEED = 77_000


@dataclass(frozen=True)
class Texts:
    """Text to prepare, in tokens over probe, training and hold-out together."""

    target_tokens: int
    general_tokens: int


DEMO_TEXTS, TINY_TEXTS = Texts(160_000, 40_000), Texts(130_000, 50_000)


@dataclass(frozen=True)
class Plan:
    """Sizes and domains of the corpora to make. Sizes are tokens over probe, training and hold-out together."""

    base: str
    base_digest: str
    tiny: bool
    target: str
    general: tuple[str, ...]
    target_tokens: int
    general_tokens: int

    @classmethod
    def of(cls, folder: Path, base_digest: str, *, tiny: bool, target: str = "") -> Self:
        """Return the plan for the base in `folder`; `target`: the domain with most text, by default the first."""
        domains, texts = (TINY_DOMAINS, TINY_TEXTS) if tiny else (DEMO_DOMAINS, DEMO_TEXTS)
        target = target or domains[0]
        general = tuple(domain for domain in domains if domain != target)
        return cls(str(folder), base_digest, tiny, target, general, texts.target_tokens, texts.general_tokens)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        """Return the plan of plain data, the inverse of `to_json`."""
        return cls(**{**data, "general": tuple(data["general"])})

    def to_json(self) -> dict[str, Any]:
        """Return the plan as plain data."""
        return asdict(self)

    @property
    def folder(self) -> Path:
        """Return folder of the corpora, named by a digest of everything that determines their bytes."""
        decisive = {**self.to_json(), "base": "", "code": source_digest(*_MAKERS)}
        digest = hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()
        return cache_root() / "corpora" / f"{self.target}-{digest[:12]}"


def build_corpora(plan: Plan, progress: Callable[[str, float], None]) -> Path:
    """Write `<domain>.<part>.safetensors` and `<domain>.json` with statistics, for every domain, unless they are there."""
    from connito.base.loading import load_tokenizer

    with fresh_folder(plan.folder) as draft:
        if draft is None:
            return plan.folder
        tokenizer = load_tokenizer(Path(plan.base))
        domains = (plan.target, *plan.general)
        for index, domain in enumerate(domains):
            progress(f"preparing text, {domain}", index / len(domains))
            tokens = plan.target_tokens if domain == plan.target else plan.general_tokens
            make = _generated if plan.tiny else _found
            corpora, statistics = make(Path(plan.base), tokenizer, domain, tokens)
            for part, corpus in corpora.items():
                corpus.save(draft / f"{domain}.{part}.safetensors")
            (draft / f"{domain}.json").write_text(statistics)
        progress("preparing text", 1.0)
    return plan.folder


def mixed(corpora: Mapping[str, Corpus], tokens: int) -> Corpus | None:
    """Return about `tokens` tokens of whole documents of several corpora, as much of each; None without any."""
    if not corpora:
        return None
    chosen: list[list[int]] = []
    for corpus in (corpora[name].complete() for name in sorted(corpora)):
        taken = 0
        for index in range(corpus.documents):
            if taken >= tokens // len(corpora):
                break
            chosen.append(corpus.document(index).tolist())
            taken += len(chosen[-1])
    metadata = {**next(iter(corpora.values())).metadata, "domain": "general", "split": "replay", ENDS: WHOLE}
    return Corpus.from_documents(chosen, metadata)


def _found(base: Path, tokenizer: Any, domain: str, tokens: int) -> tuple[dict[str, Corpus], str]:
    """Prepare real text: de-duplicated, split by document hash, decontaminated."""
    from connito.data.domains import load_domain
    from connito.data.prepare import prepare_corpora, tokenizer_digest

    prepared = prepare_corpora(
        domain,
        load_domain(domain, tokens * _CHARACTERS_PER_TOKEN),
        encoder_of(tokenizer).encode,
        tokenizer_digest=tokenizer_digest(_tokenizer_files(base)),
        separator=int(tokenizer.eos_token_id),
        max_tokens=tokens,
    )
    parts = {part: getattr(prepared, part) for part in PARTS}
    return parts, prepared.statistics.to_json()


def _generated(base: Path, tokenizer: Any, domain: str, tokens: int) -> tuple[dict[str, Corpus], str]:
    """Generate text of the tiny base's grammars, a seed for each part; few words make all of it, so likeness is not checked."""
    from connito.base.tiny import tiny_texts
    from connito.data.prepare import tokenizer_digest

    digest, corpora = tokenizer_digest(_tokenizer_files(base)), {}
    for number, (part, share) in enumerate(PARTS.items()):
        texts = tiny_texts(domain, _TINY_TEXT_SEED + number, max(8, int(tokens * share / 300)))
        metadata = {"domain": domain, "split": part, "tokenizer": digest, "separator": str(tokenizer.eos_token_id)}
        corpora[part] = Corpus.from_documents(encoder_of(tokenizer).encode(texts), metadata)
    sizes = {f"{part}_tokens": len(corpus.tokens) for part, corpus in corpora.items()}
    return corpora, json.dumps({"domain": domain, **sizes})


def _tokenizer_files(base: Path) -> list[Path]:
    return [path for path in base.iterdir() if path.name.startswith(("tokenizer", "special_tokens"))]
