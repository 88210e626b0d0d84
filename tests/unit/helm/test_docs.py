"""What the pages tell people to write for Helm renders, strictly, and every value that they name is the chart's."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import kubernetes_validate
import pytest
import yaml
from helm_python.errors import HelmError

from .conftest import CHART, ROOT, Object, notes, render, values_of
from .test_corpus import CUSTOM, over

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
KEYS = set(yaml.safe_load((CHART / "values.yaml").read_text()))
SCHEMA = json.loads((CHART / "values.schema.json").read_text())
NEWEST = "1.37"
FILE = re.compile(r"\.(?:json|py|crt|key|conf|yaml|nk)$")
# Of Helm itself and of its plugins; what takes a value after it is in the second row.
KNOWN = {"--wait", "--install", "--create-namespace", "--dry-run"}
TAKES = {"-n", "--namespace", "-f", "--values", "--set", "--set-json", "--set-string", "--timeout", "--version"}


def blocks() -> Iterator[tuple[str, dict[str, Any]]]:
    """(page and line, values) of each YAML block that holds nothing but values of the chart."""
    for page in PAGES:
        text = page.read_text()
        for found in re.finditer(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
            values = yaml.safe_load(found[1])
            if isinstance(values, dict) and set(values) <= KEYS:
                yield f"{page.relative_to(ROOT)}:{text.count(chr(10), 0, found.start()) + 1}", values


def commands(text: str) -> Iterator[list[str]]:
    """The words of each `helm install`, `upgrade` and `template` in a page, in blocks and between backticks."""
    fenced = re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    inline = re.findall(r"`(helm [^`]*)`", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))
    for line in [*"\n".join(fenced).replace("\\\n", " ").splitlines(), *inline]:
        if re.match(r"helm\b.* (?:install|upgrade|template)\b", line.strip()) and " diff " not in line:
            yield shlex.split(line, comments=True)[1:]


def asked(words: list[str]) -> tuple[list[str], dict[str, Any]]:
    """The names of values files, and the values, of a command. Raises `AssertionError` for an option that Helm does not have."""
    files, values, rest = list[str](), dict[str, Any](), iter(words)
    for word in rest:
        if word in TAKES:
            given = next(rest)
            if word in ("-f", "--values"):
                files.append(given)
            elif word.startswith("--set"):
                path, _, value = given.partition("=")
                for step in reversed(path.split(".")):
                    value = {step: yaml.safe_load(value) if isinstance(value, str) else value}  # type: ignore[assignment]
                values = over(values, value)  # type: ignore[arg-type]
        elif word.startswith("-"):
            assert word.partition("=")[0] in KNOWN, f"helm has no {word}"
    return files, values


def check(objects: list[Object]) -> None:
    """Raise for an object that Kubernetes would not take as it stands."""
    for item in objects:
        if item["kind"] not in CUSTOM:
            kubernetes_validate.validate(item, NEWEST, strict=True)


def whole() -> dict[str, Any]:
    """The values file that the page on deploying begins with, which is complete by itself."""
    return next(deepcopy(values) for _, values in blocks() if "roster" in values)


def known(path: str) -> bool:
    """Whether the chart has a value there."""
    schema: Any = SCHEMA
    for step in path.split("."):
        while "$ref" in schema:
            schema = SCHEMA["definitions" if "definitions" in SCHEMA else "$defs"][schema["$ref"].rpartition("/")[2]]
        inside = schema.get("properties", {})
        if step in inside:
            schema = inside[step]
        elif isinstance(schema.get("additionalProperties"), dict):
            schema = schema["additionalProperties"]
        else:
            # An object of Kubernetes, which has fields of its own.
            return "object" in schema.get("type", "") and not inside and schema.get("additionalProperties") is not False
    return True


@pytest.mark.parametrize(("where", "values"), list(blocks()), ids=[where for where, _ in blocks()])
def test_values_of_the_pages_render_and_are_what_kubernetes_takes(where: str, values: dict[str, Any]) -> None:
    check(render(values if "roster" in values else over(whole(), values)))


def test_commands_of_the_pages_render() -> None:
    found = [(page, words) for page in PAGES for words in commands(page.read_text())]
    assert len(found) >= 3, "the pages install, upgrade and run trainers with Helm"
    for page, words in found:
        files, values = asked(words)
        if not values and not files:
            continue
        assert set(files) <= {"my-values.yaml"}, (page, files)
        again = "upgrade" in words
        check(render(values if "mode" in values else over(whole(), values), is_upgrade=again, is_install=not again))


def test_values_that_a_page_names_are_the_charts() -> None:
    wrong = []
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
        if re.search(r"\bHelm\b|\bchart\b", text):
            named = re.findall(r"`([a-z]\w*(?:\.[a-zA-Z]\w*)+)(?::[^`]*)?`", text)
            values = [path for path in named if path.partition(".")[0] in KEYS and not FILE.search(path)]
            wrong += [(page.name, path) for path in values if not known(path)]
    assert wrong == []


def test_whoever_names_no_bucket_is_told_with_whom_it_may_be_shared() -> None:
    values = whole()
    assert "store.bucket" not in notes(values)
    del values["store"]["bucket"]
    for namespace in ("ml", "other"):
        said = notes(values, namespace=namespace)
        assert "in the bucket `connito`. A bucket belongs to the platform\nwhose committer comes first" in said


def test_what_is_wrong_is_found() -> None:
    assert known("store.existingSecrets")
    assert not known("store.existingSecret.nothing")
    assert not known("coordinator.servise")
    with pytest.raises(AssertionError, match="helm has no --weit"):
        asked(shlex.split("upgrade connito helm/connito -f my-values.yaml --weit"))
    with pytest.raises(HelmError):
        render(over(whole(), asked(shlex.split("upgrade --set image.tagg=1"))[1]))
    patched = {"kind": "Deployment", "name": "coordinator", "merge": {"spec": {"minReadySecond": 10}}}
    objects = render(over(values_of("platform"), {"patches": [patched]}))
    with pytest.raises(kubernetes_validate.ValidationError):
        check(objects)
