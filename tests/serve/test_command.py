"""What `python -m ivr_jax.serve` refuses before it serves: addresses, tokens, names and checkpoints."""

from __future__ import annotations

import socket

import commands
import pytest

from ivr_jax.errors import UserError
from ivr_jax.serve import __main__ as command

TOKEN = "correct-horse-battery"


def test_loopback_needs_no_token_and_another_address_does(monkeypatch):
    monkeypatch.delenv(command.TOKEN_VARIABLE, raising=False)
    for host in ("127.0.0.1", "localhost", "::1", "127.1.2.3"):
        assert command.checked_token(host, None) == ""
    for host in ("0.0.0.0", "192.168.0.7", "::", "example.org"):
        with pytest.raises(UserError):
            command.checked_token(host, None)
        assert command.checked_token(host, TOKEN) == TOKEN
    monkeypatch.setenv(command.TOKEN_VARIABLE, TOKEN)
    assert command.checked_token("0.0.0.0", None) == TOKEN
    with pytest.raises(UserError) as refused:
        command.checked_token("127.0.0.1", "short-secret")
    assert "short-secret" not in str(refused.value)


def test_a_port_in_use_and_an_address_of_another_machine_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UserError):
        command.listen("127.0.0.1", taken.getsockname()[1])
    for host in ("192.0.2.1", "no such host"):
        with pytest.raises(UserError):
            command.listen(host, 0)
    with command.listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0


def test_checkpoints_have_names_of_their_own():
    assert command.checkpoints_of(["runs/demo/rl", "old=runs/rl"]) == {"rl": "runs/demo/rl", "old": "runs/rl"}
    for given in ([], ["a/rl", "b/rl"]):
        with pytest.raises(UserError):
            command.checkpoints_of(given)


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--checkpoint=nowhere"],
        ["--checkpoint=micro", "--host=0.0.0.0"],
        ["--checkpoint=micro", "--image_tokenizer=nowhere"],
        ["--checkpoint=micro", "--mesh=nonsense:2"],
        ["--checkpoint=micro", "--slots=0"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_one_line(words, tmp_path, monkeypatch):
    monkeypatch.delenv(command.TOKEN_VARIABLE, raising=False)
    assert 10 < len(commands.run("serve", *words, "--port=0", f"--out={tmp_path / 'answers'}").complaint) < 500
