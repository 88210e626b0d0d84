"""A job.yaml that means harm: it is read, or refused in a short sentence, and soon."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from connito.errors import ConnitoError, Invalid
from connito.jobs.policies import run_spec
from connito.jobs.spec import parse_job, read_job, read_run_spec

JOB = "domain: poems\ndata: [{path: t.txt}]\nlicense: MIT\n"
HEX, SIXTY = "0x" + "F" * 5000, ":".join(["1"] + ["59"] * 3000)
LAUGHS = "\n".join(
    ["a: &a [x,x,x,x,x,x,x,x,x,x]"]
    + [f"{b}: &{b} [{','.join(['*' + a] * 10)}]" for a, b in zip("abcdefg", "bcdefgh", strict=True)]
)
NUMBERS = {
    f"{place} {name}": JOB + line.replace("#", number)
    for place, line in {
        "cycles": "objective: {max_cycles: #}", "improvement": "objective: {improvement: #}", "emission": "budget: {emission: #}",
        "upload": "budget: {upload: #}", "miners": "people: {miners: #}", "keys": "people: {allowed: [#]}", "run": "run: #",
        "visibility": "privacy: {visibility: #}", "profile": "profile: #", "start": "start_from: #", "replay": "replay: #",
        "policy": "policies: {training: {local_steps: #}}", "rate": "policies: {training: {replay_share: #}}",
        "list": "policies: {rewards: {rank_shares: [#]}}",
    }.items()
    for name, number in {"hex": HEX, "negative": "-" + HEX, "base 60": SIXTY, "octal": "0" + "7" * 6000}.items()
}  # fmt: skip
ODD = {
    "a size that is none": JOB + f'budget: {{upload: "{"9" * 400} TB"}}',
    "a long size": JOB + f'budget: {{memory: "{"9" * 100_000}"}}',
    "no number": JOB + "policies: {training: {replay_share: abc}}",
    "a list": JOB + "policies: {training: {replay_share: [1]}}",
    "nothing": JOB + "policies: {training: {replay_share: null}}",
    "no end": JOB + "policies: {training: {learning_rate: .inf}}",
    "not a number": JOB + "policies: {training: {learning_rate: .nan}}",
    "a date": JOB + "policies: {training: {local_steps: 2020-01-01}}",
    "itself": JOB + "policies: {training: &a {local_steps: *a}}",
    "deep": JOB + f"policies: {{training: {{local_steps: {'[' * 400}{']' * 400}}}}}",
    "deeper": JOB + f"policies: {{training: {'{a: ' * 3000}1{'}' * 3000}}}",
    "laughs": f"{LAUGHS}\n{JOB}",
    "laughs in a policy": JOB + f"policies: {{x: {{y: [{','.join(['&q [1]'] + ['*q'] * 999)}]}}}}",
    "a name like a path": JOB + 'policies: {"../..": {__class__: 1}}',
    "a name of ours": JOB + "policies: {training: {DESCRIPTOR: 1}}",
    "a long name": JOB + f"policies: {{{'x' * 1000}: {{{'y' * 1000}: 1}}}}",
    "many faults": JOB.replace("{path: t.txt}", "1," * 3_000),
    "many fields": JOB + "\n".join(f"x{number}: 1" for number in range(2_000)),
    "much of nothing": "# " + "x" * 30_000_000 + "\n" + JOB,
    "a set": JOB + "policies: !!set {training}",
    "half a character": JOB.replace("MIT", '"\\ud800"'),
    "a class": JOB.replace("MIT", "!!python/object/apply:os.system [x]"),
    "a merge with itself": JOB + "policies: &p {<<: *p, x: {y: 1}}",
    "no key": JOB + "~: 1",
    "a key that is a list": JOB + "? [a]\n: 2",
    "many ranks": JOB + f"policies: {{rewards: {{rank_shares: [{'1,' * 3_000}-1]}}}}",
    "a line break": JOB.replace("poems", '"poems\\n"'),
    "a path": JOB.replace("poems", "../poems"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*NUMBERS, *ODD])
def test_it_is_refused_in_a_short_sentence(name: str, tmp_path: Path) -> None:
    file = tmp_path / "job.yaml"
    file.write_bytes({**NUMBERS, **ODD}[name].encode("utf-8", "surrogatepass"))
    began = time.process_time()
    with pytest.raises(Invalid) as caught:
        run_spec(read_job(file))
    assert time.process_time() - began < 10.0
    assert 20 < len(str(caught.value)) < 20_000


@pytest.mark.parametrize("name", NUMBERS)
def test_so_is_a_run_spec(name: str, tmp_path: Path) -> None:
    (tmp_path / "spec.yaml").write_text("cycles: 1\n" + NUMBERS[name].removeprefix(JOB))
    with pytest.raises(Invalid):
        read_run_spec(tmp_path / "spec.yaml")


@pytest.mark.parametrize("number", [16**5000, -(16**5000), float("inf"), float("nan"), 2**64, True], ids=lambda _: "")
@pytest.mark.parametrize("field", ["replay", "start_from", "run", "policies"])
def test_so_is_what_a_script_hands_over(field: str, number: float) -> None:
    given: object = {"training": {"local_steps": number}} if field == "policies" else number
    content = {"domain": "d", "data": [{"path": "x"}], "license": "MIT", field: given}
    with pytest.raises(ConnitoError):
        run_spec(parse_job(content))


def test_a_replay_share_in_a_policy_still_counts() -> None:
    job = parse_job(
        {"domain": "d", "data": [{"path": "x"}], "license": "MIT", "policies": {"training": {"replay_share": 0.25}}}
    )
    assert job.asked_replay == 0.25
