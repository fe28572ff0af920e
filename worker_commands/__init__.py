"""The commands of `python worker.py`, a module each. A module is loaded when its command is called."""
