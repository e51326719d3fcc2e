"""Commands from records: every field of the records that a command's `run` takes becomes a flag.

A field of a library's record of options (`segprune.options`) brings its own default and help. Fields of the command
line's own records carry an annotation of typer; those that several commands share stand here.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import typer
from typer.core import TyperCommand

from segprune.checkpoint import Checkpoint
from segprune.cli.console import one_sentence
from segprune.data import LAYOUTS
from segprune.machine import exact_products
from segprune.options import option
from segprune.spec import Channels, Preprocessing, Spec, stated_preprocessing

NUMBERS = "R G B ..."  # a flag of as many numbers as an image has channels
CONTEXT = {
    "token_normalize_func": lambda flag: flag.replace("-", "_"),
    "help_option_names": ["--help", "_h"],
}


def switch(flag: str, text: str) -> Any:
    """An option that takes no value; its help names no type, which would look as if it took one."""
    return typer.Option(flag, metavar="", help=text)


Trust = Annotated[
    bool,
    switch(
        "--trust",
        "Open .pt2 and .torchscript files too, which run the code of whoever made them.",
    ),
]
ModelFile = Annotated[
    str,
    typer.Argument(
        metavar="FILE", help=".pth, .pt, .safetensors, a Hugging Face folder or hub name."
    ),
]
Data = Annotated[
    str, typer.Option("--data", help="Data set: a folder, a list file or a Hugging Face name.")
]
Layout = Annotated[
    str | None,
    typer.Option(
        "--layout", help=f"Overrules the layout that is recognised: {', '.join(LAYOUTS)}."
    ),
]
ValSplit = Annotated[
    str,
    typer.Option("--val_split", help="Score on this split instead of val, for example test."),
]
ValShare = Annotated[
    float | None,
    typer.Option(
        "--val_share",
        help="Set this share of train aside to score on, by --seed; 0.1 is usual.",
    ),
]
SkipBad = Annotated[
    bool, switch("--skip_bad", "Leave out images that cannot be read; all are tried first.")
]
Dialect = Annotated[
    str | None, typer.Option("--dialect", help="Overrules the dialect that is recognised.")
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", help="Which of several sets of weights in the file, for example ema."
    ),
]
Heads = Annotated[
    tuple[int, int, int, int] | None,
    typer.Option(
        "--heads",
        metavar="N N N N",
        help="Attention heads of each stage of a network that is no b0 to b5.",
    ),
]
Cuda = Annotated[bool, switch("--cuda", "Use the GPU.")]
Compile = Annotated[
    bool,
    switch(
        "--compile",
        "Compile the network for each size of image (torch.compile, on a GPU CUDA graphs too): the first of a size "
        "takes up to a minute, all that follow are faster.",
    ),
]
LoaderProcesses = Annotated[
    int | None,
    typer.Option(
        "--num_workers",
        min=0,
        help="Processes that load images; if not given, as many as cores, 8 at most.",
    ),
]
Amp = Annotated[
    str,
    typer.Option(
        "--amp",
        help="Mixed precision of training: no, fp16, bf16 or auto, which is what the GPU has, and on a CPU no.",
    ),
]
Verbose = Annotated[
    bool, switch("--verbose", "Print every setting, those left at their defaults too.")
]


@dataclass(frozen=True)
class InputFlags:
    """How pixels and labels are read; what is not given is as the checkpoint says, else ImageNet's."""

    PANELS: ClassVar[Mapping[str, str]] = {
        "mean": "Pixels and labels, if not as the checkpoint says"
    }

    mean: tuple[float, ...] | None = option(
        None,
        "Subtracted from the pixels 0..255 of each channel: as many numbers as the network takes channels.",
        metavar=NUMBERS,
    )
    std: tuple[float, ...] | None = option(
        None, "What they are then divided by.", metavar=NUMBERS
    )
    channels: Channels | None = option(
        None, "Order in which the network takes them: rgb or bgr."
    )
    label_offset: int | None = option(
        None, "Added to every label: -1 for classes numbered from 1; 0 is ignored then."
    )
    ignore_index: int | None = option(
        None, "Label that is ignored, as 255 always is; counted after the offset."
    )

    def apply(self, opened: Checkpoint) -> Checkpoint:
        """Returns the checkpoint with what was given in place of its own."""
        return replace(opened, spec=self.apply_to(opened.spec))

    def apply_to(self, spec: Spec) -> Spec:
        spec = replace(spec, preprocessing=self.overrule(spec.preprocessing))
        if self.mean is not None or self.std is not None:
            stated_preprocessing(spec)  # refuses another number of channels
        return spec

    def overrule(self, own: Preprocessing) -> Preprocessing:
        given = {name: value for name, value in asdict(self).items() if value is not None}
        return replace(own, **given)


def refuse_without_effect(given: frozenset[str], *rules: tuple[str, bool, str]) -> None:
    """Raises ValueError for a flag that was given although it would change nothing.

    A rule is a flag's name, whether it has no effect, and where: "with --kind mask".
    """
    for name, has_no_effect, where in rules:
        if name in given and has_no_effect:
            raise ValueError(f"`{name}` has no effect {where}; leave it out.")


def command(run: Callable[..., None]) -> Callable[..., None]:
    """Returns a function for typer whose flags are the fields of the records that `run` takes.

    `run` may also take `given`, the names of the flags that were given. A message of the library that names an
    argument in backticks, `like_this`, is printed with the flag of that name.
    """
    # Annotations are text in these modules; `eval_str` turns them into types.
    signature = inspect.signature(run, eval_str=True).parameters
    records = {
        name: parameter.annotation for name, parameter in signature.items() if name != "given"
    }
    assert all(map(is_dataclass, records.values())), f"{run} takes something that is no record"
    parameters: list[inspect.Parameter] = []
    for record in records.values():
        parameters.extend(_parameters_of(record))

    def body(context: typer.Context, **flags: Any) -> None:
        # Messages of the library name arguments; this says which flag each one is.
        names = {
            parameter.name: parameter.opts[0]
            for parameter in context.command.params
            if parameter.name
        }
        with one_sentence(names), exact_products():
            # A flag that repeats its default was given, too; only its source tells.
            sources = {name: context.get_parameter_source(name) for name in flags}
            given = {
                name
                for name, source in sources.items()
                if source is not None and source.name != "DEFAULT"
            }

            # Some flags only repeat what a file says that was given as well.
            for record in records.values():
                for name in getattr(record, "list_repeated", _list_none)(flags, given):
                    del flags[name]
                    given.remove(name)

            # Records check themselves, so they are built where errors become one sentence.
            made = {
                name: record(
                    **{
                        field.name: flags[field.name]
                        for field in fields(record)
                        if field.name in flags
                    }
                )
                for name, record in records.items()
            }
            if "given" in signature:
                made["given"] = frozenset(given)
            run(**made)

    # Typer reads the flags off the signature: here one that is made of the records.
    context = inspect.Parameter(
        "context", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    body.__signature__ = inspect.Signature([context, *parameters])  # type: ignore[attr-defined]
    body.__annotations__ = {
        parameter.name: parameter.annotation for parameter in (context, *parameters)
    }

    # --help wraps the paragraphs itself.
    paragraphs = inspect.cleandoc(run.__doc__ or "").split("\n\n")
    body.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    return body


def _list_none(flags: Mapping[str, Any], given: Collection[str]) -> list[str]:
    return []


def _parameters_of(record: type[Any]) -> list[inspect.Parameter]:
    """Returns a record's fields as parameters that typer understands, below the titles that the record gives."""
    signature = inspect.signature(record, eval_str=True).parameters
    panels = getattr(record, "PANELS", {})
    title = None
    parameters = []
    for field in fields(record):
        parameter = signature[field.name]
        # A title holds for the fields below it, up to the next title.
        title = panels.get(field.name, field.metadata.get("panel")) or title

        if get_origin(parameter.annotation) is not Annotated and not field.metadata:
            continue  # an option for Python alone

        # Most flags are derived from their field; some fields bring an option of their own.
        if get_origin(parameter.annotation) is Annotated:
            kind, option = get_args(parameter.annotation)
            option = copy.copy(
                option
            )  # several commands share some, each below a title of its own
        else:
            kind, option = (
                _flag_type(parameter.annotation),
                _flag_of(field.name, parameter.annotation, field.metadata),
            )

        option.rich_help_panel = title
        parameters.append(parameter.replace(annotation=Annotated[kind, option]))
    return parameters


def _flag_of(name: str, annotation: Any, metadata: Mapping[str, Any]) -> Any:
    help_text = re.sub(r"`(\w+)`", r"--\1", metadata["help"])
    if annotation is bool:
        return switch(f"--{name}", help_text)
    if annotation == bool | None:
        return typer.Option(f"--{name}/--no_{name}", help=help_text)
    metavar = metadata["metavar"] or None
    if _is_variadic(annotation):
        return typer.Option(f"--{name}", metavar=metavar, help=help_text, parser=parse_numbers)
    return typer.Option(f"--{name}", metavar=metavar, help=help_text)


def _is_variadic(annotation: Any) -> bool:
    return annotation == tuple[float, ...] | None


def parse_numbers(text: str | Sequence[float]) -> tuple[float, ...]:
    """Returns the numbers between commas and blanks."""
    words = re.split(r"[,\s]+", text.strip(", ")) if isinstance(text, str) else text
    return tuple(float(word) for word in words)


class Command(TyperCommand):
    """Takes any number of numbers behind a flag: `--mean 1 2 3 4` is `--mean "1 2 3 4"`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        flags: set[str] = set()
        for parameter in self.params:
            if parameter.metavar == NUMBERS:
                flags.update(parameter.opts)

        joined: list[str] = []
        numbers_follow = False
        for word in args:
            is_number = (
                re.fullmatch(r"[-+]?[\d.]+(e[-+]?\d+)?,?", word, re.IGNORECASE) is not None
            )
            if numbers_follow and is_number and joined[-1] not in flags:
                joined[-1] += f" {word}"
            else:
                numbers_follow = word in flags or (numbers_follow and is_number)
                joined.append(word)
        return super().parse_args(ctx, joined)


def _flag_type(annotation: Any) -> Any:
    """Returns the type that typer parses: text for one of several words, and where text is one of several types."""
    kinds = (
        get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    )
    if _is_variadic(annotation):
        return str | None  # which the flag's own parser turns into numbers
    if str not in kinds and not any(get_origin(kind) is Literal for kind in kinds):
        return annotation
    return str | None if NoneType in kinds else str
