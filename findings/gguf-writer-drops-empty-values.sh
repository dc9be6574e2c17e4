#!/usr/bin/env bash
# Guess: gguf.GGUFWriter writes every value it is given, or raises.
# What happens: an empty string and an empty list are left out of the file without a word;
#   the count of metadata entries says so, and a reader finds no such field. A list of lists
#   comes back flat, its inner borders gone.
# Why it matters: a tool that copies a model's metadata through gguf loses what was there and
#   empty (a prompt that is "", say, which means "no prefix" where a missing one may mean
#   "the default"), and a test that writes a model with an empty list tests a model without one.
# Seen with gguf 0.19.0 and numpy 2.4.6:
#   written: an.empty.list, an.empty.text, a.list.of.lists, a.text
#   read: a.list.of.lists, a.text
#   a.list.of.lists: [1, 2, 3]
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet gguf==0.19.0 numpy==2.4.6
cat > "$folder/look.py" <<'PY'
import sys
import gguf

path = sys.argv[1]
values = {
    "an.empty.list": ("add_array", []),
    "an.empty.text": ("add_string", ""),
    "a.list.of.lists": ("add_array", [[1, 2], [3]]),
    "a.text": ("add_string", "x"),
}
writer = gguf.GGUFWriter(path, "bert")
for name, (method, value) in values.items():
    getattr(writer, method)(name, value)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
fields = gguf.GGUFReader(path).fields
print("written:", ", ".join(values))
print("read:", ", ".join(sorted(name for name in fields if name in values)))
print("a.list.of.lists:", fields["a.list.of.lists"].contents())
PY
found=$("$folder/venv/bin/python" "$folder/look.py" "$folder/model.gguf")
echo "$found"
test "$found" = 'written: an.empty.list, an.empty.text, a.list.of.lists, a.text
read: a.list.of.lists, a.text
a.list.of.lists: [1, 2, 3]'
