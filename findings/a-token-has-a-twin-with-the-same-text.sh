#!/usr/bin/env bash
# Guess: a token of a vocabulary can be told by its text, so the "token" and "bytes" of a
#   logprob say which one was chosen, replies that agree in text agree in tokens, and a bias
#   on the ids of a tokenized text keeps that text away.
# What happens: vocabularies with byte tokens have most of ASCII twice. Llama 2's and Phi 3's
#   "!" is 29991 and, as the byte <0x21>, 36. Tokenizing gives one of them, a model may choose
#   the other, and both come out as the same bytes. BPE of bytes (GPT-2, Llama 3, Qwen 2) has
#   no twins.
# Why it matters: of two greedy replies that part at such a tie, texts show it one token too
#   late, where no tie excuses it: a comparison of ours took 123 right replies of 25,800 for
#   wrong. logit_bias on what /tokenize says of "!" leaves "!" possible.
# Seen with llama-cpp-python 0.3.36 and the vocabularies in its source package; the first run
# compiles llama.cpp, which takes some minutes:
#   gpt-2: 0 texts of several tokens
#   llama-bpe: 0 texts of several tokens
#   qwen2: 0 texts of several tokens
#   llama-spm: 96 texts of several tokens; '!' is 36 and 29991, in 'a!' it is 29991
#   phi-3: 96 texts of several tokens; '!' is 36 and 29991, in 'a!' it is 29991
#   gemma-4: 110 texts of several tokens; '!' is 271 and 236888, in 'a!' it is 236888
#   the likeliest token's text after a bias of -100 on that one: '!'
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset SOURCE_DATE_EPOCH  # with it llama.cpp is built without AVX
python3 -m venv "$folder/venv"
pip="$folder/venv/bin/pip"
"$pip" download --quiet --no-deps --no-binary :all: --dest "$folder" llama-cpp-python==0.3.36
"$pip" install --quiet llama-cpp-python==0.3.36
mkdir "$folder/source"
tar -xzf "$folder"/llama_cpp_python-*.tar.gz -C "$folder/source" --strip-components=1
cat > "$folder/look.py" <<'PY'
import collections
import ctypes
import sys

import numpy as np
from llama_cpp import llama_cpp as llama

quiet = llama.llama_log_callback(lambda *_: None)
llama.llama_log_set(quiet, ctypes.c_void_p(0))
room = ctypes.create_string_buffer(1024)


def opened(name):
    params = llama.llama_model_default_params()
    params.vocab_only = True
    path = f"{sys.argv[1]}/ggml-vocab-{name}.gguf".encode()
    return llama.llama_model_get_vocab(llama.llama_model_load_from_file(path, params))


def text_of(vocab, token):
    size = llama.llama_token_to_piece(vocab, token, room, 1024, 0, True)
    return room.raw[: max(0, size)]


def token_after_a(vocab, text):
    ids = (ctypes.c_int32 * 16)()
    count = llama.llama_tokenize(vocab, b"a" + text, len(text) + 1, ids, 16, False, False)
    return ids[count - 1]


for name in ("gpt-2", "llama-bpe", "qwen2", "llama-spm", "phi-3", "gemma-4"):
    vocab = opened(name)
    tokens = collections.defaultdict(list)
    for token in range(llama.llama_vocab_n_tokens(vocab)):
        tokens[text_of(vocab, token)].append(token)
    twins = {text: ids for text, ids in tokens.items() if text and len(ids) > 1}
    line = f"{name}: {len(twins)} texts of several tokens"
    if twins:
        both = " and ".join(map(str, twins[b"!"]))
        line += f"; '!' is {both}, in 'a!' it is {token_after_a(vocab, b'!')}"
    print(line)

# In Gemma's vocabulary: a row of logits in which both are ahead, and a bias on one.
logits = np.zeros(llama.llama_vocab_n_tokens(vocab), np.float32)
logits[twins[b"!"]] = 10
bias = llama.llama_logit_bias(token_after_a(vocab, b"!"), -100.0)
records = np.zeros(len(logits), np.dtype(llama.llama_token_data))
records["id"], records["logit"] = np.arange(len(logits)), logits
data = ctypes.cast(records.ctypes.data, llama.llama_token_data_p)
array = llama.llama_token_data_array(data, len(logits), -1, False)
for sampler in (
    llama.llama_sampler_init_logit_bias(len(logits), 1, ctypes.byref(bias)),
    llama.llama_sampler_init_greedy(),
):
    llama.llama_sampler_apply(sampler, ctypes.byref(array))
chosen = text_of(vocab, int(records["id"][array.selected])).decode()
print(f"the likeliest token's text after a bias of -100 on that one: {chosen!r}")
PY
"$folder/venv/bin/python" "$folder/look.py" "$folder/source/vendor/llama.cpp/models" | tee "$folder/seen"
grep -q "^gpt-2: 0 texts of several tokens$" "$folder/seen"
grep -q "^qwen2: 0 texts of several tokens$" "$folder/seen"
grep -q "^llama-spm: 96 texts of several tokens; '!' is 36 and 29991, in 'a!' it is 29991$" \
    "$folder/seen"
grep -q "^gemma-4: 110 texts of several tokens; " "$folder/seen"
grep -q "^the likeliest token's text after a bias of -100 on that one: '!'$" \
    "$folder/seen"
