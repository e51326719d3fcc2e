"""Hugging Face folders out: config.json, model.safetensors and preprocessor_config.json.

A uniform network (published.py), dense or pruned, is one for transformers' own classes. Any other goes with its code:
segprune's spec.py and model.py and the classes around them, copied into the folder, which
`from_pretrained(folder, trust_remote_code=True)` runs where segprune is not installed.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from segprune.checkpoint import load
from segprune.checkpoint.dialects import NUMERICS
from segprune.checkpoint.hf_in import GELUS
from segprune.checkpoint.numerics import with_numerics
from segprune.checkpoint.published import uniform_problem
from segprune.checkpoint.rename import from_ours
from segprune.checkpoint.write import Logits, Written, check_written
from segprune.data.transforms import MEAN, STD
from segprune.files import atomic_folder, save_tensors, write_json
from segprune.fold import unfold_decoder
from segprune.model import SegFormer, check_input
from segprune.spec import Spec, spec_to_dict

IGNORED = 255  # the label without a class
CODE = ("segprune.spec", "segprune.model", "segprune.checkpoint.modeling_segprune")


def write_folder(
    model: SegFormer,
    folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    input_shape: tuple[int, int] = (512, 512),
) -> Written:
    """Write the folder, read it again and keep it if the logits are the same; whole or not at all.

    A uniform network's folded head is unfolded. `input_shape` (H, W) is the size that the image processor resizes to.
    ValueError for names that are not one per class, a folder that holds something already, and logits that differ.
    """
    check_input((1, 3, *input_shape))
    labels = _labels(model.spec.num_classes, class_names)
    problem = uniform_problem(model.spec)
    config, state = _with_code(model) if problem else _stock(unfold_decoder(model))
    with atomic_folder(folder) as temporary:
        write_json(config | labels, temporary / "config.json")
        write_json(_processor(input_shape), temporary / "preprocessor_config.json")
        save_tensors({k: v.detach().cpu().clone() for k, v in state.items()}, {"format": "pt"}, temporary / WEIGHTS)
        if problem:
            _copy_code(temporary)
        readers = _folder_readers(temporary, stock=problem is None)
        return check_written(model, readers, tuple(_notes(model.spec, problem)))


WEIGHTS = "model.safetensors"


def _notes(spec: Spec, problem: str | None) -> list[str]:
    notes = []
    if problem:
        without = " (prune with --uniform to do without)" if spec.head == "mlp" else ""
        notes.append(
            f"Transformers' own classes cannot hold this network, since {problem}; the folder has its code with it, "
            f"which from_pretrained runs with trust_remote_code=True{without}."
        )
    if spec.numerics.align_corners:
        notes.append(
            "The network's last upsampling has align_corners=True and that of transformers' image processor False; "
            "logits before it are the same, the rims of masks differ a little."
        )
    return notes


def _labels(num_classes: int, names: Sequence[str] | None) -> dict[str, Any]:
    if names is not None and (len(names) != num_classes or not all(isinstance(name, str) for name in names)):
        raise ValueError(
            f"There are {len(names)} class names where the network has {num_classes} classes; give one for each."
        )
    names = [f"LABEL_{k}" for k in range(num_classes)] if names is None else names
    return {"id2label": {str(k): name for k, name in enumerate(names)}, "label2id": {n: k for k, n in enumerate(names)}}


def _stock(model: SegFormer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    target = replace(NUMERICS["hf"], gelu=model.spec.numerics.gelu)  # transformers has both
    state, spec = with_numerics(model.state_dict(), model.spec, target)
    stages = spec.stages
    config = {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        "num_channels": 3,
        "num_encoder_blocks": len(stages),
        "depths": [len(stage.blocks) for stage in stages],
        "hidden_sizes": [stage.width for stage in stages],
        "num_attention_heads": [stage.blocks[0].num_heads for stage in stages],
        "mlp_ratios": [stage.blocks[0].ffn_dim // stage.width for stage in stages],
        "sr_ratios": [stage.reduction_ratio for stage in stages],
        "patch_sizes": [stage.kernel_size for stage in stages],
        "strides": [stage.stride for stage in stages],
        "decoder_hidden_size": spec.decoder_dim,
        "hidden_act": next(name for name, gelu in GELUS.items() if gelu == spec.numerics.gelu),
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "classifier_dropout_prob": spec.numerics.head_dropout,
        "drop_path_rate": spec.numerics.drop_path,
        "reshape_last_stage": True,
        "semantic_loss_ignore_index": IGNORED,
    }
    return config, from_ours(state, spec, "hf")


def _with_code(model: SegFormer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {
        "architectures": ["SegpruneForSemanticSegmentation"],
        "model_type": "segprune",
        "auto_map": {
            "AutoConfig": "modeling_segprune.SegpruneConfig",
            "AutoModelForSemanticSegmentation": "modeling_segprune.SegpruneForSemanticSegmentation",
        },
        "spec": spec_to_dict(model.spec),
        "semantic_loss_ignore_index": IGNORED,
    }
    return config, {f"network.{name}": tensor for name, tensor in model.state_dict().items()}


def _copy_code(folder: Path) -> None:
    """The modules as they are, but importing each other from beside them."""
    for module in CODE:
        found = importlib.util.find_spec(module)
        assert found is not None
        assert found.origin is not None
        source = Path(found.origin).read_text(encoding="utf-8")
        for name in CODE:
            source = source.replace(f"from {name} import", f"from .{_file_stem(name)} import")
        (folder / f"{_file_stem(module)}.py").write_text(source, encoding="utf-8")


def _file_stem(module: str) -> str:
    """
    >>> _file_stem("segprune.spec"), _file_stem("segprune.checkpoint.modeling_segprune")
    ('segprune_spec', 'modeling_segprune')
    """
    leaf = module.rpartition(".")[2]
    return leaf if "segprune" in leaf else f"segprune_{leaf}"


def _processor(input_shape: tuple[int, int]) -> dict[str, Any]:
    return {
        "image_processor_type": "SegformerImageProcessor",
        "do_resize": True,
        "size": {"height": input_shape[0], "width": input_shape[1]},
        "resample": 2,  # bilinear
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": [round(mean / 255, 6) for mean in MEAN],
        "image_std": [round(std / 255, 6) for std in STD],
        "do_reduce_labels": False,
    }


def _folder_readers(folder: Path, *, stock: bool) -> dict[str, Logits]:
    """segprune, and where the folder is for `stock` transformers and that is installed, its own classes."""
    readers: dict[str, Logits] = {"segprune": lambda x: load(folder).parts(x)[1]}
    if stock:
        try:
            import transformers
        except ImportError:
            return readers
        readers[f"transformers {transformers.__version__}"] = lambda x: _stock_logits(folder, x)
    return readers


def _stock_logits(folder: Path, x: Tensor) -> Tensor:
    from transformers import SegformerForSemanticSegmentation
    from transformers.utils import logging

    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = SegformerForSemanticSegmentation.from_pretrained(folder, output_loading_info=True)
    finally:
        if bars:
            logging.enable_progress_bar()
    theirs, info = loaded
    assert not any(info.values()), info
    return theirs.eval()(x).logits
