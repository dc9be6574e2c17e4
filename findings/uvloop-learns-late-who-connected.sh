#!/usr/bin/env bash
# Guess: accept() hands over the client's address, so a server always knows who connected,
#   whichever event loop it runs on.
# What happens: asyncio's own loop keeps the address that accept() gave it. uvloop asks the
#   kernel again (getpeername) when the protocol asks, and a client that has reset its
#   connection by then has no address any more: get_extra_info("peername") is None, while
#   what the client had sent before is still delivered to data_received().
# Why it matters: code that reads `(peername or ("",))[0]` has an empty address for such a
#   client. Whatever an empty address means there (a unix socket, an unknown client, one
#   that no limit is kept for) is then decided by who resets early. Treat "unknown" as
#   unknown: drop the connection.
# Seen with uvloop 0.23.0 and Python 3.11.7 on Linux:
#   asyncio: address known, 5 bytes delivered
#   uvloop: address None, 5 bytes delivered
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet uvloop==0.23.0
cat > "$folder/look.py" <<'PY'
import asyncio
import socket
import struct
import uvloop


class Look(asyncio.Protocol):
    def __init__(self, seen, over):
        self.seen, self.over = seen, over

    def connection_made(self, transport):
        self.seen["address"] = transport.get_extra_info("peername")

    def data_received(self, data):
        self.seen["bytes"] = self.seen.get("bytes", 0) + len(data)

    def connection_lost(self, error):
        self.over.set()


async def look():
    loop, seen, over = asyncio.get_running_loop(), {}, asyncio.Event()
    server = await loop.create_server(lambda: Look(seen, over), "127.0.0.1", 0)
    # The loop does not run until the client has come, written and gone.
    with socket.create_connection(server.sockets[0].getsockname()) as client:
        client.sendall(b"hello")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await asyncio.wait_for(over.wait(), 10)
    server.close()
    return seen


for name, factory in (("asyncio", asyncio.new_event_loop), ("uvloop", uvloop.new_event_loop)):
    with asyncio.Runner(loop_factory=factory) as runner:
        seen = runner.run(look())
    address = "known" if seen["address"] else seen["address"]
    print(f"{name}: address {address}, {seen.get('bytes', 0)} bytes delivered")
PY
found=$("$folder/venv/bin/python" "$folder/look.py")
echo "$found"
expected='asyncio: address known, 5 bytes delivered
uvloop: address None, 5 bytes delivered'
test "$found" = "$expected"
