"""Run by an interpreter that has Airflow: loads a folder of DAG files and runs the one DAG there for one date.

    python airflow_run.py DAGS DATE...

Prints one JSON object: import errors, what Airflow understood, and per date the states of the run and its tasks.
"""

import json
import sys
from datetime import UTC, datetime

try:
    from airflow.dag_processing.dagbag import DagBag  # Airflow 3
except ImportError:
    from airflow.models.dagbag import DagBag
from airflow.timetables.base import TimeRestriction

bag = DagBag(sys.argv[1])
found = {"errors": bag.import_errors}
for dag in bag.dags.values():
    found |= {
        "upstream": {t.task_id: sorted(t.upstream_task_ids) for t in dag.tasks},
        "retries": sorted({t.retries for t in dag.tasks}),
        "depends_on_past": sorted({t.depends_on_past for t in dag.tasks}),
        "catchup": dag.catchup,
        "dates": [],
        "runs": [],
    }
    restriction, interval = TimeRestriction(dag.start_date, None, dag.catchup), None
    for _ in range(3):
        info = dag.timetable.next_dagrun_info(last_automated_data_interval=interval, restriction=restriction)
        interval = info.data_interval
        found["dates"].append(interval.start.date().isoformat())
    for text in sys.argv[2:]:
        day = datetime.fromisoformat(text).replace(tzinfo=UTC)
        run = dag.test(logical_date=day)
        states = {i.task_id: str(i.state) for i in run.get_task_instances()}
        found["runs"].append({"date": text, "state": str(run.state), "tasks": states})
print(json.dumps(found))
