#!/usr/bin/env bash
# Guess: llama-cpp-python installs llama.cpp's shared libraries once, beside the package that
#   loads them; what else is in the wheel is Python.
# What happens: each library is there six times: under its three names (.so, .so.0, .so.0.x.y:
#   a wheel keeps no symbolic links, so each is a copy) and in two places, llama_cpp/lib and a
#   folder lib at the top of site-packages, where llama.cpp's C headers, CMake files and
#   libllama-common, which Python never loads, are as well. Only llama_cpp/lib is loaded.
# Why it matters: four fifths of an image's or a wheelhouse's llama.cpp are copies. Of a build
#   with a GPU's backend, which is hundreds of megabytes by itself, all six are paid for. And a
#   second package with a folder lib or include shares them.
# Seen with llama-cpp-python 0.3.36, built on Linux by pip; the first run compiles llama.cpp,
# which takes some minutes:
#   libllama.so* 6 times in llama_cpp/lib, lib
#   libggml-cpu.so* 6 times in llama_cpp/lib, lib
#   headers outside the package: yes
#   loaded from: llama_cpp/lib
#   copies are more than two thirds of the wheel: yes
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset SOURCE_DATE_EPOCH  # with it llama.cpp is built without AVX
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llama-cpp-python==0.3.36
cat > "$folder/look.py" <<'PY'
import collections
import importlib.metadata

files = importlib.metadata.files("llama-cpp-python")
copies = collections.defaultdict(list)
for file in files:
    if ".so" in file.name:
        copies[file.hash.value].append(file)
for name in ("libllama.so", "libggml-cpu.so"):
    (same,) = [c for c in copies.values() if any(file.name == name for file in c)]
    places = sorted({str(file.parent) for file in same}, reverse=True)
    print(f"{name}* {len(same)} times in {', '.join(places)}")
headers = [file for file in files if file.suffix == ".h"]
outside = headers and not any("llama_cpp" in file.parts for file in headers)
print(f"headers outside the package: {'yes' if outside else 'no'}")

from llama_cpp import llama_cpp

llama_cpp.llama_backend_init()
with open("/proc/self/maps") as maps:
    mapped = [line.split()[-1] for line in maps if "libllama" in line]
used = {str(f.parent) for f in files if str(f.locate()) in mapped}
print(f"loaded from: {', '.join(sorted(used))}")
once = sum(same[0].size for same in copies.values())
total = sum(file.size or 0 for file in files)
every = sum(sum(file.size for file in same) for same in copies.values())
print(f"copies are more than two thirds of the wheel: {'yes' if every - once > total * 2 / 3 else 'no'}")
PY
found=$("$folder/venv/bin/python" "$folder/look.py")
echo "$found"
test "$found" = "libllama.so* 6 times in llama_cpp/lib, lib
libggml-cpu.so* 6 times in llama_cpp/lib, lib
headers outside the package: yes
loaded from: llama_cpp/lib
copies are more than two thirds of the wheel: yes"
