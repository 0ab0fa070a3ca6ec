"""Signals that whoever started the tests had ignored: `nohup` ignores SIGHUP, a shell's background job SIGINT."""

from __future__ import annotations

import signal

_SENT_BY_TESTS = (signal.SIGHUP, signal.SIGINT, signal.SIGTERM)


def default_signals_for_children() -> None:
    """Lets child processes start with the default actions, while this process goes on ignoring what it ignored.

    An ignored signal is inherited through exec, a handled one is reset to its default there.
    """
    for number in _SENT_BY_TESTS:
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, lambda _number, _frame: None)
