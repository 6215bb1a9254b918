"""The Ray side: the moderator (no Ray inside), its actor shell, node agents, slots and attempts.

`hcna_ray.api` may import this package. What crosses a process border is in `messages`.
"""
