"""An API in front of the worker, small enough to copy: `python -m examples.api`."""
