"""How many threads of torch act in a server."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from dmr_pipeline.serve import in_process

pytestmark = pytest.mark.usefixtures("torch_threads")


def threads_of_a_server() -> int:
    """As its acting thread has them."""
    with ThreadPoolExecutor(1, initializer=in_process.leave_a_core) as pool:
        return pool.submit(torch.get_num_threads).result()


@pytest.mark.parametrize(("cores", "threads"), [(1, 1), (2, 1), (5, 4)])
def test_one_core_is_left_to_who_answers(cores: int, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(in_process, "cores", lambda: cores)
    torch.set_num_threads(3)
    assert threads_of_a_server() == threads


def test_who_says_how_many_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(in_process, "cores", lambda: 8)
    torch.set_num_threads(3)
    assert threads_of_a_server() == 3
