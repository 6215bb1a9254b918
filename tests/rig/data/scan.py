"""Connect to every TCP port of a host; ``scan.py HOST`` prints those that accepted, as JSON.

A port that is closed says so at once; one that a firewall drops costs the whole wait, so many are
tried at a time.
"""

from __future__ import annotations

import errno
import json
import resource
import select
import socket
import sys
import time

_WAIT_S = 3.0
_AT_ONCE = 4000


def accepting(host: str, ports: range) -> list[int]:
    """Return those ports that accept a connection, in no order."""
    found, poll, waiting = [], select.epoll(), {}
    for port in ports:
        one = socket.socket()
        one.setblocking(False)
        if one.connect_ex((host, port)) not in (0, errno.EINPROGRESS):
            one.close()
            continue
        waiting[one.fileno()] = one, port
        poll.register(one, select.EPOLLOUT)
    until = time.monotonic() + _WAIT_S
    while waiting and (left := until - time.monotonic()) > 0:
        for number, _ in poll.poll(left):
            one, port = waiting.pop(number)
            if one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0:
                found.append(port)
            one.close()
    for one, _ in waiting.values():
        one.close()
    poll.close()
    return found


hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 2 * _AT_ONCE), hard))
ports = range(1, 65536)
batches = [ports[at : at + _AT_ONCE] for at in range(0, len(ports), _AT_ONCE)]
print(json.dumps(sorted(port for batch in batches for port in accepting(sys.argv[1], batch))))
