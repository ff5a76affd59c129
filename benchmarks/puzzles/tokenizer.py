"""The model's tokens: words of the questions and of the chains, and single characters for everything else.

    cd benchmarks && python -m puzzles.tokenizer DIR

writes the tokenizer for Hugging Face into a folder, with a chat template that opens the thinking.
"""

from __future__ import annotations

import re
import sys
from functools import cache
from pathlib import Path

import reasoning_gym
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from puzzles.chains import MOVES, WORDS
from puzzles.questions import HELD_OUT_SEED, PUZZLES
from rkv_vllm.evaluation.tasks.reasoning_gym import PROMPT

KEYWORDS = ("<pad>", "<bos>", "<eos>", "<user>", "<think>", "</think>", "<answer>", "</answer>")
PAD, BOS, EOS = range(3)
#: Of a conversation.
MOST_TOKENS = 4096
CHARACTERS = (*map(chr, range(ord(" "), ord("~") + 1)), "\n")
#: A word has the space before it in its token.
WORD = re.compile(r" ?[A-Za-z]{2,}")
CHAT_TEMPLATE = (
    "<bos>{% for message in messages %}{% if message['role'] == 'user' %}<user>{{ message['content'] }}"
    "{% endif %}{% endfor %}<think>"
)


@cache
def vocabulary() -> tuple[str, ...]:
    """All tokens, in the order of their ids."""
    texts = [PROMPT, *WORDS, *MOVES, *(f" {word}" for word in (*WORDS, *MOVES))]
    for name, puzzle in PUZZLES.items():
        options = puzzle.of_sizes(puzzle.smallest, puzzle.smallest)
        some = reasoning_gym.create_dataset(name, seed=HELD_OUT_SEED, size=16, **options)
        texts.extend(entry["question"] for entry in some)
    words = {word for text in texts for word in WORD.findall(text)}
    return (*KEYWORDS, *CHARACTERS, *sorted(words))


@cache
def _pattern() -> re.Pattern[str]:
    longest_first = sorted((token for token in vocabulary() if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) + r"|[\s\S]")


@cache
def _ids() -> dict[str, int]:
    return {token: index for index, token in enumerate(vocabulary())}


def encode(text: str) -> list[int]:
    """Token ids of a text, as the folder's tokenizer has them.

    Raises: KeyError for a character that has no token.
    """
    ids = _ids()
    return [ids[token] for token in _pattern().findall(text)]


def decode(ids: list[int]) -> str:
    """The text of token ids; those beyond the vocabulary, which the model's table has too, show as `?`."""
    tokens = vocabulary()
    return "".join(tokens[i] if i < len(tokens) else "?" for i in ids)


def save(folder: Path) -> None:
    """Writes the tokenizer for Hugging Face."""
    tokenizer = Tokenizer(models.WordLevel(_ids(), unk_token=KEYWORDS[PAD]))
    # Python escapes a space, which the tokenizers' own expressions do not know.
    pattern = _pattern().pattern.replace("\\ ", " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        **dict(zip(("pad_token", "bos_token", "eos_token"), KEYWORDS, strict=False)),
        clean_up_tokenization_spaces=False,
        model_max_length=MOST_TOKENS,
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)


if __name__ == "__main__":
    save(Path(sys.argv[1]))
