#!/usr/bin/env bash
# Guess: OpenAI lets a function leave out its parameters ("defines a function with an empty
#   parameter list"), so chat templates with tools take such a function.
# What happens: of the templates that llama.cpp ships as the models' own, 7 of the 64 that take
#   a function whose parameters are an object without properties fail if they are left out,
#   among them those of Hermes 2 and 3, Command R and Seed-OSS. Jinja raises, in 4 for
#   what is undefined, in 3 for what is no JSON. null and {} fail in one.
# Why it matters: an agent with a tool that takes nothing works with most models and gets an
#   error from these. A server should write the empty object before it renders.
# Seen with the sdist of llama-cpp-python 0.3.36 and jinja2 3.1.6, rendered as Hugging Face does:
#   templates that take a function with an empty object: 64
#   parameters left out: 7 fail
#   parameters null: 1 fail
#   parameters empty: 1 fail
#   parameters an object: 1 fail
#   parameters an object without properties: 0 fail
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install --quiet jinja2==3.1.6
venv/bin/pip download --quiet --no-deps --no-binary :all: llama-cpp-python==0.3.36
tar -xzf llama_cpp_python-*.tar.gz --wildcards --strip-components=4 '*/llama.cpp/models/templates/*.jinja'
cat > look.py <<'PY'
import json
import pathlib

import jinja2
import jinja2.sandbox


def refuse(words):
    raise jinja2.TemplateError(words)


def as_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


world = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=["jinja2.ext.loopcontrols"],
)
world.filters["tojson"] = as_json
world.globals |= {"raise_exception": refuse, "strftime_now": lambda form: "2026"}
ASKS = {"role": "user", "content": "What time is it?"}
NOW = {"name": "now", "description": "Tells the time."}
FORMS = {
    "left out": NOW,
    "null": NOW | {"parameters": None},
    "empty": NOW | {"parameters": {}},
    "an object": NOW | {"parameters": {"type": "object"}},
    "an object without properties": NOW | {"parameters": {"type": "object", "properties": {}}},
}


def fails(template, function):
    """Whether it fails."""
    tools = [{"type": "function", "function": function}]
    given = {"bos_token": "<s>", "eos_token": "</s>", "add_generation_prompt": True}
    try:
        template.render(messages=[ASKS], tools=tools, **given)
    except Exception:  # what Jinja raises is of many kinds
        return True
    return False


templates = {}
for path in sorted(pathlib.Path().glob("**/*.jinja")):
    try:
        template = world.from_string(path.read_text())
    except jinja2.TemplateError:
        continue
    if not fails(template, FORMS["an object without properties"]):
        templates[path.stem] = template
print("templates that take a function with an empty object:", len(templates))
for form, function in FORMS.items():
    failed = [name for name, template in templates.items() if fails(template, function)]
    print(f"parameters {form}: {len(failed)} fail")
PY
found=$(venv/bin/python look.py)
echo "$found"
test "$found" = 'templates that take a function with an empty object: 64
parameters left out: 7 fail
parameters null: 1 fail
parameters empty: 1 fail
parameters an object: 1 fail
parameters an object without properties: 0 fail'
