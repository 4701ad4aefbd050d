"""llama.cpp's own server, as the package xllamacpp brings it: one process for each GGUF file.

python -m tests.helpers.llama_cpp FILE [KEY]       prints its address, and serves until its input ends
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from tests.helpers.fake_project import REPOSITORY


class Engine(NamedTuple):
    address: str
    process: subprocess.Popen[str]


@contextmanager
def llama_servers(key: str, **files: Path) -> Iterator[dict[str, Engine]]:
    """One of each file, by its name."""
    command = [sys.executable, "-m", "tests.helpers.llama_cpp"]
    with ExitStack() as stack:
        processes = {
            name: stack.enter_context(
                subprocess.Popen(
                    [*command, str(path), key],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=REPOSITORY,
                )
            )
            for name, path in files.items()
        }  # fmt: skip
        for process in processes.values():
            stack.callback(process.kill)
        found = {}
        for name, process in processes.items():
            assert process.stdout is not None
            address = next((line.strip() for line in process.stdout if line.startswith("http://")), None)
            assert address, f"llama.cpp does not serve {files[name]}"
            found[name] = Engine(address, process)
        yield found


def main() -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.api_keys = sys.argv[1], sys.argv[2:]
    params.n_parallel, params.n_ctx, params.n_threads_http = 2, 1024, 4
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_predict, params.ctx_shift, params.warmup = 8, True, False
    server = xllamacpp.Server(params)
    print(server.listening_address, flush=True)  # noqa: T201 - to the process that has started this one
    sys.stdin.read()


if __name__ == "__main__":
    main()
