"""Review a dataset: two people judge every sample on a local page, and unanimous accepts become the reviewed dataset.

    python -m ivr_jax.review DATASET --reviewers=ANA,BEN              serves the page; Ctrl-C ends it
    python -m ivr_jax.review DATASET --report                         how far it has come, and Cohen's kappa
    python -m ivr_jax.review DATASET --write=REVIEWED                 writes what both accepted as a new dataset

The command prints one address a reviewer; each holds a secret of its own, made anew at every start, and works on this
machine alone (over SSH: `ssh -L 8321:127.0.0.1:8321 HOST`).  Decisions are kept in DATASET.review.sqlite3 beside the
dataset; the review resumes from them.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path

from absl import flags

from ivr_jax import cli
from ivr_jax.data.store import TrajectoryDataset
from ivr_jax.errors import UserError
from ivr_jax.review.agreement import agreement, agreement_text
from ivr_jax.review.decisions import Decisions
from ivr_jax.review.reviewed import write_reviewed


def listen(port: int) -> socket.socket:
    """A socket bound to the loopback address; port 0 takes any free one.  Raises UserError when it is taken."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen()
    except OSError as error:
        listener.close()
        raise UserError(f"port {port} cannot be used: {error.strerror}.", "Name another one with --port=….") from error
    return listener


def serve(dataset: TrajectoryDataset, decisions: Decisions, port: int) -> None:
    """Serves the page until it is interrupted; prints each reviewer's address."""
    try:
        import uvicorn

        from ivr_jax.review.app import Review, make_app, new_tokens
    except ImportError as error:
        raise UserError(f"{error.name} is not installed.", "pip install 'ivr_jax[review]'") from error
    tokens = new_tokens(decisions.reviewers)
    with listen(port) as listener:
        port = listener.getsockname()[1]
        app = make_app(Review(dataset, decisions, tokens, port))
        print(f"review of {dataset.path}, {len(dataset)} samples; decisions in {decisions.path}")
        for token, reviewer in tokens.items():
            print(f"  {reviewer}: http://127.0.0.1:{port}/{token}/", flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False, server_header=False, lifespan="off")
        uvicorn.Server(config).run(sockets=[listener])


def add_flags(values: flags.FlagValues) -> None:
    flags.DEFINE_string("source", None, "the dataset; may also stand without --source=", flag_values=values)
    flags.DEFINE_list("reviewers", [], "the two people, once; later starts know them", flag_values=values)
    flags.DEFINE_string("decisions", None, "SQLite file (default: DATASET.review.sqlite3)", flag_values=values)
    flags.DEFINE_integer("port", 8321, "on 127.0.0.1; 0 takes a free one", 0, 65535, flag_values=values)
    flags.DEFINE_boolean("report", False, "print the agreement and serve nothing", flag_values=values)
    flags.DEFINE_string("write", None, "write the reviewed dataset to this folder and serve nothing",
                        flag_values=values)


def main(call: cli.Call) -> None:
    if call.flags.source is None:
        raise UserError("no dataset was named.", "Write: python -m ivr_jax.review DATASET --reviewers=ANA,BEN.")
    dataset = TrajectoryDataset(Path(call.flags.source).expanduser())
    place = dataset.path.resolve()
    file = Path(call.flags.decisions or place.with_name(f"{place.name}.review.sqlite3")).expanduser()
    if (call.flags.report or call.flags.write) and not file.exists():
        raise UserError(f"there are no decisions at {file}.", "Serve the page first, or correct --decisions.")
    decisions = Decisions(file, dataset.fingerprint, call.flags.reviewers)
    try:
        if call.flags.write:
            found = write_reviewed(dataset, decisions, Path(call.flags.write).expanduser())
            print(f"{call.flags.write}: {found.pairs['accept', 'accept']} of {len(dataset)} samples")
            print(agreement_text(found, len(dataset)))
        elif call.flags.report:
            print(agreement_text(agreement(decisions.standing(), decisions.reviewers), len(dataset)))
        else:
            serve(dataset, decisions, call.flags.port)
    finally:
        decisions.close()


def entry() -> None:
    argv = cli.with_named_source(sys.argv, ["report"])
    cli.run(main, config=False, workdir=False, add_flags=add_flags, argv=argv)


if __name__ == "__main__":
    entry()
