"""Real model families from small configs: freezing, accumulation, precision against plain loops.

``docs/models.md`` says the same to users; the last tests hold it to what is here.
"""

import ast
import contextlib
import copy
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from oracles import gradients_of, windows_of
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from trainkit import (
    accumulate,
    amp,
    freeze,
    frozen,
    frozen_parameters,
    train_step,
    trainable_parameters,
)

transformers = pytest.importorskip("transformers", minversion="5.23")
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*gradient_checkpointing_enable. is deprecated:FutureWarning"
)


def ragged(rows, seed):
    """Token ids and their mask, padded on the right to the longest of these rows."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (rows,), generator=generator)
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.randint(3, 61, mask.shape, generator=generator) * mask, mask.long()


def sentences(rows, seed):
    ids, mask = ragged(rows, seed)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids[:, 1] % 2}


def masked(rows, seed):
    ids, mask = ragged(rows, seed)
    hidden = (ids % 3 == 0) & (mask == 1)
    hidden[:, 0] = True
    return {
        "input_ids": ids.masked_fill(hidden, 1),
        "attention_mask": mask,
        "labels": ids.masked_fill(~hidden, -100),
    }


def texts(rows, seed):
    ids, mask = ragged(rows, seed)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def pairs(rows, seed):
    return {**texts(rows, seed), "labels": texts(rows, seed + 100)["labels"]}


def images(rows, seed):
    return {
        "pixel_values": torch.randn(rows, 3, 8, 8, generator=torch.Generator().manual_seed(seed)),
        "labels": torch.arange(rows),
    }


def speech(rows, seed):
    sound = torch.randn(rows, 8, 20, generator=torch.Generator().manual_seed(seed))
    return {"input_features": sound, "labels": texts(rows, seed)["labels"]}


def captions(rows, seed):
    ids, mask = ragged(rows, seed)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": images(rows, seed)["pixel_values"],
    }


def mean_of_rows(model, batch):
    return model(**batch).loss, len(batch["labels"])


def mean_of_tokens(model, batch):
    return model(**batch).loss, (batch["labels"] != -100).sum()


def mean_of_next_tokens(model, batch):
    return model(**batch).loss, (batch["labels"][:, 1:] != -100).sum()


def contrast(model, batch):
    """Each row against all others: no mean over rows, so every micro-batch counts the same."""
    return model(**batch, return_loss=True).loss, 1


class Family(NamedTuple):
    name: str
    config: Any
    batch: Callable[..., dict[str, torch.Tensor]]  # of rows and seed
    loss: Callable[
        ..., tuple[torch.Tensor, Any]
    ]  # of model and batch: the loss, and what it is the mean of
    # Patterns, and what a plain loop looks for in the name of a parameter, with a dot before it.
    layers: dict[str, tuple[list[str], list[str]]]
    tied: tuple[str, ...] = ()  # all names of the embedding that is the head, too
    # Reentrant checkpointing above frozen layers: the same gradients (by transformers' hook on
    # token embeddings), or none.
    reentrant: str = "the same"


LAYERS = {"num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
VISION = {"hidden_size": 16, "image_size": 8, "patch_size": 4, **LAYERS}
TEXT = {
    "vocab_size": 61,
    "hidden_size": 16,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    **LAYERS,
}
ENDS = {"bos_token_id": 1, "eos_token_id": 2}
T5 = {
    "vocab_size": 61,
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 3,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
DEBERTA = {
    **TEXT,
    "type_vocab_size": 0,
    "relative_attention": True,
    "position_buckets": 4,
    "position_biased_input": False,
}
DEBERTA |= {
    "pos_att_type": ["p2c", "c2p"],
    "share_att_key": True,
    "norm_rel_ebd": "layer_norm",
}  # as in v3
WHISPER = {
    "vocab_size": 61,
    "d_model": 16,
    "num_mel_bins": 8,
    "max_source_positions": 10,
    "max_target_positions": 20,
}
WHISPER |= {
    "encoder_layers": 3,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "pad_token_id": 0,
    **ENDS,
}
WHISPER |= {
    "decoder_layers": 3,
    "decoder_attention_heads": 2,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 1,
}
POSITIONS = ["embeddings", "encoder.rel_embeddings", "encoder.LayerNorm"]  # of DeBERTa
GPT2 = {"vocab_size": 61, "n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 40}

# fmt: off
BERT = Family("BertForSequenceClassification", transformers.BertConfig(**TEXT),
              sentences, mean_of_rows, {
    "embeddings": (["bert.embeddings"], [".bert.embeddings."]),
    "two layers": (
        ["bert.encoder.layer[:2]"],
        [".bert.encoder.layer.0.", ".bert.encoder.layer.1."],
    ),
    "all but the head": (["bert"], [".bert."]),
    "norms": (["**.LayerNorm"], [".LayerNorm."]),
})
FAMILIES = [
    BERT,
    BERT._replace(name="BertForMaskedLM", batch=masked, loss=mean_of_tokens,
        tied=("bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight")),
    Family("RobertaForSequenceClassification", transformers.RobertaConfig(**TEXT),
           sentences, mean_of_rows, {
        "embeddings": (["roberta.embeddings"], [".roberta.embeddings."]),
        "two layers": (
            ["roberta.encoder.layer[:2]"],
            [".roberta.encoder.layer.0.", ".roberta.encoder.layer.1."],
        ),
        "all but the head": (["roberta"], [".roberta."]),
        "norms": (["**.LayerNorm"], [".LayerNorm."]),
    }),
    Family("DebertaV2ForSequenceClassification", transformers.DebertaV2Config(**DEBERTA),
           sentences, mean_of_rows, {
        # Relative positions enter every layer: if trained, backward runs through the frozen ones.
        "embeddings": (
            [f"deberta.{name}" for name in POSITIONS],
            [f".deberta.{name}." for name in POSITIONS],
        ),
        "two layers": (
            ["deberta.encoder.layer[:2]"],
            [".deberta.encoder.layer.0.", ".deberta.encoder.layer.1."],
        ),
        "all but the head": (["deberta"], [".deberta."]),
        "norms": (["**.LayerNorm"], [".LayerNorm."]),
    }, reentrant="an error, frozen or not"),
    Family("GPT2LMHeadModel", transformers.GPT2Config(**GPT2, **ENDS),
           texts, mean_of_next_tokens, {
        "embeddings": (
            ["transformer.wte", "transformer.wpe"],
            [".transformer.wte.", ".transformer.wpe."],
        ),
        "two layers": (["transformer.h[:2]"], [".transformer.h.0.", ".transformer.h.1."]),
        "all but the head": (["transformer"], [".transformer."]),
        "norms": (["**.ln_*"], [".ln_1.", ".ln_2.", ".ln_f."]),
    }, tied=("transformer.wte.weight", "lm_head.weight")),
    Family("LlamaForCausalLM",
           transformers.LlamaConfig(**TEXT, num_key_value_heads=1, tie_word_embeddings=True),
           texts, mean_of_next_tokens, {
        "embeddings": (["model.embed_tokens"], [".model.embed_tokens."]),
        "two layers": (["model.layers[:2]"], [".model.layers.0.", ".model.layers.1."]),
        "all but the head": (["model"], [".model."]),
        "norms": (["**.*norm"], [".input_layernorm.", ".post_attention_layernorm.", ".norm."]),
    }, tied=("model.embed_tokens.weight", "lm_head.weight")),
    Family("T5ForConditionalGeneration", transformers.T5Config(**T5, initializer_factor=0.3),
           pairs, mean_of_tokens, {
        "embeddings": (["shared"], [".shared."]),
        "two layers": (["encoder.block[:2]"], [".encoder.block.0.", ".encoder.block.1."]),
        "all but the head": (
            ["shared", "encoder", "decoder"],
            [".shared.", ".encoder.", ".decoder."],
        ),
        "norms": (["**.*layer_norm"], [".layer_norm.", ".final_layer_norm."]),
    }, tied=("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight",
             "lm_head.weight")),
    Family("ViTForImageClassification", transformers.ViTConfig(**VISION, num_labels=5),
           images, mean_of_rows, {
        "embeddings": (["vit.embeddings"], [".vit.embeddings."]),
        "two layers": (["vit.layers[:2]"], [".vit.layers.0.", ".vit.layers.1."]),
        "all but the head": (["vit"], [".vit."]),
        "norms": (["**.layernorm*"], [".layernorm_before.", ".layernorm_after.", ".layernorm."]),
    }, reentrant="trainkit warns"),
    Family("WhisperForConditionalGeneration", transformers.WhisperConfig(**WHISPER),
           speech, mean_of_tokens, {
        "embeddings": (
            ["model.encoder.conv*"],
            [".model.encoder.conv1.", ".model.encoder.conv2."],
        ),
        "two layers": (
            ["model.encoder.layers[:2]"],
            [".model.encoder.layers.0.", ".model.encoder.layers.1."],
        ),
        "all but the head": (["model"], [".model."]),
        "norms": (["**.*layer_norm"], ["layer_norm."]),
    }, tied=("model.decoder.embed_tokens.weight", "proj_out.weight"), reentrant="torch warns"),
    Family("CLIPModel",
           transformers.CLIPConfig(
               text_config=TEXT | ENDS, vision_config=VISION, projection_dim=16),
           captions, contrast, {
        "embeddings": (["**.embeddings", "**.pre_layrnorm"], [".embeddings.", ".pre_layrnorm."]),
        "two layers": (["**.layers[:2]"], [".layers.0.", ".layers.1."]),
        "all but the head": (["text_model", "vision_model"], [".text_model.", ".vision_model."]),
        "norms": (
            ["**.*norm*"],
            [".layer_norm1.", ".layer_norm2.", ".final_layer_norm.", ".pre_layrnorm.",
             ".post_layernorm."],
        ),
    }),
]
# fmt: on


def over(families):
    return pytest.mark.parametrize("family", families, ids=lambda family: family.name)


tied_families = [family for family in FAMILIES if family.tied]


def build(family):
    return getattr(transformers, family.name)(family.config).train()


def by_hand(model, strings):
    """All names of the parameters that have a name with one of these strings in it."""
    named = list(model.named_parameters(remove_duplicate=False))
    chosen = {
        id(parameter)
        for name, parameter in named
        if any(string in "." + name for string in strings)
    }
    return [name for name, parameter in named if id(parameter) in chosen]


def stem(family):
    return family.layers["embeddings"][0] + family.layers["two layers"][0]


def cast(batch, dtype):
    return {
        key: value.to(dtype) if value.is_floating_point() else value for key, value in batch.items()
    }


def together(batches):
    """All rows as one batch, padded to the longest of all."""
    whole = {}
    for key, first in batches[0].items():
        rows = [row for batch in batches for row in batch[key]]
        whole[key] = (
            pad_sequence(rows, True, -100 if key == "labels" else 0)
            if first.dim() == 2
            else torch.stack(rows)
        )
    return whole


def whole_gradient(model):
    return torch.cat([gradient.double().flatten() for gradient in gradients_of(model)])


def off(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


@contextlib.contextmanager
def float64_throughout():
    """Transformers uses float32 in norms, softmax and losses of any model. Not in here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


@over(FAMILIES)
@pytest.mark.parametrize(
    "kind", ["embeddings", "two layers", "all but the head", "norms", "biases"]
)
def test_the_layers_meant_stay_and_all_others_move(family, kind):
    model = build(family)
    layers, strings = (["**.bias"], [".bias"]) if kind == "biases" else family.layers[kind]
    expected = by_hand(model, strings)
    if not expected:
        assert kind == "biases"  # which T5 and Llama do not have
        with pytest.raises(ValueError, match="matches nothing"):
            frozen(model, layers)
        return

    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1, fused=True)
    batch = family.batch(3, 0)
    family.loss(model, batch)[0].backward()
    optimizer.step()  # momentum, and gradients left over, for everything
    named = list(model.named_parameters(remove_duplicate=False))
    found = {name: (p.requires_grad, p.grad, p.detach().clone()) for name, p in named}
    modes = [module.training for module in model.modules()]
    trained = {name for name, p in named if p.grad is not None} - set(expected)

    step = train_step(optimizer, accumulate(2))(lambda batch: family.loss(model, batch))
    with frozen(model, layers) as names:
        assert names == expected
        model.train()
        assert all(
            m.training or list(m.buffers(recurse=False)) for m in model.modules()
        )  # dropout stays
        if trained:
            family.loss(model, batch)[0].backward()
            optimizer.step()  # by hand, and what was left over still lies there
            halfway = {name: p.detach().clone() for name, p in named}
            for _ in range(4):
                step(batch)
            assert step.updates == 2
            assert {name for name, p in named if not torch.equal(p, halfway[name])} == trained
        else:  # the head is tied, and was all that would have been left
            assert family.tied
            with pytest.raises(ValueError, match=r"no graph.*frozen"):
                step(batch)

    assert {name for name, p in named if not torch.equal(p, found[name][2])} == trained
    assert all(p.grad is found[name][1] for name, p in named if name in expected)
    assert all(p.requires_grad == found[name][0] for name, p in named)
    assert [module.training for module in model.modules()] == modes


@over(tied_families)
def test_who_freezes_a_tied_embedding_freezes_the_head_under_all_names(family):
    model = build(family)
    for name in family.tied:
        with frozen(model, name) as names:
            assert names == list(family.tied)
            assert not model.get_output_embeddings().weight.requires_grad
    layers, strings = family.layers["all but the head"]
    names = freeze(model, layers)
    assert names == frozen_parameters(model) == by_hand(model, strings)
    assert set(family.tied) <= set(names)


@over(tied_families)
def test_a_head_that_is_untied_can_be_trained_alone(family):
    model = build(family)
    head = model.get_output_embeddings()
    head.weight = nn.Parameter(head.weight.detach().clone())  # as the document says
    layers, strings = family.layers["all but the head"]
    names = freeze(model, layers)
    assert names == by_hand(model, strings)
    before = {
        name: p.detach().clone() for name, p in model.named_parameters(remove_duplicate=False)
    }
    step = train_step(torch.optim.AdamW(trainable_parameters(model), fused=True))(
        lambda batch: family.loss(model, batch)
    )
    step(family.batch(2, 0))
    assert {
        name for name in before if not torch.equal(model.get_parameter(name), before[name])
    } == set(before) - set(names)


CHECKPOINTED = [(family, False) for family in FAMILIES] + [
    (f, True) for f in FAMILIES if f.reentrant == "the same"
]


@pytest.mark.parametrize(
    ("family", "use_reentrant"), CHECKPOINTED, ids=lambda value: getattr(value, "name", str(value))
)
def test_checkpointing_changes_no_gradient_above_frozen_layers(family, use_reentrant):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)  # the same weights, and the same dropout
        model = build(family).double()
        if checkpointing:
            model.gradient_checkpointing_enable(
                gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
            )
        with float64_throughout(), frozen(model, stem(family)) as names:
            family.loss(model, cast(family.batch(3, 0), torch.float64))[0].backward()
            gradients.append(
                {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            )
    plain, checkpointed = gradients
    assert list(plain) == list(checkpointed)
    assert not set(plain) & set(names)
    assert all(off(checkpointed[name], plain[name]) <= 1e-12 for name in plain)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
@over([f for f in FAMILIES if f.reentrant.endswith("warns")])
def test_where_reentrant_checkpointing_loses_gradients_there_is_a_warning(family):
    """By trainkit where most are lost. Whisper's large decoder keeps its own, so torch warns."""
    model = build(family)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    step = train_step(optimizer, frozen(model, stem(family)))(
        lambda batch: family.loss(model, batch)
    )
    by_trainkit, by_torch = (
        "trainable parameters received a gradient.*reentrant",
        "None of the inputs have requires_grad=True",
    )
    with pytest.warns(
        UserWarning, match=by_trainkit if family.reentrant == "trainkit warns" else by_torch
    ):
        step(family.batch(3, 0))


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
@over([f for f in FAMILIES if f.loss is not contrast])
def test_the_gradient_of_a_window_is_that_of_the_full_batch(family, dtype, bound):
    batches = [family.batch(rows, seed) for seed, rows in enumerate([2, 4, 1])]
    model = build(family).eval().to(dtype)
    reference = copy.deepcopy(model).double()
    with float64_throughout():
        loss, _ = family.loss(reference, cast(together(batches), torch.float64))
        loss.backward()
    expected = whole_gradient(reference)
    seen = []

    @accumulate(3, model)
    def step(batch):
        yield family.loss(model, batch)
        seen.append(whole_gradient(model))

    with float64_throughout() if dtype == torch.float64 else contextlib.nullcontext():
        for batch in batches:
            step(cast(batch, dtype))
        assert off(seen[0], expected) <= bound
        model.zero_grad()
        for batch in batches:
            loss, _ = family.loss(model, cast(batch, dtype))
            (loss / 3).backward()
        assert off(whole_gradient(model), expected) > 1e-3  # the usual loop


def test_a_window_of_contrastive_losses_is_their_mean_and_not_the_full_batch():
    family = FAMILIES[-1]
    batches = [family.batch(rows, seed) for seed, rows in enumerate([2, 3, 4])]
    model = build(family).eval().double()
    reference = copy.deepcopy(model)
    seen = []

    @accumulate(3, model)
    def step(batch):
        yield family.loss(model, batch)
        seen.append(whole_gradient(model))

    for batch in batches:
        step(cast(batch, torch.float64))
    for batch in batches:
        loss, _ = family.loss(reference, cast(batch, torch.float64))
        (loss / 3).backward()
    assert off(seen[0], whole_gradient(reference)) <= 1e-12
    reference.zero_grad()
    family.loss(reference, cast(together(batches), torch.float64))[0].backward()
    assert off(seen[0], whole_gradient(reference)) > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@over(FAMILIES)
def test_mixed_precision_is_the_loop_with_autocast_and_a_scaler(family, dtype):
    batches = [family.batch(2 + number % 3, number) for number in range(9)]
    model = build(family)
    start = nn.utils.parameters_to_vector(model.parameters()).detach()
    theirs = copy.deepcopy(model)

    def loss_of(model, number):
        assert torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == dtype
        loss, weight = family.loss(model, batches[number])
        return loss * (
            math.inf if number == 4 else 1.0
        ), weight  # the second of three updates is skipped

    torch.manual_seed(1)  # the same dropout
    optimizer = torch.optim.SGD(theirs.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", growth_interval=1, enabled=dtype == torch.float16)
    norms, scales = [], []
    for window in windows_of(range(9), 3):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype):
            losses = [loss_of(theirs, number) for number in window]
        for loss, weight in losses:
            scaler.scale(loss * (weight / sum(weight for _, weight in losses))).backward()
        scaler.unscale_(optimizer)
        norms.append(nn.utils.clip_grad_norm_(theirs.parameters(), 0.05))
        if scaler.is_enabled() or norms[-1].isfinite():
            scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())

    torch.manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, fused=True)
    parts = accumulate(3), amp(dtype=dtype, growth_interval=1)
    step = train_step(optimizer, *parts, max_norm=0.05)(lambda number: loss_of(model, number))
    results = [
        (result, step.state_dict().get("loss_scale", 1.0))
        for number in range(9)
        if (result := step(number)).complete
    ]

    assert [scale for _, scale in results] == scales
    assert [result.updated for result, _ in results] == [bool(norm.isfinite()) for norm in norms]
    assert step.updates > 0 and not results[1][0].updated
    bound = 4 * torch.finfo(dtype).eps
    for (result, _), norm in zip(results, norms, strict=True):
        assert result.grad_norm.item() == pytest.approx(norm.item(), rel=bound, nan_ok=True)
    ours, theirs = (nn.utils.parameters_to_vector(m.parameters()) - start for m in (model, theirs))
    assert off(ours, theirs) <= bound


DOCUMENT = (Path(__file__).parents[1] / "docs" / "models.md").read_text()
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in DOCUMENT.splitlines()
    if line.startswith("| `")
]


def test_the_document_has_every_family():
    assert [name.strip("`") for name, *_ in ROWS] == [family.name for family in FAMILIES]


@pytest.mark.parametrize(
    ("family", "row"),
    list(zip(FAMILIES, ROWS, strict=False)),
    ids=lambda value: getattr(value, "name", ""),
)
def test_the_document_says_what_is_here(family, row):
    model = build(family)
    _, first, body, norms, weight, notes = row
    said = {
        first: stem(family),
        body: family.layers["all but the head"][0],
        norms: family.layers["norms"][0],
    }
    for cell, layers in said.items():
        with (
            frozen(model, ast.literal_eval(cell.strip("`"))) as theirs,
            frozen(model, layers) as ours,
        ):
            assert theirs == ours
    batch = family.batch(3, 0)
    assert eval(weight.strip("`"), dict(batch)) == family.loss(model, batch)[1]
    assert ("tied" in notes) == bool(family.tied)


def test_the_example_of_the_document_runs():
    space = {}
    for block in re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL):
        exec(compile(block, "models.md", "exec"), space)
    assert space["step"].updates == 2
    assert "lm_head.weight" in space["names"]
    assert [name for name, p in space["model"].named_parameters() if p.requires_grad] == [
        "lm_head.weight"
    ]
