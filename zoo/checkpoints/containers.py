"""What a folder holds in place of the file that was looked for, and what to do about it."""

from __future__ import annotations

from pathlib import Path

ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
"""Files of an adapter (PEFT's LoRA and others), which means nothing without its base."""

MERGE = (
    "merge the adapter into its base first (transom export BASE --adapter DIR, or PEFT: merge_and_unload, then "
    "save_pretrained)"
)

_SAVE = "save the model as safetensors (transformers: from_pretrained, then save_pretrained)"
_SAVE_FROM_PYTORCH = "save the model as safetensors from PyTorch"
_WEIGHTS = (".bin", ".safetensors", ".index.json")
# Ends of names of other containers -> what to do with them.
_OTHERS = {
    ".gguf": "give the path of that file itself",
    ".bin": _SAVE,
    ".pt": _SAVE,
    ".pth": _SAVE,
    ".ckpt": _SAVE,
    ".h5": _SAVE_FROM_PYTORCH,
    ".msgpack": _SAVE_FROM_PYTORCH,
    ".npz": "save the model as safetensors in Hugging Face's layout",
    ".nemo": "convert it to Hugging Face's layout",
    ".safetensors": "call the weights model.safetensors, or give their index model.safetensors.index.json",
    ".index.json": "call the index model.safetensors.index.json",
}
POINTER = "the stand-in of Git LFS for a file that was not fetched: run git lfs pull"

_LFS = b"version https://git-lfs"


def explain_missing(folder: Path, wanted: str) -> str:
    """Say that a folder lacks a file, what it holds in its place, and what to do."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    if adapter := [name for name in names if name in ADAPTER]:
        return f"{folder}: no {wanted}, and {adapter[0]} says that it holds an adapter: {MERGE}"
    if "manifest.json" in names and "generation_config.json" in names:
        return f"{folder}: no {wanted}: it looks like an artifact that was exported: see transom inspect"
    for end, advice in _OTHERS.items():
        if wanted == "config.json" and end in _WEIGHTS:
            continue
        if others := [name for name in names if name.endswith(end)]:
            return f"{folder}: no {wanted}, but {others[0]}: {advice}"
    return f"{folder}: no {wanted}: give the folder of a Hugging Face checkpoint or a .gguf file"


def is_pointer(path: Path) -> bool:
    """Whether a file is the stand-in that Git LFS leaves where a large file was not fetched."""
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS
