"""llama.cpp's server, unmodified, with a model of random weights. It runs in an environment of its own.

`python tiny_llama.py MODEL_FILE PORT [KEY]` writes the model's file and serves it. testbed/requirements/llama.txt lists
the packages.
"""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Final

import gguf
import numpy
import xllamacpp

CONTEXT_TOKENS: Final = 32_768  # to fill it takes minutes, so that a text can be cancelled before it ends by itself
WIDTH: Final = 128
INNER_WIDTH: Final = 256
LAYERS: Final = 2
HEADS: Final = 4
CHAT_TEMPLATE: Final = "{% for message in messages %}{{ message['content'] }} {% endfor %}"

# One token for each byte, as every tokenizer of this kind has, and one for each letter. The model writes only letters.
LETTERS: Final = [chr(code) for code in range(ord("a"), ord("z") + 1)]
BYTES: Final = [f"<0x{byte:02X}>" for byte in range(256)]
TOKENS: Final = ["<unk>", "<s>", "</s>", *BYTES, *LETTERS]


def _write_vocabulary(writer: gguf.GGUFWriter) -> None:
    """Write the tokens, all of the same rank, and what makes a prompt of a conversation."""
    kind = gguf.TokenType
    kinds = [kind.UNKNOWN, kind.CONTROL, kind.CONTROL, *[kind.BYTE] * len(BYTES), *[kind.NORMAL] * len(LETTERS)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(TOKENS)
    writer.add_token_types(kinds)
    writer.add_token_scores([0.0] * len(TOKENS))
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)


def _write_shape(writer: gguf.GGUFWriter) -> None:
    """Write the numbers that say how large the model is."""
    writer.add_context_length(CONTEXT_TOKENS)
    writer.add_vocab_size(len(TOKENS))
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER_WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_layer_norm_rms_eps(1e-5)


def _write_weights(writer: gguf.GGUFWriter) -> None:
    """Write random weights, the same each time. No output leads to the end of the text, so it never ends by itself."""
    random = numpy.random.default_rng(seed=1)

    def add(name: str, *shape: int, scale: float = 0.05) -> None:
        writer.add_tensor(f"{name}.weight", (random.standard_normal(shape) * scale).astype(numpy.float32))

    def add_ones(name: str) -> None:
        writer.add_tensor(f"{name}.weight", numpy.ones(WIDTH, numpy.float32))

    add("token_embd", len(TOKENS), WIDTH, scale=1)
    output = numpy.zeros((len(TOKENS), WIDTH), numpy.float32)
    output[-len(LETTERS) :] = random.standard_normal((len(LETTERS), WIDTH))
    writer.add_tensor("output.weight", output)
    add_ones("output_norm")
    for layer in (f"blk.{number}" for number in range(LAYERS)):
        add_ones(f"{layer}.attn_norm")
        add_ones(f"{layer}.ffn_norm")
        for part in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{layer}.{part}", WIDTH, WIDTH)
        for part in ("ffn_gate", "ffn_up"):
            add(f"{layer}.{part}", INNER_WIDTH, WIDTH)
        add(f"{layer}.ffn_down", WIDTH, INNER_WIDTH)


def write_model(path: Path) -> None:
    """Write the model's file, two megabytes."""
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("random letters")
    _write_shape(writer)
    _write_vocabulary(writer)
    _write_weights(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def serve(model: Path, port: int, keys: list[str]) -> None:
    """Serve the model until the process is ended. One text is written at a time, and its context is not shared."""
    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(model)
    parameters.hostnames = ["127.0.0.1"]
    parameters.port = port
    parameters.api_keys = keys
    parameters.n_ctx = CONTEXT_TOKENS
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    print(server.listening_address, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    file = Path(sys.argv[1])
    write_model(file)
    serve(file, int(sys.argv[2]), sys.argv[3:])
