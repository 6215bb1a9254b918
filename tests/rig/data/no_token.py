"""Call Ray's GCS with the certificate of this machine and the token that is given, or none."""

from __future__ import annotations

import sys
from pathlib import Path

import grpc

address, folder, token = sys.argv[1], Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else ""
pem = (folder / "node.pem").read_bytes()
credentials = grpc.ssl_channel_credentials((folder / "trust.pem").read_bytes(), pem, pem)
with grpc.secure_channel(address, credentials) as channel:
    call = channel.unary_unary("/ray.rpc.NodeInfoGcsService/GetClusterId")
    metadata = [("authorization", f"Bearer {token}")] if token else []
    try:
        call(b"", timeout=5, metadata=metadata)
        print("answered")
    except grpc.RpcError as error:
        print(error.code().name)  # type: ignore[attr-defined]
