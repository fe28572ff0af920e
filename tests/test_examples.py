"""What is copied from the project: the example of a job type, and the names that a module of job types imports."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import worker
from testbed.processes import SOURCE
from testbed.provider import Provider
from tests.lab import bare_settings, generate
from tests.site import CACHE
from worker import celery_configuration

EXAMPLES = SOURCE / "examples"


def test_the_examples_job_type_works(provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(worker, "HANDLERS", dict(worker.HANDLERS))
    settings = bare_settings(handler_modules="summary_handler", openai_base_url=provider.url)
    [module] = celery_configuration(settings)["imports"]
    monkeypatch.delitem(sys.modules, module, raising=False)
    importlib.import_module(module)
    result = generate("summary_generation", {"text": "A long text [say short]"}, settings)
    assert result.output == {"generated_text": "short", "model_used": "testbed-model", "tokens_used": 7}


# ── the names of worker.py ───────────────────────────────────────────────────────────────────────────────────────

OWN_MODULE = """
from worker import Call, FailJob, JobInput, Media, Result, RetryJob, handles


class Poster(JobInput):
    title: str


@handles("poster_generation", Poster, provider="image")
async def make_poster(call: Call) -> Result:
    if not call.settings.image_sizes:
        raise FailJob("no sizes are set", "Posters aren't offered.")
    poster: Poster = call.input
    data, model = await call.provider.image({"model": call.model, "prompt": poster.title})
    if not data:
        raise RetryJob("an empty picture", after_s=5)
    call.progress(f"{poster.title} is done")
    return Result({"model_used": model}, Media(data, "png", "image_url"))
"""
WRONG_MODULE = OWN_MODULE.replace("-> Result:", "-> str:")


def type_check(*files: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs mypy as an operator does who has the project's folder on the path, strictly."""
    command = [sys.executable, "-m", "mypy", "--strict", "--cache-dir", str(CACHE / "mypy"), *map(str, files)]
    (folder / "mypy.ini").write_text(f"[mypy]\nmypy_path = {SOURCE}\n[mypy-fsspec.*]\nignore_missing_imports = True\n")
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=280)


def test_the_names_for_modules_of_job_types_are_these() -> None:
    assert set(worker.__all__) == {"Call", "FailJob", "JobInput", "Media", "Result", "RetryJob", "handles"}


@pytest.mark.slow
@pytest.mark.timeout(300)  # without a cache mypy reads every library, which takes minutes on a busy machine
def test_a_module_of_job_types_is_type_checked_strictly(tmp_path: Path) -> None:
    files: dict[str, str] = {"own_types.py": OWN_MODULE, "wrong_types.py": WRONG_MODULE}
    for name, source in files.items():
        (tmp_path / name).write_text(source)
    ended = type_check(*(tmp_path / name for name in files), EXAMPLES / "summary_handler.py", folder=tmp_path)
    faults = [line for line in ended.stdout.splitlines() if ": error: " in line]
    assert {line.partition(":")[0] for line in faults} == {"wrong_types.py"}, ended.stdout + ended.stderr
