"""What is shipped for Prometheus and Grafana names metrics that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from hermes_gunicorn.monitor import metrics
from hermes_gunicorn.monitor.watch import Watch

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize("name", ["prometheus-alerts.yml", "grafana.json"])
def test_every_metric_exists(name):
    watch = Watch()
    watch.about |= {"worker_class": "hermes", "gunicorn": "27", "name": "app"}
    known = set()
    for family in text_string_to_metric_families(metrics.render(watch, "")[1].decode()):
        known |= {family.name, f"{family.name}_total", f"{family.name}_info"}
    named = set(re.findall(r"hermes_(?:worker|bind|workers)\w*", (DEPLOY / name).read_text()))
    assert named
    assert named <= known
