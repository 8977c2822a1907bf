"""MLflow: to MLFLOW_TRACKING_URI, or without it into the run's folder, `mlflow.db`."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

from assay.train.tracking.base import About, told

EXPERIMENT = "assay"
NAME = "assay.run"
LONGEST = 500  # characters of a parameter's value


class Mlflow:
    def __init__(self, about: About) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self._metric = Metric
        uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(about.folder / 'mlflow.db').resolve()}"
        self._client = MlflowClient(uri)
        known = self._client.get_experiment_by_name(EXPERIMENT)
        place = known.experiment_id if known is not None else self._client.create_experiment(EXPERIMENT)
        runs = self._client.search_runs([place], f"tags.`{NAME}` = '{about.name}'") if about.step else []
        if runs:
            self._run = runs[0].info.run_id
            self._client.update_run(self._run, status="RUNNING")
            return
        self._run = self._client.create_run(place, run_name=about.folder.name, tags={NAME: about.name}).info.run_id
        fields = [Param(path, str(value)[:LONGEST]) for path, value in about.fields.items()]
        for first in range(0, len(fields), 100):  # as many as a call may have
            self._client.log_batch(self._run, params=fields[first : first + 100])

    def write(self, row: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        found = [self._metric(name, value, now, row["step"]) for name, value in told(row).items()]
        self._client.log_batch(self._run, metrics=found)

    def close(self) -> None:
        self._client.set_terminated(self._run)


def opened(about: About) -> Mlflow:
    return Mlflow(about)
