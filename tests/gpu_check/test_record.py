"""A part that fails is a failure, and no other part's."""

import torch

from dmr_pipeline.gpu_check.record import Part, Skipped, new_record, run_part

CPU = torch.device("cpu")


def test_what_a_part_raises_is_written_down_and_the_next_part_runs() -> None:
    def breaks(part: Part) -> None:
        part.row(what="before", time=1.23456)
        raise RuntimeError("no kernel image\nis available")

    def skips(part: Part) -> None:
        raise Skipped("no GPU")

    def differs(part: Part) -> None:
        part.check("one is one", True, 1)
        part.check("one is two", False, 1)

    record = new_record(True, CPU)
    for work in (breaks, skips, lambda part: part.check("all well", True, "yes"), differs):
        record.parts.append(run_part("a part", work, CPU))
    assert [part.outcome for part in record.parts] == ["failed", "skipped", "passed", "failed"]
    assert record.parts[0].problem == "RuntimeError: no kernel image is available"
    assert record.parts[0].rows == [{"what": "before", "time": 1.235}]
    assert record.parts[1].problem == "no GPU"
    assert record.parts[3].problem == "does not hold: one is two"
    assert not record.passed
    record.parts = record.parts[1:3]
    assert record.passed
