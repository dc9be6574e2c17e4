#!/usr/bin/env bash
# Guess: openai for Python asks for base64 by itself, and hands on a vector of the numbers
#   that the server put there; of another type than float32, if the request said so (Cohere,
#   Voyage and vLLM have such fields, and extra_body sends them).
# What happens: whatever the type, the bytes are read as float32. Eight int8 numbers become
#   two floats, 384 of them 96. Neither the length nor the type is compared with anything, so
#   there is no warning.
# Why it matters: an index fills with numbers like 1e-37, and every search in it still gives
#   results. Who asks for integers or bits through this client has to send
#   encoding_format="float" too; a server cannot tell it from one that reads the bytes well.
# Seen with openai 2.54.0 on Python 3.11:
#   asked for base64; int8 [-8, 7, 7, 1, 0, -3, 2, 5]: 2 floats
#   asked for float; int8 [-8, 7, 7, 1, 0, -3, 2, 5]: 8 numbers, as they were sent
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet openai==2.54.0
cat > "$folder/look.py" <<'PY'
import base64
import http.server
import json
import struct
import threading

import openai

NUMBERS = [-8, 7, 7, 1, 0, -3, 2, 5]


class Handler(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.asked = asked["encoding_format"]
        assert asked["output_dtype"] == "int8"
        row = NUMBERS
        if asked["encoding_format"] == "base64":
            row = base64.b64encode(struct.pack("8b", *NUMBERS)).decode()
        data = [{"object": "embedding", "index": 0, "embedding": row}]
        usage = {"prompt_tokens": 1, "total_tokens": 1}
        told = {"object": "list", "model": "m", "data": data, "usage": usage}
        body = json.dumps(told).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
threading.Thread(target=server.serve_forever, daemon=True).start()
url = f"http://127.0.0.1:{server.server_port}/v1"
client = openai.OpenAI(base_url=url, api_key="none")
for given in ({}, {"encoding_format": "float"}):
    reply = client.embeddings.create(
        model="m", input="a", extra_body={"output_dtype": "int8"}, **given
    )
    found = reply.data[0].embedding
    is_same = found == NUMBERS
    shown = f"{len(found)} numbers, as they were sent" if is_same else f"{len(found)} floats"
    print(f"asked for {server.asked}; int8 {NUMBERS}: {shown}")
PY
found=$("$folder/venv/bin/python" "$folder/look.py")
echo "$found"
test "$found" = 'asked for base64; int8 [-8, 7, 7, 1, 0, -3, 2, 5]: 2 floats
asked for float; int8 [-8, 7, 7, 1, 0, -3, 2, 5]: 8 numbers, as they were sent'
