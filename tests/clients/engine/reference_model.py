#!/usr/bin/env python3
"""A second, independent computation of what real_models_test.cc expects: numpy in float64, everything from the GGUF file
(weights decoded by whole-array arithmetic, tokens by plain merging), all tokens at once. Llama and Gemma 3 files.

usage: reference_model.py MODEL.gguf TEXT TOKENS      prints the first token ids and the perplexity of the first TOKENS tokens
needs numpy
"""
import re
import struct
import sys

import numpy as np

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}


class Gguf:
    def __init__(self, path):
        self.data = np.memmap(path, dtype=np.uint8, mode="r")
        self.at = 8
        tensors, keys = self.scalar("Q"), self.scalar("Q")
        self.meta = {}
        for _ in range(keys):
            key = self.text()
            self.meta[key] = self.value(self.scalar("I"))
        places = {}
        for _ in range(tensors):
            name = self.text()
            shape = [self.scalar("Q") for _ in range(self.scalar("I"))][::-1]
            places[name] = (shape, self.scalar("I"), self.scalar("Q"))
        align = self.meta.get("general.alignment", 32)
        self.begin, self.places = -(-self.at // align) * align, places

    def scalar(self, kind):
        (value,) = struct.unpack_from("<" + kind, self.data, self.at)
        self.at += struct.calcsize("<" + kind)
        return value

    def text(self):
        n = self.scalar("Q")
        self.at += n
        return bytes(self.data[self.at - n : self.at]).decode()

    def value(self, kind):
        if kind == 8:
            return self.text()
        if kind == 9:
            inner, n = self.scalar("I"), self.scalar("Q")
            return [self.value(inner) for _ in range(n)]
        return self.scalar(SCALARS[kind])

    def tensor(self, name):
        shape, kind, offset = self.places[name]
        n = int(np.prod(shape))
        group, size = {0: (1, 4), 1: (1, 2), 3: (32, 20), 6: (32, 22), 8: (32, 34), 12: (256, 144), 14: (256, 210)}[kind]
        raw = np.array(self.data[self.begin + offset : self.begin + offset + n // group * size]).reshape(-1, size)

        def half(first):
            return raw[:, first : first + 2].copy().view(np.float16).astype(np.float64)

        if kind == 0:
            out = raw.view(np.float32)
        elif kind == 1:
            out = raw.view(np.float16)
        elif kind == 8:
            out = half(0) * raw[:, 2:].view(np.int8)
        elif kind in (3, 6):
            codes = raw[:, 4 if kind == 3 else 6 :]
            codes = np.concatenate([codes & 15, codes >> 4], 1).astype(np.float64)
            if kind == 3:
                out = half(0) * codes + half(2)
            else:
                word = raw[:, 2:6].copy().view(np.uint32)
                out = half(0) * (codes + 16 * ((word >> np.arange(32, dtype=np.uint32)) & 1) - 16)
        elif kind == 12:
            p = raw[:, 4:16].astype(int)
            scale = np.concatenate([p[:, 0:4] & 63, (p[:, 8:12] & 15) | (p[:, 0:4] >> 6) << 4], 1)
            low = np.concatenate([p[:, 4:8] & 63, (p[:, 8:12] >> 4) | (p[:, 4:8] >> 6) << 4], 1)
            q = raw[:, 16:].reshape(-1, 4, 32)
            codes = np.stack([q & 15, q >> 4], 2).reshape(-1, 8, 32)
            out = (half(0) * scale)[:, :, None] * codes - (half(2) * low)[:, :, None]
        else:
            low, high = raw[:, :128].reshape(-1, 2, 2, 32), raw[:, 128:192].reshape(-1, 2, 1, 32)
            nibbles = np.stack([low & 15, low >> 4], 2).reshape(-1, 2, 4, 32)
            upper = (high >> np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)) & 3
            codes = (nibbles.astype(int) | upper.astype(int) << 4) - 32
            scale = half(208) * raw[:, 192:208].view(np.int8)
            out = scale[:, :, None] * codes.reshape(-1, 16, 16)
        return out.astype(np.float64).reshape(shape)


def merged(parts, rank):
    """Merges the best pair until there is none."""
    while True:
        best = min(range(len(parts) - 1), key=lambda i: rank(parts[i], parts[i + 1]), default=None)
        if best is None or rank(parts[best], parts[best + 1]) == np.inf:
            return parts
        parts[best : best + 2] = [parts[best] + parts[best + 1]]


def encode(meta, text):
    ids = {token: i for i, token in enumerate(meta["tokenizer.ggml.tokens"])}
    if meta["tokenizer.ggml.model"] == "llama":
        scores = meta["tokenizer.ggml.scores"]
        out = [meta["tokenizer.ggml.bos_token_id"]]
        # No piece of this vocabulary has a space behind another character, so words can be merged one by one.
        for word in re.findall(r" +[^ \n]*|[^ \n]+|\n+", text):
            rank = lambda a, b: -scores[ids[a + b]] if a + b in ids else np.inf
            out += [ids[part] for part in merged(list(word.replace(" ", "\u2581")), rank)]
        return out
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    alphabet = {b: chr(b) for b in printable}
    alphabet.update({b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in alphabet)})
    order = {tuple(m.split(" ")): i for i, m in enumerate(meta["tokenizer.ggml.merges"])}
    out = []
    for piece in re.findall(r"[0-9]|[^0-9]+", text):
        for word in re.findall(r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?[^\s\w]+| ?_+|\s+(?!\S)|\s+", piece):
            parts = [alphabet[b] for b in word.encode()]
            out += [ids[part] for part in merged(parts, lambda a, b: order.get((a, b), np.inf))]
    return out


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def losses(model, tokens):
    meta, arch = model.meta, model.meta["general.architecture"]
    gemma = arch == "gemma3"
    get = lambda key, default=None: meta.get(arch + "." + key, default)
    layers, heads, kv_heads = get("block_count"), get("attention.head_count"), get("attention.head_count_kv")
    width, eps = get("embedding_length"), get("attention.layer_norm_rms_epsilon")
    dim = get("attention.key_length", width // heads)
    n = len(tokens)
    norm = lambda x, name: x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * model.tensor(name + ".weight")
    embedding = model.tensor("token_embd.weight")
    x = embedding[tokens] * (np.sqrt(width) if gemma else 1)
    distance = np.arange(n)[:, None] - np.arange(n)[None, :]

    def rotate(v, theta):
        angle = np.arange(n)[:, None, None] * theta ** (-np.arange(0, dim, 2) / dim)
        first, second = (v[..., : dim // 2], v[..., dim // 2 :]) if gemma else (v[..., ::2], v[..., 1::2])
        turned = [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)]
        return np.concatenate(turned, -1)

    for l in range(layers):
        p = f"blk.{l}."
        sliding = gemma and (l + 1) % 6 != 0
        theta = 10000.0 if sliding else get("rope.freq_base", 10000.0)
        h = norm(x, p + "attn_norm")
        q, k, v = ((h @ model.tensor(p + f"attn_{c}.weight").T).reshape(n, -1, dim) for c in "qkv")
        if gemma:
            q, k = norm(q, p + "attn_q_norm"), norm(k, p + "attn_k_norm")
        q, k = rotate(q, theta), rotate(k, theta)
        k, v = (np.repeat(y, heads // kv_heads, 1) for y in (k, v))
        hidden = (distance < 0) | (distance >= (get("attention.sliding_window") if sliding else n))
        logits = np.where(hidden[None], -np.inf, np.einsum("qhd,khd->hqk", q, k) / np.sqrt(dim))
        y = np.einsum("hqk,khd->qhd", softmax(logits), v).reshape(n, -1) @ model.tensor(p + "attn_output.weight").T
        x = x + (norm(y, p + "post_attention_norm") if gemma else y)
        h = norm(x, p + "ffn_norm")
        gate, up = (h @ model.tensor(p + f"ffn_{c}.weight").T for c in ("gate", "up"))
        act = 0.5 * gate * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3))) if gemma else gate / (1 + np.exp(-gate))
        y = (act * up) @ model.tensor(p + "ffn_down.weight").T
        x = x + (norm(y, p + "post_ffw_norm") if gemma else y)
    x = norm(x, "output_norm")
    out = []
    for t in range(n - 1):
        logits = embedding @ x[t]
        out.append(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[tokens[t + 1]])
    return np.array(out)


def main():
    model = Gguf(sys.argv[1])
    tokens = encode(model.meta, open(sys.argv[2], encoding="utf-8").read()[:20000])[: int(sys.argv[3])]
    print("tokens", tokens[:24])
    print("perplexity of", len(tokens), "tokens: %.6f" % np.exp(losses(model, tokens).mean()))


if __name__ == "__main__":
    main()
