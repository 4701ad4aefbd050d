"""An OpenAI-compatible server that answers at once, and fails when it is told to: the upstream of `dmr bench serve`.

python -m dmr_pipeline.serve.echo [N]       every N-th request fails with 500; prints its address
"""

import sys
from itertools import count

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route


def make_echo(fail_every: int = 0) -> Starlette:
    """
    Args:
        fail_every: of so many requests one fails; 0: none.
    """
    numbers = count(1)

    async def chat(request: Request) -> Response:
        await request.body()
        if fail_every and next(numbers) % fail_every == 0:
            return JSONResponse({"error": {"message": "told to fail"}}, 500)
        choice = {"index": 0, "message": {"role": "assistant", "content": "look"}, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        content = {
            "id": "1",
            "object": "chat.completion",
            "created": 1,
            "model": "echo",
            "choices": [choice],
            "usage": usage,
        }
        return JSONResponse(content)

    async def models(_: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": "echo", "object": "model"}]})

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"]), Route("/v1/models", models)])


def main() -> None:
    config = uvicorn.Config(make_echo(int(sys.argv[1]) if sys.argv[1:] else 0), port=0, log_level="critical")
    server = uvicorn.Server(config)
    sockets = [config.bind_socket()]
    sys.stdout.write(f"http://127.0.0.1:{sockets[0].getsockname()[1]}/v1\n")
    sys.stdout.flush()
    server.run(sockets)


if __name__ == "__main__":
    main()
