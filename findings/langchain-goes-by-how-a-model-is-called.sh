#!/usr/bin/env bash
# Guess: with a base_url of one's own, ChatOpenAI of langchain-openai sends what it was told
#   to /v1/chat/completions; the model's name is a string that it passes on.
# What happens: the name decides, whoever the server is. With "codex" in it the request goes
#   to /v1/responses. After "gpt-5" the temperature is dropped, unless "chat" is in the name
#   as well. After "o" and a digit a system message becomes a "developer" one.
# Why it matters: a server's alias for its own model changes what clients ask for. Call a code
#   model "my-codex", and a server without /v1/responses answers 404; call one
#   "gpt-5-at-home" so that tools accept it, and every temperature 0 is lost without a word;
#   call one "o1-at-home", and a chat template that knows no "developer" drops its message.
# Seen with langchain-openai 1.7.4, langchain-core 1.8.3 and openai 3.57.0, temperature 0:
#   my-model: /v1/chat/completions, temperature 0.0, roles system user
#   my-codex: /v1/responses, temperature 0.0, roles system user
#   gpt-5-at-home: /v1/chat/completions, temperature none, roles system user
#   gpt-5-chat-at-home: /v1/chat/completions, temperature 0.0, roles system user
#   o1-at-home: /v1/chat/completions, temperature 0.0, roles developer user
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet langchain-openai==1.7.4 langchain-core==1.8.3 \
    openai==3.57.0
cat > "$folder/look.py" <<'PY'
import http.server
import json
import threading

from langchain_openai import ChatOpenAI

ANSWER = {"role": "assistant", "content": "Hello."}
CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "m",
    "choices": [{"index": 0, "message": ANSWER, "finish_reason": "stop"}],
}
WRITTEN = {"type": "output_text", "text": "Hello.", "annotations": []}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "status": "completed",
    "content": [WRITTEN],
}
RESPONSE = {
    "id": "resp_1",
    "object": "response",
    "created_at": 1,
    "status": "completed",
    "model": "m",
    "output": [MESSAGE],
    "parallel_tool_calls": True,
    "tool_choice": "auto",
    "tools": [],
}
asked = []


class Server(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        form = json.loads(self.rfile.read(int(self.headers["content-length"])))
        asked.append((self.path, form))
        reply = json.dumps(RESPONSE if self.path.endswith("responses") else CHAT).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(reply)))
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
threading.Thread(target=server.serve_forever, daemon=True).start()
base = f"http://127.0.0.1:{server.server_address[1]}/v1"
for name in ("my-model", "my-codex", "gpt-5-at-home", "gpt-5-chat-at-home", "o1-at-home"):
    model = ChatOpenAI(model=name, base_url=base, api_key="none", temperature=0)
    assert model.invoke([("system", "Be brief."), ("user", "Hi")]).text == "Hello."
    path, form = asked[-1]
    roles = [message["role"] for message in form.get("messages") or form["input"]]
    print(
        f"{name}: {path}, temperature {form.get('temperature', 'none')}, roles", *roles
    )
PY
found=$("$folder/venv/bin/python" "$folder/look.py")
echo "$found"
test "$found" = "my-model: /v1/chat/completions, temperature 0.0, roles system user
my-codex: /v1/responses, temperature 0.0, roles system user
gpt-5-at-home: /v1/chat/completions, temperature none, roles system user
gpt-5-chat-at-home: /v1/chat/completions, temperature 0.0, roles system user
o1-at-home: /v1/chat/completions, temperature 0.0, roles developer user"
