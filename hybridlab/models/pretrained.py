"""GPT-2 checkpoints as Hugging Face transformers saves them: a folder of config.json and weights."""

from __future__ import annotations

import json
import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridlab.base.checkpoint import is_compressed
from hybridlab.base.errors import UserError, first_line

# What wraps a model or a block puts this into its names: DataParallel, PEFT, transformers' own class, torch.compile.
WRAPPERS = r"^(module\.|base_model\.model\.|transformer\.|_orig_mod\.)*|_orig_mod\."
# Stored transposed: transformers' Conv1D keeps [in out], nn.Linear keeps [out in].
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# Masks of older versions.
IGNORED = (".attn.bias", ".attn.masked_bias")
HEAD, EMBEDDING = "lm_head.weight", "wte.weight"
LARGEST = {"n_layer": 1000, "n_head": 1000, "n_embd": 100_000}
# A config.json may leave any of these out; another value is another architecture.
ARCHITECTURE: dict[str, tuple[Any, ...]] = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
    "tie_word_embeddings": (True,),
}


def read_settings(folder: Path) -> dict[str, int]:
    """The settings of a GPT2Config that folder/config.json gives.

    Raises UserError where there is no config.json, or it describes something other than GPT-2.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{path} is missing: name a folder that transformers' save_pretrained wrote")
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored.get("model_type") != "gpt2":
            raise UserError(f"{path} describes model_type={stored.get('model_type')!r}: only 'gpt2' is read")
        settings = {name: stored[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
        settings["block_size"] = stored["n_positions"]
    except (ValueError, AttributeError) as error:
        raise UserError(f"{path} is not readable JSON ({error}): save the checkpoint again") from error
    except KeyError as error:
        raise UserError(f"{path} does not say {error}: save the checkpoint again") from error
    for name, value in settings.items():
        most = LARGEST.get(name, 1_000_000)
        if type(value) is not int or not 1 <= value <= most:
            raise UserError(f"{path} has {name}={value!r}: a whole number from 1 to {most:,} is wanted")
    if settings["n_embd"] % settings["n_head"]:
        raise UserError(f"{path} has n_embd={settings['n_embd']}, which n_head={settings['n_head']} does not divide")
    _refuse_variants(stored, path)
    return settings


def load_pretrained_(model: nn.Module, folder: Path) -> None:
    """Put the weights of a checkpoint folder, as fp32, in the place of the model's own (of any device).

    Raises UserError where the file is missing or broken, its names or shapes are not the model's, its numbers are no
    weights, or its head is another tensor than the token embedding.
    """
    path, stored = _read_weights(folder)
    named = {re.sub(WRAPPERS, "", name): tensor for name, tensor in stored.items() if not name.endswith(IGNORED)}
    _refuse_untied_head(named.pop(HEAD, None), named.get(EMBEDDING), path)
    given = {name: tensor.t() if name.endswith(TRANSPOSED) else tensor for name, tensor in named.items()}
    _refuse_misfits(given, model.state_dict(), path)
    weights = {
        name: tensor.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for name, tensor in given.items()
    }
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise UserError(f"{path} holds numbers in {name} that are not finite: take a checkpoint from before")
    model.load_state_dict(weights, assign=True)


def _refuse_variants(stored: dict[str, Any], path: Path) -> None:
    inner = stored.get("n_inner")
    if inner not in (None, 4 * stored["n_embd"]):
        raise UserError(f"{path} has n_inner={inner}: only GPT-2's own 4 x n_embd is read")
    for name, allowed in ARCHITECTURE.items():
        if stored.get(name, allowed[0]) not in allowed:
            raise UserError(f"{path} has {name}={stored[name]!r}: only GPT-2's own {allowed[0]!r} is read")


def _refuse_untied_head(head: Tensor | None, embedding: Tensor | None, path: Path) -> None:
    """Raise UserError where the head is not the token embedding again: GPT-2 here has one tensor for both."""
    if head is not None and embedding is not None and not torch.equal(head, embedding):
        raise UserError(
            f"{path} has an {HEAD} {list(head.shape)} that is not {EMBEDDING} {list(embedding.shape)}: "
            "only checkpoints with a tied head are read; tie it and save again"
        )


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    for name in ("model.safetensors", "pytorch_model.bin"):
        if (path := folder / name).is_file():
            _refuse_pointer(path)
            return path, _tensors(path)
    for index in folder.glob("*.index.json"):
        raise UserError(f"{folder} is sharded ({index.name}): save it whole, with max_shard_size='100GB'")
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin: add one of them")


def _tensors(path: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    if is_compressed(path):
        raise UserError(f"{path} is a compressed archive, as torch writes none: refused; save it as safetensors")
    try:
        is_safe = path.suffix == ".safetensors"
        stored = load_file(path) if is_safe else torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or holds more than tensors and may run code: refused; save it as safetensors"
        ) from error
    except Exception as error:  # each format raises its own, none of them documented
        raise UserError(f"{path} is broken ({first_line(error)}): copy or download it again") from error
    if not isinstance(stored, dict) or not all(isinstance(tensor, Tensor) for tensor in stored.values()):
        raise UserError(f"{path} is no mapping of names to tensors: save it with transformers' save_pretrained")
    return stored


def _refuse_pointer(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(23) == b"version https://git-lfs":
            raise UserError(f"{path} is a git-lfs pointer, not the weights: run `git lfs pull` there")


def _refuse_misfits(given: dict[str, Tensor], wanted: dict[str, Tensor], path: Path) -> None:
    missing, unknown = wanted.keys() - given.keys(), given.keys() - wanted.keys()
    for what, names in (("lacks", missing), ("has the unknown", unknown)):
        if names:
            raise UserError(f"{path} {what} {min(names)} ({len(names)} such tensors): it does not fit its config.json")
    for name, tensor in given.items():
        if tensor.shape != wanted[name].shape:
            raise UserError(
                f"{path} holds {name} as {list(tensor.shape)}, config.json asks for "
                f"{list(wanted[name].shape)}: mend config.json or take the file that belongs to it"
            )
        if not tensor.is_floating_point() or tensor.untyped_storage().nbytes() < tensor.nbytes:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"{path} holds {name} as {kind} that are no weights: save it in fp32, bf16 or fp16")
