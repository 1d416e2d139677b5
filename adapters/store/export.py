"""An adapted draft as an EAGLE-3 checkpoint, for engines that load one draft for one model.

Nothing is lost on the way: shared and private feed-forward network are one wider network (gate and up rows stacked,
down columns joined), a low-rank correction of ``fc`` is added to ``fc``, and the fine-tune's rows of the output layer
become ``lm_head``. The norms of the tapped layers in front of ``fc`` have no place in the first EAGLE-3 files; they
are what EAGLE-3.1 calls ``fc_norm``; an engine that does not know that name refuses the tensors or drafts badly.
"""

import json
import shutil
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file
from torch import Tensor

from eda.adapters.errors import ConflictError
from eda.adapters.store.files import sync_tree
from eda.adapters.store.manifest import Manifest
from eda.formats.checkpoint_files import CONFIG_FILE, WEIGHTS_FILE
from eda.models.draft import DraftConfig, DraftModel, check_private_fits
from eda.models.fine_tune import FineTune
from eda.models.private import PrivateModule

ExportType = Literal["auto", "bfloat16", "float32"]
EXPORT_TYPES: tuple[ExportType, ...] = ("auto", "bfloat16", "float32")


def export_draft(
    directory: Path,
    draft: DraftModel,
    fine_tune: FineTune,
    private: PrivateModule | None = None,
    *,
    manifest: Manifest | None = None,
    dtype: ExportType = "auto",
    with_embeddings: bool = False,
) -> dict[str, Any]:
    """Writes ``config.json`` and ``model.safetensors`` into ``directory``, as a whole or not at all.

    Args:
        draft, fine_tune, private: in float32, as their files hold them.
        manifest: of the adapter version that ``private`` comes from; kept in ``config.json`` under "eda".
        dtype: "auto" takes bfloat16 when every value fits into it, else float32; "bfloat16" rounds.
        with_embeddings: write the fine-tune's embeddings too. Engines take the target's otherwise, so those of a LoRA
            that changes them are always written.

    Returns the configuration. Raises ``ConflictError`` when ``directory`` exists, ``MismatchError`` for a private
    module of another draft's sizes.
    """
    if directory.exists():
        raise ConflictError(f"{directory} exists; name a directory that does not", param="out")
    if private is not None:
        check_private_fits(private.config, draft.config)
    tensors = _tensors(draft, fine_tune, private)
    lora = fine_tune.lora
    if with_embeddings or (
        lora is not None and (lora.embedding is not None or lora.embedding_weight is not None)
    ):
        tensors["embed_tokens.weight"] = fine_tune.embed(torch.arange(draft.config.vocab_size))
    stored = _stored_type(tensors, dtype)
    config = _configuration(draft.config, private, stored, manifest)
    unfinished = directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.tmp")
    unfinished.mkdir(parents=True)
    try:
        weights = {
            name: (tensor.to(stored) if tensor.is_floating_point() else tensor).detach().cpu().contiguous()
            for name, tensor in tensors.items()
        }
        save_file(weights, unfinished / WEIGHTS_FILE, metadata={"format": "pt"})
        (unfinished / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        # safetensors writes files that nobody else may read, whatever the umask says.
        (unfinished / WEIGHTS_FILE).chmod((unfinished / CONFIG_FILE).stat().st_mode & 0o777)
        sync_tree(unfinished)
        unfinished.rename(directory)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return config


@torch.no_grad()
def _tensors(draft: DraftModel, fine_tune: FineTune, private: PrivateModule | None) -> dict[str, Tensor]:
    """Names as engines read them, to float32 values and integer maps."""
    config = draft.config
    own = {
        name: value.float() if value.is_floating_point() else value
        for name, value in draft.state_dict().items()
    }
    fc, qkv, output = (own[f"{name}.weight"] for name in ("fc", "attention.qkv_proj", "attention.o_proj"))
    if private is not None and private.config.fc_rank:
        fc = fc + private.fc_up.float() @ private.fc_down.float()
    if private is not None and private.config.attention_rank:
        qkv = qkv + private.qkv_up.float() @ private.qkv_down.float()
        output = output + private.o_up.float() @ private.o_down.float()
    query, key, value = qkv.split([config.query_size, config.kv_size, config.kv_size])
    gate, up, down = _joined_feed_forward(own, private)
    ids = own["draft_token_ids"]
    chosen = torch.zeros(config.vocab_size, dtype=torch.bool)
    chosen[ids] = True
    norms = {
        f"fc_norm.{place}.weight": own[f"tap_norms.{place}.weight"] for place in range(len(config.tap_layers))
    }
    return {
        **norms,
        "fc.weight": fc,
        "midlayer.input_layernorm.weight": own["embedding_norm.weight"],
        "midlayer.hidden_norm.weight": own["hidden_norm.weight"],
        "midlayer.self_attn.q_proj.weight": query,
        "midlayer.self_attn.k_proj.weight": key,
        "midlayer.self_attn.v_proj.weight": value,
        "midlayer.self_attn.o_proj.weight": output,
        "midlayer.post_attention_layernorm.weight": own["feed_forward_norm.weight"],
        "midlayer.mlp.gate_proj.weight": gate,
        "midlayer.mlp.up_proj.weight": up,
        "midlayer.mlp.down_proj.weight": down,
        "norm.weight": own["norm.weight"],
        "lm_head.weight": fine_tune.head_rows(ids).float(),
        "d2t": ids - torch.arange(config.draft_vocab_size),
        "t2d": chosen,
    }


def _joined_feed_forward(
    own: Mapping[str, Tensor], private: PrivateModule | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gate, up and down of one network that computes ``shared(x) + private(x)``."""
    gate, up = own["feed_forward.gate_up_proj.weight"].chunk(2)
    down = own["feed_forward.down_proj.weight"]
    if private is None or not private.config.intermediate_size:
        return gate, up, down
    private_gate, private_up = private.gate_up_proj.float().chunk(2)
    return (
        torch.cat([gate, private_gate]),
        torch.cat([up, private_up]),
        torch.cat([down, private.down_proj.float()], dim=1),
    )


def _stored_type(tensors: Mapping[str, Tensor], wanted: ExportType) -> torch.dtype:
    if wanted != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[wanted]
    exact = all(
        torch.equal(tensor.bfloat16().float(), tensor.float())
        for tensor in tensors.values()
        if tensor.is_floating_point()
    )
    return torch.bfloat16 if exact else torch.float32


def _configuration(
    config: DraftConfig, private: PrivateModule | None, stored: torch.dtype, manifest: Manifest | None
) -> dict[str, Any]:
    added = private.config.intermediate_size if private is not None else 0
    # Engines count states from the embedding on: 0 is the embedding, k the output of the first k layers.
    layers = [layer + 1 for layer in config.tap_layers]
    return {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "hidden_size": config.hidden_size,
        "target_hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size + added,
        "num_hidden_layers": 1,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "vocab_size": config.vocab_size,
        "draft_vocab_size": config.draft_vocab_size,
        "tie_word_embeddings": False,
        "torch_dtype": str(stored).removeprefix("torch."),
        # Spelled out, since the engines' defaults differ.
        "norm_before_residual": True,
        "norm_before_fc": False,
        "fc_norm": True,
        "norm_output": False,
        "eagle_aux_hidden_state_layer_ids": layers,
        "eagle_config": {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": layers},
        "eda": {
            "target_fingerprint": config.target_fingerprint,
            "tap_layers": list(config.tap_layers),
            "adapter": None
            if manifest is None
            else {
                "name": manifest.name,
                "version": manifest.version,
                "fine_tune_fingerprint": manifest.fine_tune_fingerprint,
                "draft_fingerprint": manifest.draft_fingerprint,
            },
        },
    }
