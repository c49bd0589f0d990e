"""`Runner`: a function in a thread of its own that runs only while somebody waits for it.

So of any number of runners and the thread that drives them one is at work at a time, and who is next is decided, not
raced for. What the process has only one of (random generators, settings, the working directory) is each runner's own
whenever it runs.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Generic, TypeVar, final

from lightning_pfl.federation.pools.isolation import Surroundings

__all__ = ["Runner"]

_T = TypeVar("_T")


@final
class Runner(Generic[_T]):
    """Runs a function piece by piece.

    Args:
        function: what to run; it may call `pause`.
        surroundings: in which it begins.
        interruption: what `stop` raises in it.

    Example:
        >>> steps = []
        >>> def work():
        ...     steps.append("first")
        ...     runner.pause()
        ...     steps.append("second")
        ...     return 3
        >>> runner = Runner(work, Surroundings.capture(), KeyboardInterrupt)
        >>> runner.run_on(), steps
        (False, ['first'])
        >>> runner.run_on(), steps, runner.outcome()
        (True, ['first', 'second'], 3)
    """

    def __init__(
        self, function: Callable[[], _T], surroundings: Surroundings, interruption: type[BaseException]
    ) -> None:
        self._function = function
        self._surroundings = surroundings
        self._interruption = interruption
        self._thread = threading.Thread(target=self._run, name="turn", daemon=True)
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._pausing = self._stopped = False
        self._result: list[_T] = []
        self._error: BaseException | None = None

    def run_on(self) -> bool:
        """Let it run until it pauses or ends; whether it has ended."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._go.release()
        self._back.acquire()
        return bool(self._result) or self._error is not None

    def pause(self) -> None:
        """Called by the function: wait for the next `run_on`.

        Raises:
            BaseException: the interruption, if there is none.
        """
        mine = Surroundings.capture()
        self._pausing = True
        self._back.release()
        self._go.acquire()
        self._pausing = False
        mine.restore()
        if self._stopped:
            raise self._interruption

    def outcome(self) -> _T:
        """What the function returned, or what it raised."""
        if self._error is not None:
            raise self._error
        return self._result[0]

    def stop(self) -> None:
        """End it: where it pauses, or wherever it is if the thread that waited for it was interrupted."""
        self._stopped = True
        if self._thread.is_alive():
            if not self._pausing:  # as Ctrl-C does in the main thread: before the next line of Python
                raised = ctypes.py_object(self._interruption)
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(self._thread.ident or 0), raised)
            self._go.release()
            self._thread.join()

    def _run(self) -> None:
        try:
            self._surroundings.restore()
            self._result.append(self._function())
        except BaseException as error:
            self._error = error
        finally:
            self._back.release()
