"""Every query that dashboards and alert rules make, and what is in it."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

import httpx

from hcna_ray.observability import alerts, monitoring

#: Words of PromQL that are no metric.
WORDS = {"by", "on", "unless", "and", "or", "without", "ignoring", "bool", "le"}


def queries() -> Iterator[tuple[str, str]]:
    """Yield every PromQL of dashboards and rules, and where it is from."""
    for alert in alerts.ALERTS:
        yield alert.name, alert.expr
        yield f"{alert.name} in Grafana", f"({alert.expr}) ^ 0"
    for name, dashboard in monitoring.dashboards().items():
        for panel in dashboard["panels"]:
            for target in panel.get("targets", ()):
                if target["datasource"]["type"] == "prometheus":
                    yield f"{name}: {panel['title']}", target["expr"]
        for variable in dashboard["templating"]["list"]:
            if variable["type"] == "query":
                match = re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"])
                assert match, variable
                yield f"{name}: {variable['name']}", f"count by ({match[2]}) ({match[1]})"


def filled(expr: str) -> str:
    """Return a query as Grafana sends it."""
    return re.sub(r"\$(?!__)\w+", ".*", expr.replace("$__rate_interval", "1m"))


def metrics_in(expr: str) -> set[str]:
    """Return the names of metrics in a query: what is neither function, label nor word."""
    bare = re.sub(r'"[^"]*"', "", expr)
    bare = re.sub(r"\{[^}]*\}|\[[^\]]*\]", "", bare)
    bare = re.sub(r"\b(by|on|without|ignoring)\s*\([^)]*\)", "", bare)
    names = re.findall(r"\b[a-z_:][\w:]*\b(?!\s*\()", bare)
    return set(names) - WORDS


def selectors_in(expr: str) -> set[str]:
    """Return what a query selects: each metric with the labels that are asked of it."""
    names = "|".join(sorted(map(re.escape, metrics_in(expr)), key=len, reverse=True))
    return set(re.findall(rf"\b(?:{names})\b(?:\{{[^}}]*\}})?", expr)) if names else set()


def wanted() -> dict[str, str]:
    """Return what must find something while a cluster works, by where it is from.

    A rule finds something only if something is wrong: of rules, everything that they look at must
    be there, and they must be ones that can be evaluated.
    """
    found: dict[str, str] = {}
    for where, expr in queries():
        if where.startswith("Hcna"):
            found |= {f"{where}: {one}": one for one in selectors_in(expr)}
            found[where] = f"({filled(expr)}) or vector(0)"
            continue
        name = where
        while name in found:
            name += "'"
        found[name] = filled(expr)
    return found


def found(prometheus: httpx.Client, expr: str) -> list[float]:
    """Return the values of a query that are numbers."""
    reply = prometheus.get("/api/v1/query", params={"query": expr}).json()
    assert reply["status"] == "success", (expr, reply)
    result = reply["data"]["result"]
    if reply["data"]["resultType"] == "scalar":
        return [float(result[1])]
    values = [float(one["value"][1]) for one in result]
    return [value for value in values if not math.isnan(value)]
