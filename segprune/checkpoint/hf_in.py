"""Hugging Face folders and hub names: config.json beside the weights, whole or in shards.

The weights say what the network is; config.json must agree with them, and adds the dropout rates of training.
Source of its keys: transformers' SegformerConfig.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from segprune.checkpoint.find import LORA
from segprune.checkpoint.ours import FORMAT, VERSION
from segprune.checkpoint.stated import NUM_HEADS_KEY, read_classes
from segprune.files import read_json
from segprune.spec import Gelu, Spec, spec_from_dict, spec_to_dict
from segprune.tensor_files import SUFFIXES, read_file

GELUS: dict[str, Gelu] = {"gelu": "none", "gelu_pytorch_tanh": "tanh"}  # transformers' words
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PROCESSOR = "preprocessor_config.json"
JSONS = ("config.json", PROCESSOR, "processor_config.json")
TENSORFLOW_WEIGHTS = ("tf_model.h5", "flax_model.msgpack")


def is_hub_name(path: str | os.PathLike[str]) -> bool:
    """Tells whether it reads like "org/name" and is neither a path that exists nor one of a checkpoint file."""
    # A path that exists always wins over a name on the hub.
    named_so = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", os.fspath(path)) is not None
    return named_so and Path(path).suffix not in SUFFIXES and not Path(path).exists()


def download(name: str) -> Path:
    """Returns the folder with a hub name's config.json and weights, from huggingface.co or this machine's cache."""
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            f"{name} is to be downloaded from huggingface.co; pip install huggingface_hub first."
        ) from error

    # Safetensors are preferred, so that not both are downloaded.
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*JSONS, "model*.safetensors*"]))
        if not any(folder.glob("model*.safetensors*")):
            folder = Path(
                snapshot_download(name, allow_patterns=[*JSONS, "pytorch_model*.bin*"])
            )
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is neither a file or folder here nor could it be downloaded from huggingface.co "
            f"({type(error).__name__}); check the name and the connection."
        ) from error
    return folder


def read_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns state dict and config of a folder as `save_pretrained` writes it.

    Raises FileNotFoundError that names what is missing.
    """
    if (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} {LORA}")
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder} is a folder without config.json, so not one of Hugging Face; {_advise(folder)}."
        )

    # An entry that is null has transformers' default, as if it were missing.
    entries = read_json(folder / "config.json", "a whole folder of Hugging Face").items()
    config = {name: value for name, value in entries if value is not None}

    # Weights are one file, or several shards that an index lists.
    for name in WEIGHTS:
        if (folder / name).is_file():
            return _read_weights(folder / name), config
        if (folder / f"{name}.index.json").is_file():
            return _read_shards(folder / f"{name}.index.json"), config

    # A variant, model.fp16.safetensors, is read where there is no other.
    variants = []
    for name in WEIGHTS:
        stem, _, suffix = name.partition(".")
        variants += sorted(folder.glob(f"{stem}.*.{suffix}"))
        variants += sorted(folder.glob(f"{name}.index.*.json"))
    if len(variants) > 1:
        names = ", ".join(path.name for path in variants)
        raise ValueError(
            f"{folder} has weights in several variants ({names}); keep one of them there."
        )
    for path in variants:
        return (_read_shards(path) if path.suffix == ".json" else _read_weights(path)), config

    for name in TENSORFLOW_WEIGHTS:
        if (folder / name).is_file():
            read_file(folder / name)  # raises what tells how it is converted
    raise FileNotFoundError(
        f"{folder} has config.json but no weights; put {' or '.join(WEIGHTS)} beside it."
    )


def read_processor(folder: Path) -> dict[str, Any]:
    """Returns what the folder says of its images and labels: empty where it says nothing."""
    if (folder / PROCESSOR).is_file():
        return read_json(folder / PROCESSOR, "an image processor of Hugging Face")

    # Where several processors were saved together, this is one part of the file.
    whole = folder / JSONS[-1]
    part = (
        read_json(whole, "processors of Hugging Face").get("image_processor")
        if whole.is_file()
        else None
    )
    return part if isinstance(part, dict) else {}


def _advise(folder: Path) -> str:
    """Returns what to give in place of a folder that is no checkpoint: what lies in it, if it is one."""
    # The Trainer of transformers writes checkpoint-500, checkpoint-1000 and so on.
    steps = sorted(
        (len(path.parent.name), path.parent) for path in folder.glob("*/config.json")
    )
    if steps:
        return f"give a folder in it, such as {steps[-1][1]}"
    files = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    return f"give the checkpoint file in it{f', such as {files[-1]}' if files else ''}"


def _read_shards(index: Path) -> dict[str, Any]:
    weight_map = read_json(index, "a whole folder of Hugging Face").get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(
            f"{index} has no weight_map that names its shards; copy or download it again."
        )

    # Only names count: shards lie in this folder and nowhere else.
    state: dict[str, Any] = {}
    for name in sorted({Path(str(name)).name for name in weight_map.values()}):
        state |= _read_weights(index.parent / name)
    return state


def _read_weights(path: Path) -> dict[str, Any]:
    weights = read_file(path)[0]
    if not isinstance(weights, dict) or not all(isinstance(name, str) for name in weights):
        raise ValueError(f"{path} holds no weights by name; copy or download it again.")
    return weights


def record_from_folder(
    state_dict: Mapping[str, Any], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the content of a folder that `convert` wrote with our own code, in the form of our files."""
    labels = config.get("id2label")
    return {
        # Weights lie in the attribute `network` of the class that was copied into the folder.
        "format": FORMAT,
        "version": VERSION,
        "spec": config.get("spec"),
        "state_dict": {
            name.removeprefix("network."): tensor for name, tensor in state_dict.items()
        },
        "extra": read_classes(config, len(labels) if isinstance(labels, dict) else 0),
    }


def apply_config(
    spec: Spec, config: Mapping[str, Any], *, backbone_only: bool
) -> tuple[Spec, tuple[str, ...]]:
    """Returns the spec with config.json's dropout rates, and notes on what is not taken over.

    Raises ValueError if it describes another network than the weights. Its layer_norm_eps is ignored, as transformers
    does.
    """
    # What it leaves out cannot contradict the weights.
    expected = _describe(spec)
    if not backbone_only:
        expected["decoder_hidden_size"] = spec.decoder_dim

    activation = config.get("hidden_act", "gelu")
    if not isinstance(activation, str) or activation not in GELUS:
        raise ValueError(
            f"config.json says hidden_act {activation}; only networks with {' or '.join(GELUS)} are read."
        )
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(
                f"config.json says {name} {config[name]}, but a {spec.variant} as in the weights has {value}; "
                "give a folder whose two files belong together."
            )

    # Rates of dropout only matter in training; those inside blocks have no place here.
    notes = tuple(
        f"config.json's {name} {config[name]} was not taken over: no dropout inside blocks here."
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob")
        if config.get(name)
    )
    numerics = replace(
        spec.numerics,
        gelu=GELUS[activation],
        drop_path=config.get("drop_path_rate", spec.numerics.drop_path),
        head_dropout=config.get("classifier_dropout_prob", spec.numerics.head_dropout),
    )
    # Written and read again, so that these rates are checked like those in our own files.
    return spec_from_dict(spec_to_dict(replace(spec, numerics=numerics))), notes


def _describe(spec: Spec) -> dict[str, Any]:
    """Returns what config.json must say of the encoder, if it says it."""
    stages = spec.stages
    return {
        "model_type": "segformer",
        "num_channels": spec.in_channels,
        "depths": [len(stage.blocks) for stage in stages],
        "hidden_sizes": [stage.width for stage in stages],
        NUM_HEADS_KEY: [stage.blocks[0].num_heads for stage in stages],
        # Blocks of a stage are alike in a foreign network, so the first stands for all.
        "mlp_ratios": [stage.blocks[0].ffn_dim / stage.width for stage in stages],
        "sr_ratios": [stage.reduction_ratio for stage in stages],
        "patch_sizes": [stage.kernel_size for stage in stages],
        "strides": [stage.stride for stage in stages],
    }
