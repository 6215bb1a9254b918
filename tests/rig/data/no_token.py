"""Call Ray with the certificate of this machine and the token that is given, or none.

``no_token.py HOST:PORT FOLDER [TOKEN [METHOD]]``; the GCS is called unless METHOD says otherwise.
"""

from __future__ import annotations

import sys
from pathlib import Path

import grpc

address, folder, token, method, *_ = [*sys.argv[1:], "", ""]
pem = (Path(folder) / "node.pem").read_bytes()
trust = (Path(folder) / "trust.pem").read_bytes()
credentials = grpc.ssl_channel_credentials(trust, pem, pem)
with grpc.secure_channel(address, credentials) as channel:
    call = channel.unary_unary(method or "/ray.rpc.NodeInfoGcsService/GetClusterId")
    metadata = [("authorization", f"Bearer {token}")] if token else []
    try:
        call(b"", timeout=5, metadata=metadata)
        print("answered")
    except grpc.RpcError as error:
        print(error.code().name)  # type: ignore[attr-defined]
