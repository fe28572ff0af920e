"""What the worker is built on: parts that know no job document and import nothing from worker.py."""

__version__ = "1.1.0"
