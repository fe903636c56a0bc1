"""Completing texts from a checkpoint and from published weights, as a user does."""

import io
from pathlib import Path

import jax
import pytest
from examples.programs import program

from eqx_transformer.interop import save, save_pretrained
from eqx_transformer.models import Llama, LlamaConfig

complete = program("complete")
SIZES = {"vocab_size": 256, "d_model": 8, "num_layers": 1, "num_heads": 2, "max_len": 256}
SHORT = ["--max-new-tokens", "6", "--temperature", "0"]


@pytest.fixture(scope="module")
def model():
    return Llama(LlamaConfig(**SIZES), key=jax.random.key(0))


@pytest.fixture(scope="module")
def checkpoint(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    save(model, folder)
    return folder


def test_a_prompt(checkpoint, capsys):
    assert complete.main([str(checkpoint), "--prompt", "def ", *SHORT]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("def ") and len(out) > len("def \n")
    assert "tokens per second" in err


def test_a_conversation_is_one_text(checkpoint, capsys):
    """Two turns give what one gives for all that was said before."""
    model, vocabulary = complete.open_model(str(checkpoint))
    args = complete.parse([str(checkpoint), *SHORT])
    talk, said = complete.Text(model, vocabulary, args), []
    talk.show = said.append
    talk.grow("a\n")
    talk.grow("b\n")
    whole, again = complete.Text(model, vocabulary, args), []
    whole.show = again.append
    whole.vocabulary = type("Given", (), {"encode": lambda self, tokens: tokens})()
    whole.grow([*b"a\n", *said[:6], *b"b\n"])
    assert len(said) == 12 and again == said[6:]
    assert talk.length == whole.length


def test_lines_are_read_until_the_end(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("one\ntwo\n"))
    assert complete.main([str(checkpoint), *SHORT]) == 0
    assert capsys.readouterr().out.count("> ") == 3


def test_published_weights_and_their_tokenizer(model, tmp_path, capsys):
    tokenizers = pytest.importorskip("tokenizers", reason="needs the extra hub")
    save_pretrained(model, tmp_path)
    words = {f"w{i}": i for i in range(256)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert complete.main([str(tmp_path), "--prompt", "w7 w8", *SHORT]) == 0
    words = capsys.readouterr().out.split()
    assert len(words) >= 7 and all(word.startswith("w") for word in words)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "x" * 250], "room for 256 tokens"),
        (["--prompt", "x", "--top-p", "2"], "top_p=2"),
    ],
)
def test_mistakes_get_one_line(checkpoint, arguments, message, capsys):
    assert complete.main([str(checkpoint), *SHORT, *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_no_such_model(capsys):
    assert complete.main(["no/such/folder/anywhere", "--prompt", "x"]) == 2
    assert "no/such/folder/anywhere" in capsys.readouterr().err
