"""The task types hcna-ray brings. Importing this package declares them all.

The types of `drgfc` and `qegg` are open stand-ins: a package that registers the same names takes
their place. Heavy libraries are imported when a handler runs, so that the composite can check
payloads without them.
"""

from hcna_ray.handlers.builtin import drgfc, echo, ping, qegg, sleep

__all__ = ["drgfc", "echo", "ping", "qegg", "sleep"]
