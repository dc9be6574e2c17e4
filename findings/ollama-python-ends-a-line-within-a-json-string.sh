#!/usr/bin/env bash
# Guess: newline-delimited JSON is delimited by newlines. A client reads up to "\n", and what
#   JSON allows within a string may stand there.
# What happens: ollama's client reads its streams with httpx's iter_lines, which ends lines
#   where Python's str.splitlines does: at U+2028, U+2029 and U+0085 too. The half of the
#   line is no JSON: JSONDecodeError in the middle of an answer. JSON lets all three stand
#   unescaped in a string, and orjson, json with ensure_ascii=False and JavaScript's
#   JSON.stringify leave them so.
# Why it matters: a model that quotes a web page, or repeats the user's text, writes such a
#   character now and then: the client loses the rest of that answer, and nothing in the
#   server's log is wrong. Write these three as \u escapes in every line.
# Seen with ollama 0.6.3 (Python) and httpx 0.28.1, a line with "a" + character + "b":
#   U+00A0: json.loads reads it; ollama got 'a\xa0b'
#   U+0085: json.loads reads it; ollama raised JSONDecodeError
#   U+2028: json.loads reads it; ollama raised JSONDecodeError
#   U+2029: json.loads reads it; ollama raised JSONDecodeError
#   U+2028 as an escape: json.loads reads it; ollama got 'a\u2028b'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet ollama==0.6.3 httpx==0.28.1
cat > "$folder/look.py" <<'PY'
import http.server
import json
import threading

import ollama


def line(text, *, escape=False, done=False):
    message = {"role": "assistant", "content": text}
    form = {"model": "m", "created_at": "2026-01-01T00:00:00Z", "message": message}
    return json.dumps({**form, "done": done}, ensure_ascii=escape) + "\n"


class Server(http.server.BaseHTTPRequestHandler):
    lines: list[str] = []

    def do_POST(self):
        self.rfile.read(int(self.headers["content-length"]))
        self.send_response(200)
        self.send_header("content-type", "application/x-ndjson")
        self.end_headers()
        self.wfile.write("".join(self.lines).encode())

    def log_message(self, *_):
        pass


def heard(client):
    talk = [{"role": "user", "content": "Hi"}]
    try:
        parts = client.chat(model="m", messages=talk, stream=True)
        return f"got {''.join(part.message.content for part in parts)!r}"
    except json.JSONDecodeError as error:
        return f"raised {type(error).__name__}"


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
client = ollama.Client(host=f"http://127.0.0.1:{server.server_address[1]}")
tried = [(character, False) for character in "\u00a0\u0085\u2028\u2029"]
for character, escape in [*tried, ("\u2028", True)]:
    text = f"a{character}b"
    first = line(text, escape=escape)
    assert json.loads(first)["message"]["content"] == text
    Server.lines = [first, line("", done=True)]
    name = f"U+{ord(character):04X}" + (" as an escape" if escape else "")
    print(f"{name}: json.loads reads it; ollama {heard(client)}")
PY
found=$("$folder/venv/bin/python" "$folder/look.py")
echo "$found"
test "$found" = "U+00A0: json.loads reads it; ollama got 'a\\xa0b'
U+0085: json.loads reads it; ollama raised JSONDecodeError
U+2028: json.loads reads it; ollama raised JSONDecodeError
U+2029: json.loads reads it; ollama raised JSONDecodeError
U+2028 as an escape: json.loads reads it; ollama got 'a\\u2028b'"
