"""Exported drafts, read back by a reference that knows nothing of this project: transformers' Llama layer."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm, LlamaRotaryEmbedding

from eda.adapters.errors import ConflictError
from eda.adapters.store.export import export_draft
from eda.errors import MismatchError
from eda.models.attention import AttentionRow, PackedBatch
from eda.models.draft import DraftModel
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateConfig, PrivateModule, PrivateSegment
from tests.support.reference_family import Family, make_family

LENGTH = 9


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    """Norms that are not one, so that one in the wrong place is noticed."""
    family = make_family(tmp_path_factory.mktemp("family"))
    generator = torch.Generator().manual_seed(5)
    for parameter in family.draft.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.data.mul_(6)
        parameter.data = parameter.data.bfloat16().float()  # what a saved draft holds
    return family


def private_module(
    family: Family, intermediate_size: int, fc_rank: int, attention_rank: int = 0
) -> PrivateModule:
    module = PrivateModule(family.draft.config.private_config(intermediate_size, fc_rank, attention_rank))
    generator = torch.Generator().manual_seed(7)
    for parameter in module.parameters():
        parameter.data.normal_(0.0, 0.3, generator=generator)
        parameter.data = parameter.data.bfloat16().float()
    return module.requires_grad_(False)


class Reference:
    """EAGLE-3 with `fc_norm` over the files of an export, and nothing else."""

    def __init__(self, directory: Path) -> None:
        self.document = json.loads((directory / "config.json").read_text())
        self.config: Any = LlamaConfig.from_pretrained(directory)
        self.config._attn_implementation = "eager"
        self.weights = {
            name: value.float() if value.is_floating_point() else value
            for name, value in load_file(directory / "model.safetensors").items()
        }
        size, layer = self.config.hidden_size, LlamaDecoderLayer(self.config, layer_idx=0)
        attention: Any = layer.self_attn
        for name in ("q_proj", "k_proj", "v_proj"):
            projection = getattr(attention, name)
            setattr(attention, name, nn.Linear(2 * size, projection.out_features, bias=False))
        parts = {name.removeprefix("midlayer."): value for name, value in self.weights.items()}
        self.hidden_norm = self._norm("midlayer.hidden_norm")
        layer.load_state_dict({name: parts[name] for name in layer.state_dict()})
        self.layer = layer.eval()
        self.rotary = LlamaRotaryEmbedding(self.config)

    def _norm(self, name: str) -> LlamaRMSNorm:
        norm = LlamaRMSNorm(self.config.hidden_size, self.config.rms_norm_eps)
        norm.weight.data = self.weights[f"{name}.weight"]
        return norm

    def fuse(self, features: Tensor) -> Tensor:
        """``[T, 3H]`` to ``[T, H]``."""
        assert self.document["fc_norm"]
        assert not self.document["norm_before_fc"]
        taps = [self._norm(f"fc_norm.{place}")(tap) for place, tap in enumerate(features.chunk(3, dim=-1))]
        return torch.cat(taps, dim=-1) @ self.weights["fc.weight"].T

    @torch.no_grad()
    def forward(self, hidden: Tensor, embeddings: Tensor) -> tuple[Tensor, Tensor]:
        """One causal pass ``[T, H]``; returns what is fed back, and logits over the draft's vocabulary."""
        assert self.document["norm_before_residual"]
        assert not self.document["norm_output"]
        length = hidden.shape[0]
        hidden = self.hidden_norm(hidden)
        inputs = torch.cat([self.layer.input_layernorm(embeddings), hidden], dim=-1)
        positions = torch.arange(length)[None]
        mask = torch.full((1, 1, length, length), float("-inf")).triu(1)
        attended = self.layer.self_attn(
            inputs[None], position_embeddings=self.rotary(inputs[None], positions), attention_mask=mask
        )[0][0]
        hidden = hidden + attended
        hidden = hidden + self.layer.mlp(self.layer.post_attention_layernorm(hidden))
        return hidden, self._norm("norm")(hidden) @ self.weights["lm_head.weight"].T


def own_passes(
    draft: DraftModel,
    fine_tune: FineTune,
    private: PrivateModule | None,
    features: Tensor,
    embeddings: Tensor,
) -> tuple[Tensor, Tensor]:
    """Logits of a pass over target features, and of one more that reads the draft's own last output."""

    def segments(length: int) -> list[PrivateSegment]:
        return [] if private is None else [PrivateSegment(private, 0, length)]

    length, cache = features.shape[0], draft.new_cache(LENGTH + 1)
    rows = fine_tune.head_rows(draft.draft_token_ids)
    first = PackedBatch(torch.arange(length), torch.arange(length), [AttentionRow(0, length, 0, length)])
    fused = draft.fuse(features, segments(length))
    hidden = draft(fused, embeddings[:length], first, cache, segments(length))
    second = PackedBatch(torch.tensor([length]), torch.tensor([length]), [AttentionRow(0, 1, 0, length + 1)])
    following = draft(hidden[-1:], embeddings[length:], second, cache, segments(1))
    return draft.logits(hidden, rows), draft.logits(following, rows)


@pytest.mark.parametrize("fine_tune", ["base", "math", "code", "medical"])
@pytest.mark.parametrize("sizes", [None, (20, 0), (0, 3), (0, 0, 3), (20, 3, 5)])
def test_the_export_drafts_what_the_draft_does(
    family: Family, tmp_path: Path, fine_tune: str, sizes: tuple[int, ...] | None
) -> None:
    draft, model = family.draft, family.fine_tunes[fine_tune]
    private = None if sizes is None else private_module(family, *sizes)
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(LENGTH, 96, generator=generator) * torch.tensor(
        [1.0, 10.0, 0.1]
    ).repeat_interleave(32)
    embeddings = model.embed(torch.randint(96, (LENGTH + 1,), generator=generator))
    with torch.no_grad():
        first, second = own_passes(draft, model, private, features, embeddings)

    export_draft(tmp_path / "out", draft, model, private)
    reference = Reference(tmp_path / "out")
    fused = reference.fuse(features)
    hidden, logits = reference.forward(fused, embeddings[:LENGTH])
    torch.testing.assert_close(logits, first, atol=1e-4, rtol=1e-4)
    _, more = reference.forward(torch.cat([fused, hidden[-1:]]), embeddings)
    torch.testing.assert_close(more[-1:], second, atol=1e-4, rtol=1e-4)
    if private is not None:  # the comparison can fail: another draft gives other logits
        assert not torch.allclose(own_passes(draft, model, None, features, embeddings)[0], first, atol=1e-2)


def test_what_the_configuration_and_the_maps_say(family: Family, tmp_path: Path) -> None:
    draft = family.draft
    private = private_module(family, 20, 0)
    export_draft(tmp_path / "out", draft, family.fine_tunes["code"], private, with_embeddings=True)
    reference = Reference(tmp_path / "out")
    document, weights = reference.document, reference.weights
    assert document["architectures"] == ["LlamaForCausalLMEagle3"]
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1
    assert document["intermediate_size"] == draft.config.intermediate_size + 20
    assert (document["vocab_size"], document["draft_vocab_size"]) == (96, 60)
    assert document["eagle_aux_hidden_state_layer_ids"] == [1, 2, 4]  # taps 0, 1 and 3; 0 is the embedding
    ids = draft.draft_token_ids
    assert torch.equal(torch.arange(60) + weights["d2t"], ids)
    assert torch.equal(weights["t2d"].nonzero()[:, 0], ids)
    assert torch.equal(weights["embed_tokens.weight"], family.fine_tunes["code"].embed(torch.arange(96)))
    assert set(weights) - {"fc_norm.0.weight", "fc_norm.1.weight", "fc_norm.2.weight"} == {
        *("fc.weight", "norm.weight", "lm_head.weight", "embed_tokens.weight", "d2t", "t2d"),
        *(f"midlayer.{n}.weight" for n in ("input_layernorm", "hidden_norm", "post_attention_layernorm")),
        *(f"midlayer.self_attn.{n}_proj.weight" for n in "qkvo"),
        *(f"midlayer.mlp.{n}_proj.weight" for n in ("gate", "up", "down")),
    }


def test_the_type_loses_nothing_unless_asked_to(family: Family, tmp_path: Path) -> None:
    draft, base = family.draft, family.fine_tunes["base"]
    rounded = FineTune("rounded", base.model)
    head = base.model.head.data.clone()
    try:
        base.model.head.data.copy_(head.bfloat16().float())
        assert export_draft(tmp_path / "a", draft, rounded)["torch_dtype"] == "bfloat16"
        corrected = private_module(family, 0, 2)  # the product of two matrices needs more than 8 bits
        assert export_draft(tmp_path / "b", draft, rounded, corrected)["torch_dtype"] == "float32"
        forced = export_draft(tmp_path / "c", draft, rounded, corrected, dtype="bfloat16")
        assert forced["torch_dtype"] == "bfloat16"
    finally:
        base.model.head.data.copy_(head)
    assert load_file(tmp_path / "c" / "model.safetensors")["fc.weight"].dtype == torch.bfloat16
    assert export_draft(tmp_path / "d", draft, base)["torch_dtype"] == "float32"


def test_refusals_leave_nothing_behind(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draft, base = family.draft, family.fine_tunes["base"]
    (tmp_path / "there").mkdir()
    with pytest.raises(ConflictError, match="exists"):
        export_draft(tmp_path / "there", draft, base)
    misfit = PrivateModule(PrivateConfig(16, 48, 4))
    with pytest.raises(MismatchError, match="width 16 and 48 features; the shared draft has 32 and 96"):
        export_draft(tmp_path / "new", draft, base, misfit)

    def fail(*_: object, **__: object) -> None:
        raise OSError("no space")

    monkeypatch.setattr("eda.adapters.store.export.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        export_draft(tmp_path / "new", draft, base)
    assert [path.name for path in tmp_path.iterdir() if path.name != "there"] == []
