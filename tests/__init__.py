"""Tests with real servers and real worker processes; those of the worker's parts are in test_worker.py."""

import pytest

# So that a failing assertion there shows its values, as one in a test does.
pytest.register_assert_rewrite("tests.lab", "tests.site", "tests.place", "tests.outage_lab")
