"""Durable homes of tasks: a protocol (`base`), an in-memory twin, and SQLite.

The moderator is the only writer. Nothing here imports Ray, FastAPI or httpx.
"""
