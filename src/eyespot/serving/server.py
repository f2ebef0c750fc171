"""`eyespot serve`: models, their engines, the API and the page, in one process."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

try:
    import prometheus_client  # noqa: F401
    import uvicorn
    from fastapi import FastAPI
except ImportError as error:
    raise ImportError(
        'the server needs FastAPI, uvicorn and prometheus-client; pip install "eyespot[serve]"'
    ) from error
from eyespot.inference import load
from eyespot.processing.images import open_image
from eyespot.serving.api import build_app
from eyespot.serving.engine import Engine
from eyespot.serving.exchange import talk_with, trace_with
from eyespot.serving.limits import LONGEST_RETRY_S, Limits, Seats
from eyespot.serving.metrics import Metrics

KEEP_ALIVE_S = 2 * LONGEST_RETRY_S  # who is told to come back finds the connection open
LOCAL = ("127.0.0.1", "::1", "localhost")


def serve(
    models: Sequence[str],
    *,
    names: Sequence[str] = (),
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    allow_urls: bool = False,
    page: bool = True,
    examples: Sequence[Sequence[str]] = (),
    device: str = "auto",
    dtype: str = "auto",
    adapter: str | None = None,
    limits: Limits | None = None,
) -> None:
    """Answer requests until the process is told to stop; then finish what runs.

    Args:
        models: folders. names: one for each, for clients; by default those of the runs or folders.
        api_key: asked for everywhere but at /health.
        page: whether the page stands at /. examples: pictures with questions, for the page.
        device, dtype, adapter: as ``eyespot.load`` takes them.

    Raises:
        ValueError: a model cannot be loaded, two have the same name, the key is empty, or an example is no picture.
    """
    limits = limits or Limits()
    if api_key == "":
        raise ValueError("the API key is empty, so everybody would have it; give one, or leave --api-key out")
    for picture, _ in examples:
        open_image(picture)  # says what is wrong
    found = _named(models, names)
    if adapter is not None and len(models) > 1:
        raise ValueError(f"--adapter is for one model, {len(models)} were given; serve them apart")
    with ExitStack() as stack:
        metrics = Metrics()
        engines = [
            stack.enter_context(Engine(load(folder, device, dtype, adapter), name, limits, metrics))
            for name, folder in found.items()
        ]
        app = make_app(engines, limits, metrics, api_key=api_key, allow_urls=allow_urls, page=page, examples=examples)
        _announce(list(found), host, port, api_key)
        config = uvicorn.Config(
            app, host=host, port=port, log_level="warning", timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=round(limits.timeout_s) + 1,
        )  # fmt: skip
        with suppress(KeyboardInterrupt):  # it has ended in order
            Server(config).run()


class Server(uvicorn.Server):
    """One that ends the page's heartbeats, which never end by themselves, before it waits for what runs."""

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """What uvicorn calls at the end."""
        for route in self.config.app.routes:  # type: ignore[union-attr]
            if (heartbeats := getattr(getattr(route, "app", None), "stop_event", None)) is not None:
                heartbeats.set()
        await super().shutdown(sockets)


def make_app(
    engines: Sequence[Engine],
    limits: Limits,
    metrics: Metrics,
    *,
    api_key: str | None = None,
    allow_urls: bool = False,
    page: bool = True,
    examples: Sequence[Sequence[str]] = (),
) -> FastAPI:
    """API and page over running engines; both take their seats from the same room."""
    seats = Seats(limits.queue + limits.max_batch * len(engines))
    app = build_app(engines, limits, metrics, seats, api_key=api_key, allow_urls=allow_urls)
    return _with_page(app, engines, seats, examples) if page else app


def _with_page(app: FastAPI, engines: Sequence[Engine], seats: Seats, examples: Sequence[Sequence[str]]) -> FastAPI:
    if importlib.util.find_spec("gradio") is None:
        print('no page at /: gradio is not installed; pip install "eyespot[serve]", or --no-page', file=sys.stderr)
        return app
    from eyespot.serving.drawing import trace_of
    from eyespot.serving.page import build_page, mount

    talks = {engine.name: talk_with(engine, seats) for engine in engines}
    traces = {engine.name: trace_with(engine, seats, trace_of(engine.assistant)) for engine in engines}
    limits = engines[0].limits
    page = build_page(
        talks, traces=traces, examples=[(path, text) for path, text in examples], most_tokens=limits.max_tokens
    )
    return mount(app, page, max_file_size=limits.max_image_bytes)


def _named(models: Sequence[str], names: Sequence[str]) -> dict[str, str]:
    """Folders by name. A run's folder is called model; its name is that of the folder above.

    Raises:
        ValueError: not one name for each model, or the same name twice.
    """
    if names and len(names) != len(models):
        raise ValueError(f"{len(names)} names for {len(models)} models; give --name once for each model, or not at all")
    found = dict(zip(names or map(_name, models), models, strict=True))
    if len(found) < len(models):
        raise ValueError(f"two models have the same name ({', '.join(found)}); give --name once for each model")
    return found


def _name(model: str) -> str:
    path = Path(model).resolve()
    return path.parent.name if path.name == "model" else path.name


def _announce(names: Sequence[str], host: str, port: int, api_key: str | None) -> None:
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {', '.join(names)} at http://{shown}:{port} (API below /v1; Ctrl+C stops)", flush=True)
    if api_key is None and host not in LOCAL:
        print(f"anybody who reaches {host} may ask; --api-key or EYESPOT_API_KEY sets a key", file=sys.stderr)
