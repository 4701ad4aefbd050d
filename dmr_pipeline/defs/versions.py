"""The data versions that Dagster's instance records."""

from datetime import UTC, datetime

import dagster as dg
from dagster._core.definitions.data_version import extract_data_version_from_entry  # not exported

DATA_VERSION_TAG = "dagster/data_version"
_PAGE = 100


def recorded_version(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str) -> str | None:
    """Of the last materialisation or observation; None where there is none."""
    record = instance.get_latest_data_version_record(key, partition_key=partition)
    return _version(record) if record else None


def recorded_at(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str, version: str) -> datetime | None:
    """When a materialisation of this version was recorded last; None where none was."""
    wanted, cursor = dg.AssetRecordsFilter(key, [partition]), None
    while True:
        found = instance.fetch_materializations(wanted, _PAGE, cursor)
        for record in found.records:
            if _version(record) == version:
                return datetime.fromtimestamp(record.timestamp, UTC)
        if not found.has_more:
            return None
        cursor = found.cursor


def _version(record: dg.EventLogRecord) -> str | None:
    version = extract_data_version_from_entry(record.event_log_entry)
    return version.value if version else None
