"""The data versions that Dagster's instance records."""

import dagster as dg
from dagster._core.definitions.data_version import extract_data_version_from_entry  # not exported

DATA_VERSION_TAG = "dagster/data_version"


def recorded_version(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str) -> str | None:
    """Of the last materialisation or observation; None where there is none."""
    record = instance.get_latest_data_version_record(key, partition_key=partition)
    version = extract_data_version_from_entry(record.event_log_entry) if record else None
    return version.value if version else None
