"""Durable homes of tasks: a protocol (`base`), an in-memory twin, SQLite, and PostgreSQL.

`factory` opens the one that the settings name. The moderator is the only writer. Nothing here
imports Ray, FastAPI or httpx.
"""
