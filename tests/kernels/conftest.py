"""Kernel tests run on a CPU: every kernel of this process is interpreted (executor.py says how, and how exactly)."""

import executor

executor.interpret()
