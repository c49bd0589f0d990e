"""``lightning-pfl round ...``: a round of parties from the command line. Each function is a command.

Start at `export`, `aggregate` and `apply`, the three of every round; `keys` and `roster` come once, before the first.
"""

from __future__ import annotations

import secrets
from pathlib import Path

from lightning_pfl.aggregation import Aggregator
from lightning_pfl.parties import party as of_party
from lightning_pfl.parties.mailbox import Mailbox
from lightning_pfl.parties.roster import Roster
from lightning_pfl.parties.server import Server
from lightning_pfl.parties.signatures import Signer, make_key

__all__ = ["aggregate", "apply", "export", "keys", "roster"]


def keys(*, name: str, folder: str = ".") -> str:
    """Make a pair of keys: NAME.key, which stays secret, and NAME.pub, which goes to whoever writes the roster.

    Args:
        name: who this is: the party's name, or "server".
        folder: where the two files go.
    """
    path = Path(folder) / f"{name}.key"
    path.parent.mkdir(parents=True, exist_ok=True)
    public = make_key(path)
    path.with_suffix(".pub").write_text(f"{public}\n", encoding="utf-8")
    return f"wrote {path} (keep it secret) and {path.with_suffix('.pub')} ({public})"


def roster(
    *, server: str, parties: list[str], output: str = "roster.json", run: str | None = None, global_branch: bool = True
) -> str:
    """Write the roster of a run, the one file that all parties and the server must have alike.

    Args:
        server: file with the server's public key.
        parties: files with the parties' public keys; a file's name without .pub is the party's.
        output: the roster, any fsspec URL.
        run: name of the run; never use one twice. Left out: a random one.
        global_branch: whether the server's rule sends a frozen global adapter, as most do and FedAvg does not.
    """
    public = {Path(path).stem: Path(path).read_text(encoding="utf-8").strip() for path in parties}
    if len(public) != len(parties):
        raise ValueError(f"Each party needs a name of its own, but the files are {sorted(parties)}.")
    made = Roster(
        run or f"run-{secrets.token_hex(8)}",
        Path(server).read_text(encoding="utf-8").strip(),
        public,
        global_branch,
    )
    made.write(output)
    return f"wrote {output}: run {made.run}, parties {', '.join(sorted(public))}, sha256 {made.digest[:16]}..."


def export(
    *, checkpoint: str, party: str, key: str, roster: str, exchange: str, num_examples: int, overwrite: bool = False
) -> str:
    """Sign what a party has trained and put it where the server looks for it.

    Args:
        checkpoint: of the party's Trainer with CoLoRA; left alone.
        party: who sends.
        key: the party's secret key.
        roster: of the run.
        exchange: folder or URL that party and server share.
        num_examples: on how many examples the party trained.
        overwrite: replace an update of this round that was sent already.
    """
    mailbox = Mailbox(exchange, Roster.read(roster))
    update = of_party.export(
        checkpoint, mailbox, party, Signer(key), num_examples=num_examples, overwrite=overwrite
    ).content
    return f"round {update.round}: sent {update.nbytes} bytes of `{party}`"


def aggregate(
    *,
    key: str,
    roster: str,
    exchange: str,
    state: str,
    aggregator: Aggregator | None = None,
    quorum: int | None = None,
) -> str:
    """Verify, inspect and mix the parties' updates, and sign one mixture for each party.

    Args:
        key: the server's secret key.
        roster: of the run.
        exchange: folder or URL that server and parties share.
        state: folder or URL of the server alone.
        aggregator: the rule. Left out: by relevance if the parties sketch their tasks, else all alike.
        quorum: how many parties must have sent an update that counts. Left out: all.
    """
    of_run = Roster.read(roster)
    server = Server(of_run, Mailbox(exchange, of_run), state, Signer(key), aggregator=aggregator)
    outcome = server.round(quorum=quorum)
    lines = [f"round {outcome.round}: mixed {', '.join(outcome.counted)}"]
    lines += [f"  absent: {party}" for party in outcome.absent]
    lines += [f"  did not count: {party}: {why}" for party, why in outcome.rejected.items()]
    return "\n".join([*lines, *(f"  {note}" for note in outcome.notes)])


def apply(*, checkpoint: str, party: str, roster: str, exchange: str, output: str | None = None) -> str:
    """Take the newest mixture into a party's checkpoint, for its next `trainer.fit(ckpt_path=...)`.

    Args:
        checkpoint: of the party's Trainer with CoLoRA.
        party: for whom.
        roster: of the run.
        exchange: folder or URL that party and server share.
        output: where the changed checkpoint goes. Left out: in place of the old one.
    """
    mixture = of_party.apply(checkpoint, Mailbox(exchange, Roster.read(roster)), party, output=output)
    if mixture is None:
        return f"nothing new for `{party}`"
    return f"round {mixture.round}: took {mixture.content.nbytes} bytes into {output or checkpoint}"
