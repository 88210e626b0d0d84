"""The Grafana dashboards, as code: what is shown, in which order, under which heading.

`scripts/generate-dashboards` writes them as JSON to `helm/connito/files/dashboards`, from where the chart makes
ConfigMaps and `deploy/compose.yaml` provisions Grafana. A panel's help text is the catalogue's own advice for the
metric that it shows first, so that what to do stands where the bad value is seen.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from connito.runtime.metrics import CATALOGUE
from grafana_foundation_sdk.builders import common, prometheus, stat, timeseries
from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models import common as common_models
from grafana_foundation_sdk.models import dashboard as models

SOURCE = models.DataSourceRef(type_val="prometheus", uid="${datasource}")
OUT = Path(__file__).parents[2] / "helm/connito/files/dashboards"
PER_ROW = 3


@dataclass(frozen=True)
class Panel:
    """`queries` are (PromQL, legend) pairs. `unit` is a Grafana unit id. `single` shows one number."""

    title: str
    unit: str
    queries: tuple[tuple[str, str], ...]
    single: bool = False


@dataclass(frozen=True)
class Dashboard:
    """`rows` are headings with their panels; `by_run` adds a choice of runs."""

    uid: str
    title: str
    description: str
    rows: dict[str, tuple[Panel, ...]]
    by_run: bool = False


def _rate(metric: str, by: str) -> str:
    return f"sum by ({by}) (rate({metric}[$__rate_interval]))"


def _or_zero(expression: str) -> str:
    """A counter with labels has no series before its first event; nothing happened, which is not "no data"."""
    return f"{expression} or vector(0)"


def _increase(metric: str, by: str) -> str:
    return f"sum by ({by}) (increase({metric}[$__rate_interval]))"


def _quantile(q: float, metric: str, by: str = "") -> str:
    labels = f"{by}, le" if by else "le"
    return f"histogram_quantile({q}, sum by ({labels}) (rate({metric}_bucket[$__rate_interval])))"


def _mean(metric: str, by: str) -> str:
    return f"sum by ({by}) ({metric}_sum) / (sum by ({by}) ({metric}_count) > 0)"


def _age(metric: str) -> str:
    return f"(time() - max by (window) ({metric})) * (max by (window) ({metric}) > bool 0)"


BUS_AWAY = Panel("Bus connected", "bool_yes_no", (("min(connito_bus_connected)", "all connected"),), single=True)
STORE = Panel(
    "Store traffic",
    "Bps",
    ((_rate("connito_store_bytes_total", "component, direction"), "{{component}} {{direction}}"),),
)
STORE_ERRORS = Panel(
    "Store errors",
    "ops",
    ((_or_zero(_rate("connito_store_errors_total", "component, error")), "{{component}} {{error}}"),),
)
STORE_TIME = Panel("Store time, p95", "s", ((_quantile(0.95, "connito_store_seconds", "operation"), "{{operation}}"),))
CACHE = Panel("Cache lookups", "ops", ((_rate("connito_cache_total", "outcome"), "{{outcome}}"),))
COMPUTE = Panel(
    "Wait for compute, p95", "s", ((_quantile(0.95, "connito_compute_wait_seconds", "purpose"), "{{purpose}}"),)
)

PLATFORM = Dashboard(
    "connito-platform",
    "Connito / Platform",
    "Whether the platform works: leaders, broker, queues, store.",
    {
        "Now": (
            BUS_AWAY,
            Panel("Leaders", "none", (("sum by (lease) (connito_leader)", "{{lease}}"),), single=True),
            Panel(
                "Certificate that ends first",
                "s",
                (("min(connito_certificate_expiry_timestamp_seconds) - time()", "left"),),
                single=True,
            ),
        ),
        "Log": (
            Panel(
                "Published",
                "ops",
                ((_rate("connito_events_published_total", "component, outcome"), "{{component}} {{outcome}}"),),
            ),
            Panel(
                "Publish time, p99", "s", ((_quantile(0.99, "connito_publish_seconds", "component"), "{{component}}"),)
            ),
            Panel(
                "Received",
                "ops",
                ((_rate("connito_events_received_total", "component, stream"), "{{component}} {{stream}}"),),
            ),
            Panel(
                "Lag of the followers",
                "s",
                (("max by (component, stream) (connito_event_lag_seconds)", "{{component}} {{stream}}"),),
            ),
            Panel(
                "Reconnects",
                "none",
                ((_or_zero(_increase("connito_bus_reconnects_total", "component")), "{{component}}"),),
            ),
            Panel(
                "Leases lost",
                "none",
                ((_or_zero(_increase("connito_lease_lost_total", "lease")), "{{lease}}"),),
            ),
        ),
        "Work queues": (
            Panel("Waiting", "none", (("max by (durable) (connito_consumer_pending_messages)", "{{durable}}"),)),
            Panel(
                "Handled",
                "ops",
                ((_rate("connito_messages_handled_total", "durable, outcome"), "{{durable}} {{outcome}}"),),
            ),
            Panel(
                "Time to handle, p95", "s", ((_quantile(0.95, "connito_handler_seconds", "durable"), "{{durable}}"),)
            ),
        ),
        "Decisions": (
            Panel(
                "Time to decide, p99", "s", ((_quantile(0.99, "connito_decide_seconds", "component"), "{{component}}"),)
            ),
            Panel("Actions", "ops", ((_rate("connito_actions_total", "action, outcome"), "{{action}} {{outcome}}"),)),
            Panel("Actions running", "none", (("sum by (component) (connito_actions_running)", "{{component}}"),)),
        ),
        "Store": (STORE, STORE_TIME, STORE_ERRORS),
        "Machine": (CACHE, COMPUTE),
        "Trust": (
            Panel(
                "Rejected messages",
                "none",
                ((_or_zero(_increase("connito_events_rejected_total", "reason")), "{{reason}}"),),
            ),
            Panel(
                "Security events",
                "none",
                (
                    (
                        _or_zero(_increase("connito_security_events_total", "component, kind")),
                        "{{component}} {{kind}}",
                    ),
                ),
            ),
        ),
    },
)

RUN = Dashboard(
    "connito-run",
    "Connito / Run",
    "What a run achieves: losses, windows, submissions, gate.",
    {
        "Result": (
            Panel("Held-out loss on the target domain", "none", (("connito_target_loss", "{{run}}"),)),
            Panel("Held-out loss on general domains", "none", (("connito_general_loss", "{{run}}"),)),
            Panel("Experts deposited", "none", (("sum(connito_experts_deposited_total)", "experts"),), single=True),
        ),
        "Cycle": (
            Panel("Open for", "s", ((_age("connito_window_opened_timestamp_seconds"), "{{window}}"),)),
            Panel("Past its deadline", "s", ((_age("connito_window_deadline_timestamp_seconds"), "{{window}}"),)),
            Panel(
                "Length of closed windows, mean",
                "s",
                (
                    (
                        _mean("connito_window_seconds", "window, cause"),
                        "{{window}} {{cause}}",
                    ),
                ),
            ),
        ),
        "Submissions": (
            Panel("By outcome", "none", (("sum by (outcome) (connito_submissions_total)", "{{outcome}}"),)),
            Panel(
                "Refused, by reason", "none", ((_or_zero("sum by (reason) (connito_refusals_total)"), "{{reason}}"),)
            ),
            Panel("Uploaded", "bytes", (("sum(connito_upload_bytes_total)", "bytes"),)),
        ),
        "Judgement": (
            Panel(
                "Time to score one, p95",
                "s",
                (
                    (_quantile(0.95, "connito_score_seconds"), "p95"),
                    (_quantile(0.5, "connito_score_seconds"), "median"),
                ),
            ),
            Panel(
                "Validators disagree",
                "percentunit",
                (("max(connito_validator_disagreement_ratio)", "farthest from consensus"),),
            ),
            Panel(
                "Trust in validators",
                "percentunit",
                (("min by (validator) (connito_validator_trust_ratio)", "{{validator}}"),),
            ),
            Panel("Gate", "none", (("sum by (decision) (connito_gate_decisions_total)", "{{decision}}"),)),
            # The series goes with its run; what it was last still shows.
            Panel(
                "Cycles nobody cosigned",
                "none",
                (("max by (run) (last_over_time(connito_unaudited_cycles[$__rate_interval]))", "{{run}}"),),
            ),
        ),
        "Start": (
            Panel(
                "Time to select experts",
                "s",
                ((_mean("connito_selection_seconds", "component"), "mean"),),
            ),
        ),
    },
    by_run=True,
)

MINER = Dashboard(
    "connito-miner",
    "Connito / Miner",
    "A miner's own machine: is it connected, does it train, does it upload.",
    {
        "Now": (
            BUS_AWAY,
            Panel("Tokens trained", "short", (("sum(connito_train_tokens_total)", "tokens"),), single=True),
            Panel("Uploaded", "bytes", (("sum(connito_upload_bytes_total)", "bytes"),), single=True),
        ),
        "Training": (
            Panel("Tokens per second", "none", ((_rate("connito_train_tokens_total", "instance"), "{{instance}}"),)),
            Panel(
                "Time of a step",
                "s",
                (
                    (_quantile(0.5, "connito_train_step_seconds", "instance"), "{{instance}} median"),
                    (_quantile(0.95, "connito_train_step_seconds", "instance"), "{{instance}} p95"),
                ),
            ),
            COMPUTE,
        ),
        "Network and disk": (STORE, STORE_ERRORS, CACHE),
        "Cycle": (
            Panel("Actions", "none", (("sum by (action, outcome) (connito_actions_total)", "{{action}} {{outcome}}"),)),
            Panel(
                "Published",
                "none",
                (("sum by (kind, outcome) (connito_events_published_total)", "{{kind}} {{outcome}}"),),
            ),
            Panel(
                "Reconnects",
                "none",
                ((_or_zero(_increase("connito_bus_reconnects_total", "instance")), "{{instance}}"),),
            ),
        ),
    },
)

DASHBOARDS = (PLATFORM, RUN, MINER)

# Name, label and label's values of what filters every panel. Empty where Prometheus adds no such label: then all is shown.
FILTERS = (("namespace", "Namespace"), ("release", "Release"))
# From which value on a number is bad, by the panel's title.
BAD_ABOVE = {"Lag of the followers": 5, "Store errors": 0.01, "Rejected messages": 1, "Security events": 1,
             "Reconnects": 1, "Leases lost": 1, "Past its deadline": 60, "Validators disagree": 0.3,
             "Cycles nobody cosigned": 2}  # fmt: skip


def filtered(expression: str, by_run: bool) -> str:
    """`expression` with the dashboard's choices in the selector of every metric."""

    def add(match: re.Match[str]) -> str:
        name, given = match[1], match[2] or ""
        labels = [f'{label}=~"${label}"' for label, _ in FILTERS]
        known = re.sub(r"_(bucket|sum|count)$", "", name) if name not in CATALOGUE else name
        if by_run and "run" in CATALOGUE[known].labels and "run=" not in given:
            labels.append('run=~"$run"')
        return f"{name}{{{', '.join([*filter(None, [given]), *labels])}}}"

    return re.sub(r"\b(connito_[a-z0-9_]+)(?:\{([^}]*)\})?", add, expression)


def advice(expression: str) -> str:
    """What the catalogue says about the first metric of a query."""
    for name in re.findall(r"connito_[a-z0-9_]+", expression):
        for known in (name, re.sub(r"_(bucket|sum|count)$", "", name)):
            if known in CATALOGUE:
                metric = CATALOGUE[known]
                return f"{metric.help}.\n\n{metric.when_bad}"
    raise ValueError(f"no metric of the catalogue in {expression!r}")


def _panel(panel: Panel, by_run: bool) -> stat.Panel | timeseries.Panel:
    built: stat.Panel | timeseries.Panel
    if panel.single:
        built = stat.Panel().reduce_options(common.ReduceDataOptions().calcs(["lastNotNull"]))
    else:
        built = timeseries.Panel().fill_opacity(5).legend(
            common.VizLegendOptions().display_mode(common_models.LegendDisplayMode.LIST)
            .placement(common_models.LegendPlacement.BOTTOM).show_legend(True)
        )  # fmt: skip
    built.title(panel.title).description(advice(panel.queries[0][0])).unit(panel.unit).datasource(SOURCE)
    for index, (expression, legend) in enumerate(panel.queries):
        built.with_target(
            prometheus.Dataquery()
            .expr(filtered(expression, by_run))
            .legend_format(legend)
            .ref_id(chr(ord("A") + index))
            .datasource(SOURCE)
        )
    if panel.title in BAD_ABOVE:
        steps = [models.Threshold(None, "green"), models.Threshold(BAD_ABOVE[panel.title], "red")]
        built.thresholds(build.ThresholdsConfig().mode(models.ThresholdsMode.ABSOLUTE).steps(steps))
        if isinstance(built, timeseries.Panel):
            shown = common_models.GraphTresholdsStyleMode.DASHED
            built.thresholds_style(common.GraphThresholdsStyleConfig().mode(shown))
    return built.span(24 // PER_ROW).height(4 if panel.single else 8)


def render(dashboard: Dashboard) -> str:
    """The JSON that Grafana provisions."""
    built = (
        build.Dashboard(dashboard.title).uid(dashboard.uid).description(dashboard.description).tags(["connito"])
        .refresh("15s").time("now-3h", "now").timezone("browser").readonly()
        .with_variable(build.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
    )  # fmt: skip
    for name, label in FILTERS:
        built.with_variable(
            build.QueryVariable(name).label(label).datasource(SOURCE).query(f"label_values(connito_bus_connected, {name})")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).include_all(True).all_value(".*").multi(True)
        )  # fmt: skip
    built.link(
        build.DashboardLink("Connito").type(models.DashboardLinkType.DASHBOARDS).tags(["connito"])
        .as_dropdown(True).include_vars(True).keep_time(True)
    )  # fmt: skip
    for name, metric, shown in (
        ("New versions", "connito_gate_decisions_total", True),
        # Five a cycle: shown by whoever asks for them.
        ("Windows that open", "connito_window_opened_timestamp_seconds", False),
    ):
        built.annotation(
            build.AnnotationQuery().name(name).datasource(SOURCE).enable(shown).icon_color("blue")
            .expr(filtered(f"changes({metric}[1m]) > 0", False))
        )  # fmt: skip
    if dashboard.by_run:
        built.with_variable(
            build.QueryVariable("run").label("Run").datasource(SOURCE).query("label_values(connito_target_loss, run)")
            .refresh(models.VariableRefresh.ON_TIME_RANGE_CHANGED).include_all(True).all_value(".*").multi(True)
        )  # fmt: skip
    for heading, panels in dashboard.rows.items():
        built.with_row(build.Row(heading))
        for panel in panels:
            built.with_panel(_panel(panel, dashboard.by_run))
    return json.dumps(built.build(), cls=JSONEncoder, indent=2, sort_keys=True) + "\n"


def main(out: Path) -> None:
    """Write every dashboard into `out`."""
    out.mkdir(parents=True, exist_ok=True)
    for dashboard in DASHBOARDS:
        (out / f"{dashboard.uid.removeprefix('connito-')}.json").write_text(render(dashboard))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else OUT)
