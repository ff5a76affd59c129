"""Where the texts of a fidelity run come from: cut, asked for, or read again; and the errors of each."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rkv_vllm.evaluation.fidelity_texts import (
    INSTRUCTIONS,
    TEMPERATURE,
    GivenTexts,
    OwnText,
    Source,
    TextsToWrite,
    Window,
    WrittenText,
    cut,
    source_of,
)
from rkv_vllm.evaluation.fidelity_writer import check_tokenizer

#: Two texts of a model, their instructions of two and three tokens.
OWN = OwnText(
    model="m",
    temperature=0.7,
    seed=0,
    sampling_defaults={"top_p": 0.9},
    forbidden_tokens=[0],
    texts=[
        WrittenText(instruction="a", seed=1, instruction_tokens=2, tokens=list(range(10, 20)), text="one"),
        WrittenText(instruction="b", seed=2, instruction_tokens=3, tokens=list(range(30, 40)), text="two"),
    ],
)


def test_texts_are_cut_into_whole_windows() -> None:
    """Proves windows that follow each other, the model's first token before each, and the rest left out."""
    windows = cut("text", range(10, 34), [1], 4, 5, 9)
    assert windows == [
        Window("text", (1, 10, 11, 12), (13, 14, 15, 16, 17)),
        Window("text", (1, 18, 19, 20), (21, 22, 23, 24, 25)),
        Window("text", (1, 26, 27, 28), (29, 30, 31, 32, 33)),
    ]
    assert cut("text", range(10, 34), [1], 4, 5, 2) == windows[:2]
    with pytest.raises(ValueError, match="--text: text has 7 tokens, and one window takes 8"):
        cut("text", range(7), [1], 4, 5, 2)
    with pytest.raises(ValueError, match="--prompt: takes more than the model's own 1"):
        cut("text", range(70), [1], 1, 5, 2)


def test_own_texts_are_cut_from_the_instruction_on() -> None:
    """Proves that a window's prompt holds the instruction to its last token, and that what is behind a window
    and texts above the number of windows are left out."""
    assert OWN.windows(3, 5, 9) == [
        Window("own text 1", (10, 11, 12), (13, 14, 15, 16, 17)),
        Window("own text 2", (30, 31, 32), (33, 34, 35, 36, 37)),
    ]
    assert OWN.windows(2, 8, 1) == [Window("own text 1", (10, 11), tuple(range(12, 20)))]
    with pytest.raises(ValueError, match=r"--prompt: takes at least 3 tokens for this .* not 2: 'b'"):
        OWN.windows(2, 5, 9)
    with pytest.raises(ValueError, match="--tokens: own text 1 has 10 tokens, and a window takes 11"):
        OWN.windows(3, 8, 9)


def test_every_text_has_a_seed_of_its_own() -> None:
    """Proves that instructions take turns with new seeds, that more texts change none of the first, and that
    another seed changes all."""
    many = TextsToWrite(["a", "b"], 5, 0.7, 3).requests()
    assert [instruction for instruction, _ in many] == ["a", "b", "a", "b", "a"]
    assert len({seed for _, seed in many}) == 5
    assert TextsToWrite(["a", "b"], 2, 0.7, 3).requests() == many[:2]
    others = TextsToWrite(["a", "b"], 5, 0.7, 4).requests()
    assert not {seed for _, seed in many} & {seed for _, seed in others}


def source(**options: Any) -> Source:
    nothing: dict[str, Any] = {
        "texts": [], "own_text": False, "own_text_from": None, "instructions": None, "temperature": None
    }  # fmt: skip
    return source_of(**{**nothing, "seed": 3, "windows": 4, **options})


def test_options_become_a_source(tmp_path: Path) -> None:
    """Proves what each of the three options gives, the defaults of own texts, and that blank lines are no
    instructions."""
    text, asked, result = (tmp_path / name for name in ("text.txt", "asked.txt", "result.json"))
    text.write_text("words")
    asked.write_text("  one \n\n two\n")
    result.write_text(f'{{"own_text": {OWN.model_dump_json()}, "rows": []}}')
    assert source(texts=[text]) == GivenTexts({"text.txt": "words"})
    assert source(own_text=True) == TextsToWrite(INSTRUCTIONS, 4, TEMPERATURE, 3)
    assert source(own_text=True, instructions=asked, temperature=1.5) == TextsToWrite(
        ["one", "two"], 4, 1.5, 3
    )
    assert source(own_text_from=result) == OWN
    greedy = source(own_text=True, instructions=asked, temperature=0.0, windows=2)
    assert greedy == TextsToWrite(["one", "two"], 2, 0.0, 3)


def test_wrong_sources_are_named(tmp_path: Path) -> None:
    """Proves that options which exclude or miss each other, and files that hold something else, are named."""
    file, empty, binary = (tmp_path / name for name in ("file.json", "empty.txt", "binary.txt"))
    file.write_text('{"rows": [], "own_text": null}')
    empty.write_text(" \n")
    binary.write_bytes(b"\xff\xfe")
    one_of = "takes one of --text, --own-text, --own-text-from, not "
    wrong: list[tuple[dict[str, Any], str]] = [
        ({}, f"{one_of}none of them"),
        ({"texts": [file], "own_text": True}, f"{one_of}--text and --own-text"),
        ({"own_text": True, "own_text_from": file}, f"{one_of}--own-text and --own-text-from"),
        ({"texts": [file], "instructions": file}, "--instructions: is for --own-text, not for --text"),
        (
            {"own_text_from": file, "temperature": 0.0},
            "--temperature: is for --own-text, not for --own-text-from",
        ),
        ({"own_text": True, "instructions": empty}, f"--instructions: {empty} is empty"),
        ({"own_text": True, "instructions": binary}, f"--instructions: {binary} is not text in UTF-8"),
        ({"texts": [binary]}, f"--text: {binary} is not text in UTF-8"),
        ({"own_text_from": file}, f"--own-text-from: {file} is no result of `rkv-vllm fidelity --own-text`"),
        ({"own_text_from": empty}, f"--own-text-from: {empty} is no result"),
        (
            {"own_text": True, "temperature": 0.0, "windows": 9},
            "--temperature: greedy texts .* are all the same",
        ),
    ]
    for options, named in wrong:
        with pytest.raises(ValueError, match=named):
            source(**options)


def test_another_tokenizer_is_refused() -> None:
    """Proves that texts are measured by a model whose tokens are theirs, whatever its name is."""
    words = {tuple(text.tokens[text.instruction_tokens :]): text.text for text in OWN.texts}

    def engine(decode: Any) -> Any:
        return SimpleNamespace(get_tokenizer=lambda: SimpleNamespace(decode=decode))

    check_tokenizer(engine(lambda ids: words[tuple(ids)]), OWN)
    with pytest.raises(ValueError, match="--own-text-from: the texts were written by m, and the model's"):
        check_tokenizer(engine(lambda ids: "one"), OWN)
