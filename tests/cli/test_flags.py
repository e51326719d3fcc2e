"""Flags that are derived from records: types, defaults and help of a library's options, titles, and what was given."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest
import typer
from typer.testing import CliRunner

from segprune.cli.flags import CONTEXT, command, switch
from segprune.options import option


@dataclass(frozen=True)
class Options:
    """As a library declares its own."""

    epochs: int = option(50, "Passes over the images.", panel="How long")
    size: tuple[int, int] = option((512, 512), "Pixels.", metavar="H W")
    decay: Literal["poly", "cosine"] | None = option(None, "How the rate falls.")
    weights: str | tuple[float, ...] = option("", "By class.")
    compile: bool = option(False, "Compile first.", panel="Speed")

    def __post_init__(self) -> None:
        if self.epochs < 1:
            raise ValueError(f"`epochs` is {self.epochs}; it must be 1 or more.")


@dataclass(frozen=True)
class Flags:
    folder: Annotated[str, typer.Argument(metavar="DIR")]
    cuda: Annotated[bool, switch("--cuda", "Use the GPU.")] = False


Seen = list[tuple[Flags, Options, frozenset[str]]]


def invoke(*flags: str) -> tuple[Seen, str]:
    """The records that a command gets, and all that it prints."""
    seen: Seen = []

    def run(flags: Flags, options: Options, given: frozenset[str]) -> None:
        seen.append((flags, options, given))

    app = typer.Typer(context_settings=CONTEXT)
    app.command()(command(run))
    result = CliRunner().invoke(app, [*flags])
    return seen, result.output


def test_a_command_gets_its_records_and_which_flags_were_given() -> None:
    seen, _ = invoke(
        "out",
        "--epochs",
        "3",
        "--size",
        "32",
        "64",
        "--decay",
        "cosine",
        "--compile",
        "--weights",
        "1,2",
    )
    assert seen == [
        (
            Flags("out"),
            Options(3, (32, 64), "cosine", "1,2", compile=True),
            frozenset({"folder", "epochs", "size", "decay", "compile", "weights"}),
        )
    ]


def test_what_is_not_given_is_the_records_default() -> None:
    seen, _ = invoke("out")
    assert seen == [(Flags("out"), Options(), frozenset({"folder"}))]


def test_what_a_record_refuses_names_the_flag() -> None:
    assert invoke("out", "--epochs", "0") == (
        [],
        "Error: --epochs is 0; it must be 1 or more.\n",
    )


def test_the_help_has_the_options_help_default_and_titles() -> None:
    _, out = invoke("--help")
    shown = " ".join(out.split())
    for words in (
        "How long",
        "Passes over the images. [default: 50]",
        "--size H W Pixels.",
        "Speed",
        "Compile first.",
    ):
        assert words in shown


@pytest.mark.parametrize("flag", ["--size 32", "--epochs many"])
def test_a_value_of_another_type_is_refused(flag: str) -> None:
    seen: Any
    seen, out = invoke("out", *flag.split())
    assert seen == []
    assert flag.split()[0] in out
