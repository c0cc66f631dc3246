"""A folder that workers and routers take for a model: a shape, for random weights.

    python -m tandem_bench.shape_folder llama-8b DIR

writes `config.json` and a tokenizer of bytes, and prints the folder's URI. Workers then need
`--format Dummy`.
"""

import argparse
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from tandem_bench.shapes import SHAPES, model_uri


def write_shape(name: str, folder: Path) -> str:
    """The URI of `folder`/`name`. Raises WorkloadError for a name that isn't known."""
    uri = model_uri(name, folder)
    write_tokenizer(Path(uri.removeprefix("file://")), SHAPES[name.lower()]["vocab_size"])
    return uri


def write_tokenizer(folder: Path, vocab_size: int) -> None:
    """A token for every byte; the ids above those have names that no text contains."""
    vocab = {letter: index for index, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    vocab |= {f"<{index}>": index for index in range(len(vocab), vocab_size)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))


def main() -> None:
    """Write one folder."""
    parser = argparse.ArgumentParser(description="A folder for a model of random weights.")
    parser.add_argument("name", choices=list(SHAPES))
    parser.add_argument("folder", type=Path)
    arguments = parser.parse_args()
    print(write_shape(arguments.name, arguments.folder))


if __name__ == "__main__":
    main()
