"""The API's side of the worker, small enough to copy, with a page for people. `python -m examples.api` starts it.

jobs.py has what it does with documents and messages, live.py what pages are sent while jobs run, and app.py the routes.
"""
