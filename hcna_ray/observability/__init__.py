"""How the system shows what it does: metric names and their exposition, and the log's format.

Plain values in, text out: nothing here knows Ray, HTTP or the store. May import `hcna_ray.config`
and `hcna_ray.core` only.
"""
