"""The console and tracing as the chart installs them."""

from __future__ import annotations

from typing import Any

import pytest
from helm_python.errors import HelmError

from .conftest import environment, find, of_kind, pod_specs, render, rendered, values_of

CONSOLE = {"enabled": True, "existingSecret": "connito-customer"}


def with_console(**values: Any) -> dict[str, Any]:
    return values_of("platform") | {"console": {**CONSOLE, **values}}


def test_the_console_is_installed_only_where_it_is_wanted() -> None:
    assert "connito-console" not in {item["metadata"]["name"] for item in rendered("platform")}
    assert "connito-console" in {item["metadata"]["name"] for item in of_kind(rendered("production"), "Deployment")}


def test_nobody_reads_it_without_a_token_or_a_proxy() -> None:
    with pytest.raises(HelmError, match=r"console\.tokenSecret"):
        render(with_console())
    with pytest.raises(HelmError, match=r"console\.proxies"):
        render(with_console(userHeader="X-Forwarded-Email"))
    spec = pod_specs(rendered("production"))["Deployment/connito-console"]
    variables = environment(spec["containers"][0])
    assert variables["CONNITO_CONSOLE_TOKEN"] == {"secretKeyRef": {"name": "connito-console", "key": "token"}}
    assert variables["CONNITO_CONSOLE_PROXIES"] == "10.1.2.0/24"
    assert variables["CONNITO_CONSOLE_SECURE_COOKIE"] == "true"


def test_the_page_has_a_service_and_a_way_in() -> None:
    service = find(rendered("production"), "Service", "connito-console")["spec"]
    assert {port["name"]: port["targetPort"] for port in service["ports"]} == {"page": "page", "http": "http"}
    policy = find(rendered("production"), "NetworkPolicy", "connito-page")["spec"]
    assert policy["podSelector"]["matchLabels"]["app.kubernetes.io/component"] == "console"
    assert [port["port"] for rule in policy["ingress"] for port in rule["ports"]] == [8088]


def test_traces_are_sent_by_everybody_or_nobody() -> None:
    for spec in pod_specs(rendered("platform")).values():
        assert not [name for name in environment(spec["containers"][0]) if name.startswith("OTEL_")]
    objects = rendered("production")
    for item in of_kind(objects, "Deployment", "StatefulSet"):
        variables = environment(item["spec"]["template"]["spec"]["containers"][0])
        assert variables["OTEL_EXPORTER_OTLP_ENDPOINT"] == "http://otel-collector.monitoring.svc:4318"
        assert variables["OTEL_TRACES_SAMPLER_ARG"] == "0.1"
    egress = find(objects, "NetworkPolicy", "connito-tracing")["spec"]["egress"]
    assert [port["port"] for rule in egress for port in rule["ports"]] == [4318]


def test_who_checks_tokens_reaches_the_provider_and_nobody_else_does() -> None:
    oidc = {"oidc": {"issuer": "https://login.example.com:8443/x", "audience": "connito"}}
    page = {"client": "console", "url": "https://c.example.com", "secretName": "sso"}
    objects = render(with_console(oidc=page) | oidc)
    knows = {
        name.partition("/")[2]
        for name, spec in pod_specs(objects).items()
        if environment(spec["containers"][0]).get("CONNITO_OIDC_ISSUER")
    }
    assert knows == {"connito-coordinator", "connito-library", "connito-console"}
    variables = environment(pod_specs(objects)["Deployment/connito-console"]["containers"][0])
    assert variables["CONNITO_CONSOLE_OIDC_SECRET"] == {"secretKeyRef": {"name": "sso", "key": "client-secret"}}
    assert variables["CONNITO_CONSOLE_URL"] == "https://c.example.com"
    egress = find(objects, "NetworkPolicy", "connito-oidc")["spec"]["egress"]
    assert [port["port"] for rule in egress for port in rule["ports"]] == [8443]
    for wrong, words in (({"oidc": {**oidc["oidc"], "audience": ""}}, "audience"), ({}, "issuer")):
        with pytest.raises(HelmError, match=words):
            render(with_console(tokenSecret="t", oidc=page) | wrong)
