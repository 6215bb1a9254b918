"""C1, the composite: the whole system behind one HTTP API, served by Ray Serve.

`app.build_app` makes a FastAPI application around what it is handed: a moderator, a reader of the
store, the task types, the keys, the artifacts, a clock. Nothing here decides anything about a task;
a route checks, asks the moderator or the reader, and puts the answer into words.

How a request travels: `limits` (size, headers, encoding) -> `routing` (who, and is there room) ->
a route in `routes/` -> `gather` (writes, one batch to the moderator at a time), `reads` (one thread
with a connection of its own) or `waiters` (one change feed for every waiting client).

`deployment` and `ray_moderator` are the only modules that know Ray. May import everything below:
runtime's values, store, handlers, observability, security, config and core.
"""
