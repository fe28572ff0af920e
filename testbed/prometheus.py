"""A Prometheus server as a child process, which reads one exporter every second and knows this project's alerts."""

from __future__ import annotations

import json
import shutil
import urllib.error
import urllib.parse
import urllib.request
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from testbed.processes import LOOPBACK, Server, ServerUnavailable

ANSWER_S: Final = 30.0
CONFIGURATION: Final = """
global:
  scrape_interval: 1s
  scrape_timeout: 1s
  evaluation_interval: 1s
rule_files: [{rules}]
scrape_configs:
  - job_name: ai_worker
    scrape_timeout: 1s
    static_configs:
      - targets: [{target}]
"""


def find_prometheus(name: str = "prometheus") -> Path:
    """Return the server's binary, or that of `promtool`.

    Raises: ServerUnavailable.
    """
    if found := shutil.which(name):
        return Path(found)
    raise ServerUnavailable(f"no {name}: install it with apt-get install prometheus (macOS: brew)")


class PrometheusServer(Server):
    """A Prometheus that scrapes one address."""

    name = "prometheus"

    def __init__(self, target: str, rules: Path, port: int = 0, directory: Path | None = None) -> None:
        """Choose the exporter (host and port) and the file of alerts, but start nothing."""
        super().__init__(port, LOOPBACK, directory)
        self.target, self.rules = target, rules

    @property
    def url(self) -> str:
        """The URL of its interface."""
        return f"http://{self.address}"

    def ask(self, path: str, **parameters: str) -> Any:
        """Return the data of an answer of its interface. Raises: ValueError, which says what is wrong with a query."""
        url = f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        try:
            with urllib.request.urlopen(url, timeout=ANSWER_S) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise ValueError(json.load(error).get("error")) from None

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the series that an expression has now, each with its labels and its value. Raises: ValueError."""
        found = self.ask("query", query=expression)["result"]
        return [{**series["metric"], "value": float(series["value"][1])} for series in found]

    def _command(self) -> list[str]:
        """Return the server's command line, with its configuration written."""
        configuration = self.directory / "prometheus.yml"
        configuration.write_text(
            CONFIGURATION.format(rules=json.dumps(str(self.rules)), target=json.dumps(self.target))
        )
        command = [str(find_prometheus()), f"--config.file={configuration}", f"--web.listen-address={self.address}"]
        return [*command, f"--storage.tsdb.path={self.directory / 'data'}"]

    def _answers(self) -> bool:
        """Return whether it is ready to be asked."""
        with suppress(OSError), urllib.request.urlopen(f"{self.url}/-/ready", timeout=2) as answer:
            return bool(answer.status == 200)
        return False
