#!/usr/bin/env python3
"""Opens the golden files of an encrypted disk tier without kvtide's code (needs the package cryptography), and prints what
tests/daemon/disk/encryption_test.cc expects of a message."""
import pathlib

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand


def aes(key: bytes, purpose: str, salt: bytes) -> AESGCM:
    return AESGCM(HKDFExpand(hashes.SHA256(), 32, purpose.encode() + b"\0" + salt).derive(key))


NONCE = bytes(12)
folder = pathlib.Path(__file__).parent
operators = bytes(range(32))  # the operator's key

wrapped = (folder / "encryption_v1.bin").read_bytes()
key = aes(operators, "kvtide disk folder key", wrapped[16:48]).decrypt(NONCE, wrapped[64:96] + wrapped[48:64], wrapped[:16])
assert key == bytes(range(64, 96)), key

extent = (folder / "encrypted_extent_v1.bin").read_bytes()
salt, bytes_tag, label_tag = extent[16:48], extent[48:64], extent[64:80]
place = extent[:16] + (40960).to_bytes(8, "little")  # magic, version, kind of file; offset
block = aes(key, "kvtide disk extent bytes", salt).decrypt(NONCE, extent[4096:] + bytes_tag, place)
label = aes(key, "kvtide disk extent label", salt).decrypt(NONCE, extent[80:4096] + label_tag, place + bytes_tag)
assert block == bytes(i % 251 for i in range(5000)) + bytes(8192 - 5000)
assert label[:8] == b"ktidext1" and b"turbo4" in label, label[:168]

message = aes(operators, "purpose", bytes(range(100, 132))).encrypt(NONCE, b"sixty-four tokens of one sequence", b"place 7")
print(message[:-16].hex(), message[-16:].hex())
