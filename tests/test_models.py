from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from hybridlab.base.errors import UserError
from hybridlab.models import GPT2, GPT2Config, MnistCNN
from tests.conftest import gradient_step

MINI = GPT2Config(vocab_size=97, block_size=16, n_layer=2, n_head=2, n_embd=16)


def mini(**changes: object) -> GPT2:
    torch.manual_seed(0)
    return GPT2(dataclasses.replace(MINI, **changes))


def batch_of(config: GPT2Config, batch: int = 3) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(config.vocab_size, (batch, config.block_size + 1), generator=torch.manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def gradients(model: nn.Module, *batch: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(model(*batch), list(model.parameters())))


# --- settings ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "count"),
    [
        ("tiny", 1_071_872),
        ("small", 124_439_808),
        ("medium", 354_823_168),
        ("large", 774_030_080),
        ("xl", 1_557_611_200),
    ],
)
def test_parameter_counts(size: str, count: int) -> None:
    config = GPT2Config.named(size)
    with torch.device("meta"):
        model = GPT2(config)
        assert model(torch.zeros(2, 8, dtype=torch.long)).shape == (2, 8, config.vocab_size)
    padding = (config.embedding_rows - config.vocab_size) * config.n_embd
    assert sum(parameter.numel() for parameter in model.parameters()) - padding == config.parameter_count == count


def test_changes_keep_the_rest() -> None:
    changed = GPT2Config.medium(block_size=512)
    assert changed.block_size == 512
    assert dataclasses.replace(changed, block_size=1024) == GPT2Config.medium()
    assert GPT2Config.named("medium", block_size=512) == changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 100, "n_head": 12}, r"n_embd=100 is not divisible by n_head=12: use n_embd=96"),
        ({"n_layer": 0}, r"n_layer is 0: it must be at least 1"),
        ({"dropout": 1.0}, r"dropout is 1.0: it must be at least 0 and below 1"),
        ({"loss_chunk_tokens": -1}, r"loss_chunk_tokens is -1: it must be at least 0"),
    ],
)
def test_config_refuses_nonsense(changes: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPT2Config(**changes)


@pytest.mark.parametrize("changes", [{"n_layer": "4"}, {"n_embd": 64.0}, {"dropout": "0.1"}])
def test_config_refuses_other_types(changes: dict[str, object]) -> None:
    with pytest.raises(TypeError, match=f"{next(iter(changes))} is .* is wanted"):
        GPT2Config(**changes)


def test_a_shape_is_a_size_too() -> None:
    wide = GPT2Config.named("48x32x2048", vocab_size=512)
    assert (wide.n_layer, wide.n_head, wide.n_embd, wide.vocab_size) == (48, 32, 2048, 512)
    with pytest.raises(ValueError, match=r"n_embd=100 is not divisible by n_head=12"):
        GPT2Config.named("2x12x100")


def test_unknown_size_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"GPT-2 size 'smal' is unknown: did you mean 'small'"):
        GPT2Config.named("smal")


# --- GPT-2 ------------------------------------------------------------------------------------------


def test_initialization() -> None:
    torch.manual_seed(0)
    model = GPT2(GPT2Config.tiny())
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert not parameter.any()
        elif parameter.ndim == 1:
            assert (parameter == 1).all()
        else:
            expected = 0.02 / 8**0.5 if name.endswith("c_proj.weight") else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.03), name
            assert parameter.mean().item() == pytest.approx(0.0, abs=expected * 0.05), name


def test_initial_loss_is_that_of_a_uniform_guess() -> None:
    loss = mini()(*batch_of(MINI))
    assert loss.item() == pytest.approx(torch.tensor(97.0).log().item(), abs=0.05)


def test_later_tokens_do_not_change_earlier_logits() -> None:
    model, (tokens, _) = mini(), batch_of(MINI)
    changed = tokens.clone()
    changed[:, 9] = (changed[:, 9] + 1) % MINI.vocab_size
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :9], after[:, :9], rtol=0, atol=1e-6)
    assert ((before - after)[:, 9:].abs().amax(dim=-1) > 1e-5).all()


def test_head_is_the_token_embedding() -> None:
    model, (tokens, _) = mini(), batch_of(MINI)
    seen = 5 if not (tokens == 5).any() else (set(range(97)) - set(tokens.flatten().tolist())).pop()
    before = model(tokens)
    with torch.no_grad():
        model.wte.weight[seen].zero_()
    after = model(tokens)
    assert (after[..., seen] == 0).all(), "an unseen token's row acts as the head's row"
    others = torch.arange(MINI.vocab_size) != seen
    torch.testing.assert_close(before[..., others], after[..., others])
    assert sum(name.endswith("wte.weight") or "head" in name for name in model.state_dict()) == 1


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    model, (tokens, targets) = mini(), batch_of(MINI)
    targets = targets.clone()
    targets[0, :5] = -100
    expected = F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    torch.testing.assert_close(model(tokens, targets), expected, rtol=0, atol=0)


@pytest.mark.parametrize("chunk", [1, 16, 20, 47])
def test_chunked_loss_equals_one_piece(chunk: int) -> None:
    tokens, targets = batch_of(MINI)
    targets = targets.clone()
    targets[0, :5] = -100
    whole, chunked = mini(), mini(loss_chunk_tokens=chunk)
    torch.testing.assert_close(whole(tokens, targets), chunked(tokens, targets), rtol=0, atol=1e-6)
    for one, other in zip(gradients(whole, tokens, targets), gradients(chunked, tokens, targets), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)


def test_chunked_loss_keeps_no_logits() -> None:
    tokens, targets = batch_of(MINI)
    kept: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    model = mini(loss_chunk_tokens=16)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(tokens, targets)
    assert kept
    assert not any(MINI.vocab_size in shape for shape in kept if shape != model.wte.weight.shape)


def test_loss_is_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        assert mini()(*batch_of(MINI)).dtype == torch.float32


def test_dropout_works_in_training_and_is_off_in_eval() -> None:
    model, (tokens, _) = mini(dropout=0.3), batch_of(MINI)
    assert not torch.equal(model(tokens), model(tokens))
    model.eval()
    torch.testing.assert_close(model(tokens), mini().eval()(tokens), rtol=0, atol=0)


def test_a_sequence_longer_than_the_block_says_the_fix() -> None:
    with pytest.raises(ValueError, match=r"17 tokens is longer than block_size=16: cut it to 16"):
        mini()(torch.zeros(1, 17, dtype=torch.long))


# --- checkpoints of transformers --------------------------------------------------------------------


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """transformers' own GPT-2 with random weights, and the folder it was saved to."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=97, n_positions=16, n_layer=3, n_head=4, n_embd=32)
    model = transformers.GPT2LMHeadModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("gpt2")
    model.save_pretrained(folder)
    return model, folder


def edited(folder: Path, to: Path, **changes: object) -> Path:
    shutil.copytree(folder, to, dirs_exist_ok=True)
    config = json.loads((to / "config.json").read_text())
    (to / "config.json").write_text(json.dumps(config | changes))
    return to


def test_logits_equal_transformers(reference: tuple[nn.Module, Path]) -> None:
    theirs, folder = reference
    ours = GPT2.from_pretrained(folder).eval()
    tokens, targets = batch_of(ours.config)
    with torch.no_grad():
        expected = theirs(tokens).logits
        assert expected.std() > 0.1
        torch.testing.assert_close(ours(tokens), expected, rtol=0, atol=1e-5)
        loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
        torch.testing.assert_close(ours(tokens, targets), loss, rtol=0, atol=1e-5)


def test_gradients_equal_transformers(reference: tuple[nn.Module, Path]) -> None:
    theirs, folder = reference
    ours = GPT2.from_pretrained(folder).eval()
    tokens, targets = batch_of(ours.config)
    expected = F.cross_entropy(theirs(tokens).logits.flatten(0, 1), targets.flatten())
    (of_theirs,) = torch.autograd.grad(expected, [theirs.transformer.wte.weight])
    (of_ours,) = torch.autograd.grad(ours(tokens, targets), [ours.wte.weight])
    torch.testing.assert_close(of_ours[:97], of_theirs, rtol=0, atol=1e-5)


def test_reads_the_older_format(reference: tuple[nn.Module, Path], tmp_path: Path) -> None:
    """pytorch_model.bin without the prefix, in half precision, with masks and a head, as on the hub."""
    theirs, folder = reference
    shutil.copy(folder / "config.json", tmp_path)
    older = {name: tensor.half() for name, tensor in theirs.transformer.state_dict().items()}
    older |= {"h.0.attn.bias": torch.ones(1, 1, 16, 16), "h.0.attn.masked_bias": torch.tensor(-1e4)}
    torch.save(older | {"lm_head.weight": older["wte.weight"]}, tmp_path / "pytorch_model.bin")
    ours = GPT2.from_pretrained(tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in ours.parameters())
    tokens, _ = batch_of(ours.config)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=2e-2)


def test_training_a_loaded_model_leaves_the_file(reference: tuple[nn.Module, Path]) -> None:
    _, folder = reference
    model = GPT2.from_pretrained(folder, dropout=0.1)
    assert model.config.dropout == 0.1
    with torch.no_grad():
        for parameter in model.parameters():
            assert parameter.requires_grad
            assert parameter.is_contiguous()
            parameter.zero_()
    assert GPT2.from_pretrained(folder).wte.weight.any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, r"model_type='llama': only 'gpt2' is read"),
        ({"activation_function": "relu"}, r"activation_function='relu'"),
        ({"n_inner": 99}, r"n_inner=99"),
        ({"n_layer": 4}, r"lacks h\.3\.\S+ \(12 such tensors\)"),
        ({"n_layer": 2}, r"has the unknown h\.2\."),
        ({"n_positions": 32}, r"holds wpe.weight as \[16, 32\], config.json asks for \[32, 32\]"),
    ],
)
def test_other_checkpoints_are_refused(
    reference: tuple[nn.Module, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as refused:
        GPT2.from_pretrained(edited(reference[1], tmp_path, **changes))
    assert "\n" not in str(refused.value)


def test_missing_and_broken_files_are_refused(reference: tuple[nn.Module, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config.json is missing: name a folder"):
        GPT2.from_pretrained(tmp_path)
    shutil.copy(reference[1] / "config.json", tmp_path)
    with pytest.raises(UserError, match=r"neither model.safetensors nor pytorch_model.bin"):
        GPT2.from_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"half a download")
    with pytest.raises(UserError, match=r"pytorch_model.bin is broken"):
        GPT2.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"half a download")
    with pytest.raises(UserError, match=r"model.safetensors is broken"):
        GPT2.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"not readable JSON"):
        GPT2.from_pretrained(tmp_path)


@pytest.fixture(scope="module")
def weights(reference: tuple[nn.Module, Path]) -> dict[str, Tensor]:
    """What the folder's model.safetensors holds."""
    return load_file(reference[1] / "model.safetensors")


def with_weights(reference: tuple[nn.Module, Path], to: Path, weights: object) -> Path:
    shutil.copy(reference[1] / "config.json", to)
    torch.save(weights, to / "pytorch_model.bin")
    return to


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "module.", "_orig_mod.module.", "base_model.model."])
def test_names_that_a_wrapper_gave_are_read(
    reference: tuple[nn.Module, Path], weights: dict[str, Tensor], tmp_path: Path, wrapper: str
) -> None:
    wrapped = {wrapper + name.replace(".h.1.", ".h.1._orig_mod."): tensor for name, tensor in weights.items()}
    ours = GPT2.from_pretrained(with_weights(reference, tmp_path, wrapped))
    assert torch.equal(ours.h[1].mlp.c_fc.weight, GPT2.from_pretrained(reference[1]).h[1].mlp.c_fc.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lm_head.weight": torch.ones(97, 32)}, r"lm_head.weight \[97, 32\] that is not wte.weight .*: only .* tied"),
        ({"module.lm_head.weight": torch.ones(97, 32)}, r"lm_head.weight \[97, 32\] that is not wte.weight"),
        ({"lm_head.weight": torch.ones(99, 32)}, r"lm_head.weight \[99, 32\] that is not wte.weight \[97, 32\]"),
        ({"transformer.wpe.weight": torch.ones(16, 32, dtype=torch.int8)}, r"wpe.weight as int8 .*: save it in fp32"),
        ({"transformer.wpe.weight": torch.zeros(1, 1).expand(16, 32)}, r"wpe.weight as float32 that are no weights"),
        ({"transformer.wpe.weight": torch.full((16, 32), torch.nan)}, r"in wpe.weight that are not finite"),
        ({"transformer.wpe.weight": 3}, r"no mapping of names to tensors: save it with"),
        ({"transformer.wpe.weight": Path()}, r"holds more than tensors and may run code: refused; save it as safet"),
    ],
)
def test_weights_that_are_not_the_models_are_refused(
    reference: tuple[nn.Module, Path], weights: dict[str, Tensor], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=f"pytorch_model.bin .*{message}") as refused:
        GPT2.from_pretrained(with_weights(reference, tmp_path, weights | change))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_layer": 10**9}, r"config.json has n_layer=1000000000: a whole number from 1 to 1,000 is wanted"),
        ({"n_layer": 1e9}, r"config.json has n_layer=1000000000.0: a whole number"),
        ({"n_embd": "32"}, r"config.json has n_embd='32': a whole number"),
        ({"vocab_size": 10**12}, r"config.json has vocab_size=1000000000000: a whole number from 1 to 1,000,000"),
        ({"n_head": 3}, r"config.json has n_embd=32, which n_head=3 does not divide"),
        ({"tie_word_embeddings": False}, r"config.json has tie_word_embeddings=False: only GPT-2's own True is read"),
    ],
)
def test_sizes_that_no_model_has_are_refused_before_anything_is_built(
    reference: tuple[nn.Module, Path], tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        GPT2.from_pretrained(edited(reference[1], tmp_path, **changes))


def test_pointers_shards_and_compressed_archives_are_named(
    reference: tuple[nn.Module, Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    shutil.copy(reference[1] / "config.json", tmp_path)
    for index in ("pytorch_model.bin.index.json", "model.safetensors.index.json"):
        (tmp_path / index).write_text("{}")
        with pytest.raises(UserError, match=rf"is sharded \({index}\): save it whole, with max_shard_size"):
            GPT2.from_pretrained(tmp_path)
        (tmp_path / index).unlink()
    torch.save(weights, tmp_path / "plain.bin")
    with ZipFile(tmp_path / "plain.bin") as plain, ZipFile(tmp_path / "pytorch_model.bin", "w", ZIP_DEFLATED) as packed:
        for part in plain.namelist():
            packed.writestr(part, plain.read(part))
    with pytest.raises(
        UserError, match=r"pytorch_model.bin is a compressed archive.*: refused; save it as safetensors"
    ):
        GPT2.from_pretrained(tmp_path)
    for name in ("pytorch_model.bin", "model.safetensors"):
        (tmp_path / name).write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:aa\nsize 5\n")
        with pytest.raises(UserError, match=rf"{name} is a git-lfs pointer, not the weights: run `git lfs pull`"):
            GPT2.from_pretrained(tmp_path)


# --- compilation ------------------------------------------------------------------------------------


def move_(model: nn.Module) -> None:
    parameters, generator = list(model.parameters()), torch.manual_seed(2)
    steps = [0.2 * torch.randn(parameter.shape, generator=generator) for parameter in parameters]
    with torch.no_grad():
        torch._foreach_add_(parameters, steps)


@pytest.mark.parametrize(
    ("backend", "bf16"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param("inductor", False, marks=pytest.mark.slow),
    ],
)
def test_weights_moved_in_place_reach_a_compiled_forward(backend: str, bf16: bool) -> None:
    """Within one autocast region as well, where a cache of cast weights would hide the move."""
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    torch._dynamo.reset()
    model, batch = mini(n_layer=1), batch_of(MINI)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    tolerance = 0.02 if bf16 else 1e-5
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        before = compiled(*batch).item()
        assert before == pytest.approx(model(*batch).item(), abs=tolerance)
        move_(model)
        after = compiled(*batch).item()
        assert after == pytest.approx(model(*batch).item(), abs=tolerance)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16, cache_enabled=False):
        assert after == pytest.approx(copy.deepcopy(model)(*batch).item(), abs=tolerance)
    assert abs(after - before) > 10 * tolerance


@pytest.mark.parametrize("chunk", [0, 16])
def test_compiles_without_graph_breaks_and_keeps_gradients(chunk: int) -> None:
    torch._dynamo.reset()
    model, batch = mini(n_layer=1, loss_chunk_tokens=chunk), batch_of(MINI)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(gradients(compiled, *batch), gradients(model, *batch), strict=True):
        torch.testing.assert_close(ours, eager, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk", [0, 16])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_batch_of_padding_has_no_loss_and_moves_nothing(chunk: int, compiled: bool) -> None:
    torch._dynamo.reset()
    model, (tokens, targets) = mini(n_layer=1, loss_chunk_tokens=chunk), batch_of(MINI)
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    padding = torch.full_like(targets, -100)
    loss = forward(tokens, padding)
    assert loss.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss, list(model.parameters())))
    with torch.no_grad():
        assert forward(tokens, padding).item() == 0


# --- MNIST ------------------------------------------------------------------------------------------


def test_mnist_cnn_loss_is_the_cross_entropy_of_its_logits() -> None:
    torch.manual_seed(0)
    model, images, labels = MnistCNN(), torch.rand(4, 1, 28, 28), torch.tensor([3, 1, 4, 9])
    assert sum(parameter.numel() for parameter in model.parameters()) == 1_199_882
    logits = model(images)
    assert logits.shape == (4, 10)
    torch.testing.assert_close(model(images, labels), F.cross_entropy(logits, labels))


def test_mnist_cnn_learns_and_drops_only_in_training() -> None:
    torch.manual_seed(0)
    model, images, labels = MnistCNN(dense_dropout=0.5), torch.rand(8, 1, 28, 28), torch.arange(8)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    assert not torch.equal(model(images), model(images))
    before = model.eval()(images, labels)
    torch.testing.assert_close(model(images, labels), before, rtol=0, atol=0)
    for _ in range(8):
        gradient_step(optimizer, model(images, labels))
    assert model(images, labels) < before - 0.1


def test_a_padded_vocabulary_changes_no_loss_and_no_reported_count():
    plain, padded = GPT2Config.nano(vocab_size=500, pad_vocab_to=0), GPT2Config.nano(vocab_size=500)
    losses = []
    for config in (plain, padded):
        torch.manual_seed(0)
        model = GPT2(config)
        tokens = torch.randint(0, 500, (2, 16), generator=torch.Generator().manual_seed(1))
        assert model(tokens).shape[-1] == 500
        loss = model(tokens, tokens)
        loss.backward()
        losses.append((loss.item(), model.wte.weight.grad[:500].clone()))
    assert padded.embedding_rows == 512
    assert padded.parameter_count == plain.parameter_count
    assert losses[0][0] == losses[1][0]
    assert torch.equal(losses[0][1], losses[1][1])
    assert not model.wte.weight.grad[500:].any()


def test_weights_saved_under_another_padding_load() -> None:
    unpadded, padded = (GPT2(GPT2Config.nano(vocab_size=500, pad_vocab_to=rows)) for rows in (0, 64))
    tokens = torch.arange(32).view(2, 16)
    for saved, model in ((unpadded, padded), (padded, unpadded)):
        with torch.no_grad():
            saved.wte.weight[:500].normal_()
        model.load_state_dict(saved.state_dict())
        torch.testing.assert_close(model(tokens), saved(tokens), rtol=0, atol=1e-5)
    assert not padded.wte.weight[500:].any()
