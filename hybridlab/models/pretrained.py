"""GPT-2 checkpoints as Hugging Face transformers saves them: a folder of config.json and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hybridlab.base.errors import UserError, first_line

# Stored transposed: transformers' Conv1D keeps [in out], nn.Linear keeps [out in].
TRANSPOSED = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
# Masks of older versions, and the head, which is the token embedding again.
IGNORED = (".attn.bias", ".attn.masked_bias", "lm_head.weight")
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
    _refuse_variants(stored, path)
    return settings


def load_pretrained_(model: nn.Module, folder: Path) -> None:
    """Put the weights of a checkpoint folder, as fp32, in the place of the model's own (of any device).

    Raises UserError where the file is missing or broken, or its names or shapes are not the model's.
    """
    path, stored = _read_weights(folder)
    weights = {}
    for name, tensor in stored.items():
        if not name.endswith(IGNORED):
            kept = tensor.t() if name.endswith(TRANSPOSED) else tensor
            own = kept.to(torch.float32, copy=True, memory_format=torch.contiguous_format)
            weights[name.removeprefix("transformer.")] = own
    _refuse_misfits(weights, model.state_dict(), path)
    model.load_state_dict(weights, assign=True)


def _refuse_variants(stored: dict[str, Any], path: Path) -> None:
    inner = stored.get("n_inner")
    if inner not in (None, 4 * stored["n_embd"]):
        raise UserError(f"{path} has n_inner={inner}: only GPT-2's own 4 x n_embd is read")
    for name, allowed in ARCHITECTURE.items():
        if stored.get(name, allowed[0]) not in allowed:
            raise UserError(f"{path} has {name}={stored[name]!r}: only GPT-2's own {allowed[0]!r} is read")


def _read_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    from safetensors.torch import load_file

    for name in ("model.safetensors", "pytorch_model.bin"):
        path = folder / name
        if path.is_file():
            try:
                if path.suffix == ".safetensors":
                    return path, load_file(path)
                return path, torch.load(path, map_location="cpu", weights_only=True)
            except Exception as error:  # each format raises its own, none of them documented
                raise UserError(f"{path} is broken ({first_line(error)}): copy or download it again") from error
    raise UserError(f"{folder} holds neither model.safetensors nor pytorch_model.bin: add one of them")


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
