"""Hugging Face folders out: config.json, model.safetensors and preprocessor_config.json.

A uniform network (published.py), dense or pruned, is written for transformers' own classes. Any other is written with
its code: segprune's spec.py and model.py and the classes around them are copied into the folder, and
`from_pretrained(folder, trust_remote_code=True)` runs them where segprune is not installed.
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
from segprune.checkpoint.hf_in import GELUS, PROCESSOR, WEIGHTS
from segprune.checkpoint.numerics import with_numerics
from segprune.checkpoint.preprocessing import to_huggingface
from segprune.checkpoint.published import fitting_options, uniform_problem
from segprune.checkpoint.rename import from_ours
from segprune.checkpoint.stated import names_or_placeholders
from segprune.checkpoint.write import Logits, Written, check_written
from segprune.files import atomic_folder, write_json
from segprune.fold import unfold_decoder
from segprune.model import SegFormer, check_input
from segprune.spec import Spec, spec_to_dict
from segprune.tensor_files import save_tensors

CODE = ("segprune.spec", "segprune.model", "segprune.checkpoint.modeling_segprune")


def write_folder(
    model: SegFormer,
    folder: str | os.PathLike[str],
    *,
    class_names: Sequence[str] | None = None,
    input_shape: tuple[int, int] = (512, 512),
) -> Written:
    """Writes the folder, reads it again and keeps it if the logits are the same; whole or not at all.

    A uniform network's folded head is unfolded. `input_shape` (H, W) is the size that the image processor resizes to.
    Raises ValueError for names that are not one per class, a folder that holds something already, and logits that
    differ.
    """
    check_input((1, 3, *input_shape))
    labels = _number_labels(model.spec.num_classes, class_names)

    # Transformers' own classes where they can hold the network, else ours with their code.
    problem = uniform_problem(model.spec)
    config, state = (
        _describe_with_code(model) if problem else _describe_stock(unfold_decoder(model))
    )

    with atomic_folder(folder) as temporary:
        write_json(config | labels, temporary / "config.json")
        processor = to_huggingface(model.spec, input_shape)
        write_json(processor, temporary / PROCESSOR)

        # Clones, since safetensors refuses tensors that share memory.
        state = {name: tensor.detach().cpu().clone() for name, tensor in state.items()}
        save_tensors(state, {"format": "pt"}, temporary / WEIGHTS[0])
        if problem:
            _copy_code(temporary)

        readers = _folder_readers(temporary, stock=problem is None)
        return check_written(model, readers, tuple(_write_notes(model.spec, problem)))


def _write_notes(spec: Spec, problem: str | None) -> list[str]:
    notes = []
    if problem:
        options = fitting_options(spec, uniform_problem)
        without = f" (prune with {options} to do without)" if options else ""
        notes.append(
            f"Transformers' own classes cannot hold this network, since {problem}; the folder has its code with it, "
            f"which from_pretrained runs with trust_remote_code=True{without}."
        )

    # Both upsample the same logits to the image, but by other rules.
    if spec.numerics.align_corners:
        notes.append(
            "The network's last upsampling has align_corners=True and that of transformers' image processor False; "
            "logits before it are the same, the rims of masks differ a little."
        )
    if spec.preprocessing.label_offset not in (0, -1):
        notes.append(
            f"Labels were read with `label_offset` {spec.preprocessing.label_offset}, which their image processor "
            "cannot do; shift the labels before it."
        )
    return notes


def _number_labels(num_classes: int, names: Sequence[str] | None) -> dict[str, Any]:
    names = names_or_placeholders(num_classes, names)
    numbers = {name: number for number, name in enumerate(names)}
    return {
        "id2label": {str(number): name for number, name in enumerate(names)},
        "label2id": numbers,
    }


def _describe_stock(model: SegFormer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    target = replace(NUMERICS["hf"], gelu=model.spec.numerics.gelu)  # transformers has both

    # Transformers has fixed eps and scales, so the weights make up for the difference.
    state, spec = with_numerics(model.state_dict(), model.spec, target)

    stages = spec.stages
    config = {
        "architectures": ["SegformerForSemanticSegmentation"],
        "model_type": "segformer",
        "num_channels": spec.in_channels,
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
        "semantic_loss_ignore_index": spec.preprocessing.ignore_index,
    }
    return config, from_ours(state, spec, "hf")


def _describe_with_code(model: SegFormer) -> tuple[dict[str, Any], dict[str, Tensor]]:
    config = {
        "architectures": ["SegpruneForSemanticSegmentation"],
        "model_type": "segprune",
        # Which class in the copied code transformers' Auto classes load.
        "auto_map": {
            "AutoConfig": "modeling_segprune.SegpruneConfig",
            "AutoModelForSemanticSegmentation": "modeling_segprune.SegpruneForSemanticSegmentation",
        },
        "spec": spec_to_dict(model.spec),
        "semantic_loss_ignore_index": model.spec.preprocessing.ignore_index,
    }
    return config, {f"network.{name}": tensor for name, tensor in model.state_dict().items()}


def _copy_code(folder: Path) -> None:
    """Copies the modules as they are, but importing each other from beside them."""
    for module in CODE:
        location = importlib.util.find_spec(module)
        assert location is not None
        assert location.origin is not None
        source = Path(location.origin).read_text(encoding="utf-8")

        # Imports of these modules become imports of the copies beside them.
        for name in CODE:
            source = source.replace(f"from {name} import", f"from .{_file_stem(name)} import")
        (folder / f"{_file_stem(module)}.py").write_text(source, encoding="utf-8")


def _file_stem(module: str) -> str:
    """Returns the name under which a module is copied.

    >>> _file_stem("segprune.spec"), _file_stem("segprune.checkpoint.modeling_segprune")
    ('segprune_spec', 'modeling_segprune')
    """
    leaf = module.rpartition(".")[2]
    return leaf if "segprune" in leaf else f"segprune_{leaf}"


def _folder_readers(folder: Path, *, stock: bool) -> dict[str, Logits]:
    """Returns segprune, and transformers' own classes if the folder is for them (`stock`) and they are installed."""
    readers: dict[str, Logits] = {"segprune": lambda x: load(folder).parts(x)[1]}
    if not stock:
        return readers

    try:
        import transformers
    except ImportError:
        return readers
    readers[f"transformers {transformers.__version__}"] = lambda x: _run_stock(folder, x)
    return readers


def _run_stock(folder: Path, x: Tensor) -> Tensor:
    from transformers import SegformerForSemanticSegmentation
    from transformers.utils import logging

    # Its progress bar would stand amid our output.
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        loaded: Any = SegformerForSemanticSegmentation.from_pretrained(
            folder, output_loading_info=True
        )
    finally:
        if bars:
            logging.enable_progress_bar()

    theirs, info = loaded

    # No key was missing, unexpected or of another shape.
    assert not any(info.values()), info
    return theirs.eval()(x).logits
