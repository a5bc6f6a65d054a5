"""What a load test does now, for Prometheus: dashboards show it beside the server's numbers."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

from loadtest.errors import LoadTestError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from prometheus_client import CollectorRegistry

    from loadtest.commands.session import Settings
    from loadtest.sending.runner import Progress

    Watch = Callable[[Progress, float | None], None]

LABELS = ("label", "workload", "arrivals")


class Exporter:
    """Gauges of the run under way, in a registry of their own."""

    def __init__(self) -> None:
        # late: `kvthrift serve` sets prometheus_client's mode before anything imports it
        from prometheus_client import CollectorRegistry, Gauge

        self.registry = CollectorRegistry()

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(f"kvthrift_loadtest_{name}", text, LABELS, registry=self.registry)

        self._running = gauge("running", "1 while requests are sent.")
        self._planned = gauge("planned_requests", "Requests of the run.")
        self._done = gauge("done_requests", "Requests that ended, failed ones included.")
        self._failed = gauge("failed_requests", "Requests that failed.")

    def show(self, settings: Settings, state: Progress) -> None:
        """Set the gauges of a run."""
        run = (settings.label, str(settings.workload), str(settings.arrivals))
        self._running.labels(*run).set(1)
        self._planned.labels(*run).set(state.total)
        self._done.labels(*run).set(state.done)
        self._failed.labels(*run).set(state.errors)

    def beside(self, settings: Settings, watch: Watch) -> Watch:
        """A display that sets the gauges too."""

        def show(state: Progress, use: float | None) -> None:
            self.show(settings, state)
            watch(state, use)

        return show

    def over(self, settings: Settings) -> None:
        """The run is over."""
        self._running.labels(settings.label, str(settings.workload), str(settings.arrivals)).set(0)


@contextmanager
def exporter(where: str | None) -> Iterator[Exporter | None]:
    """Serve the gauges on ``HOST:PORT``; None: do not.

    Raises:
        LoadTestError: not an address, or it is taken.

    """
    if where is None:
        yield None
        return
    found = Exporter()
    with served(where, found.registry):
        yield found


@contextmanager
def served(where: str, registry: CollectorRegistry) -> Iterator[None]:
    """Serve a registry on ``HOST:PORT``.

    Raises:
        LoadTestError: not an address, or it is taken.

    """
    host, _, port = where.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise LoadTestError(f"--serve-metrics {where!r} is not HOST:PORT, e.g. 127.0.0.1:9101")
    from prometheus_client import start_http_server

    try:
        server, thread = start_http_server(int(port), host, registry)
    except OSError as error:
        raise LoadTestError(f"--serve-metrics {where}: {error.strerror}") from None
    try:
        yield
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
