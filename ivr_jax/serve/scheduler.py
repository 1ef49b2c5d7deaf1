"""The engine thread: who waits, who is in a slot, and what each has so far.

Answers of all users share the slots of the rollout engine (continuous batching).  After every segment of at most
`SEGMENT` model calls the thread reads the new tokens of each slot, publishes parts and previews, frees the slots of
answers that have ended, were stopped or are watched by nobody, and moves the next ones in, first come, first served.

One engine serves one model with one set of sampling options, because these are compiled into its program; modes, image
sizes, seeds and lengths differ freely within it.  Engines take turns, a segment each.  What an answer says depends on
its prompt, seed and options alone, not on who else is answered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.generate.answer_folder import InterleavedAnswer
from ivr_jax.images import encode_png
from ivr_jax.sampling.engine import Engine, EngineOptions
from ivr_jax.sampling.logits_processors import SamplingOptions
from ivr_jax.sampling.rollout import Answer
from ivr_jax.serve.jobs import DONE, FAILED, RUNNING, STOPPED, AnswerRequest, Cost, Job, PartView, Snapshot
from ivr_jax.serve.limits import Limits
from ivr_jax.serve.models import PreparedRequest, ServedModel, has_picture
from ivr_jax.serve.partial_answer import EVALUATION, IMAGE, Part, PartialAnswer, read_tokens
from ivr_jax.serve.telemetry import Telemetry

SEGMENT = 16  # model calls between two looks at the slots
ENGINES = 4  # that are kept, each with a cache of its own
_LOG = logging.getLogger(__name__)
Archived = Callable[[Job, Snapshot, Answer | InterleavedAnswer], None]


class Busy(Exception):
    """Too many wait; `retry_after` is a guess in seconds."""

    def __init__(self, retry_after: int):
        super().__init__(f"Too many requests wait; try again in {retry_after} s.")
        self.retry_after = retry_after


@dataclasses.dataclass
class _Running:
    """A job in a slot; `given`: tokens of its prefix."""

    job: Job
    partial: PartialAnswer
    started: float
    given: int
    calls: int = 0
    parts: tuple[Part, ...] = ()
    views: tuple[PartView, ...] = ()
    shown_a_row: bool = False

    def cost(self) -> Cost:
        return Cost(
            images=sum(part.kind == IMAGE and part.complete for part in self.parts),
            tokens=len(self.partial.tokens) - self.given,
            calls=self.calls,
            seconds=round(time.monotonic() - self.started, 3),
            waited=round(self.started - self.job.created, 3),
        )


@dataclasses.dataclass
class _Session:
    """One engine, and the jobs in its slots by their ids."""

    model: ServedModel
    engine: Engine
    running: dict[str, _Running] = dataclasses.field(default_factory=dict)


class Scheduler:
    """Owns the engines; `submit`, `stop` and `close` may be called from any thread.

    Args:
      options: of every engine; `slots` answers at a time.
      archive: given every kept answer that has ended with something to show, in the engine thread.
      mesh: where the parameters are; None: one device.
      warm: compile the usual program before the first request.
    """

    def __init__(
        self,
        models: Mapping[str, ServedModel],
        limits: Limits,
        telemetry: Telemetry,
        options: EngineOptions,
        archive: Archived = lambda job, last, answer: None,
        mesh: jax.sharding.Mesh | None = None,
        warm: bool = False,
    ):
        self._models, self._limits, self._telemetry, self._options = models, limits, telemetry, options
        self._archive, self._mesh, self._warm = archive, mesh, warm
        self._waiting: deque[Job] = deque()
        self._sessions: OrderedDict[tuple[str, SamplingOptions], _Session] = OrderedDict()
        self._stopped: set[str] = set()
        self._changed = threading.Condition()
        self._closing = False
        self._recent: deque[float] = deque([2.0], maxlen=16)  # seconds that answers took
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        telemetry.slots.set(options.slots)

    # -- any thread -------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Starts the engine thread."""
        self._thread.start()

    def close(self) -> None:
        """Fails what is on its way and ends the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    @property
    def alive(self) -> bool:
        """Whether the engine thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queues a job.  Raises `Busy` when too many wait."""
        with self._changed:
            if len(self._waiting) >= self._limits.waiting:
                self._telemetry.refused.inc()
                each = sum(self._recent) / len(self._recent) / self._options.slots
                raise Busy(max(1, min(600, round(each * len(self._waiting)))))
            job.publish(position=len(self._waiting))
            self._waiting.append(job)
            self._telemetry.waiting.set(len(self._waiting))
            self._changed.notify()

    def stop(self, job: Job) -> None:
        """Ends an answer; what it has so far stays."""
        if job.snapshot.over:
            return
        with self._changed:
            self._stopped.add(job.id)
            self._changed.notify()

    # -- the engine thread ------------------------------------------------------------------------------------------

    def _run(self) -> None:
        with jax.set_mesh(self._mesh) if self._mesh is not None else contextlib.nullcontext():
            if self._warm:
                self._warm_up()
            while not self._closing:
                with self._changed:
                    busy = any(session.running for session in self._sessions.values())
                    if not (busy or self._stopped or self._waiting):
                        self._changed.wait(timeout=0.5)
                    stopped, self._stopped = self._stopped, set()
                self._clear_queue(stopped)
                self._admit()
                for key, session in list(self._sessions.items()):
                    if session.running:
                        self._guarded_segment(key, session, stopped)
                self._telemetry.in_use.set(sum(len(session.running) for session in self._sessions.values()))
            for session in self._sessions.values():
                for running in session.running.values():
                    self._end(running.job, FAILED, error="The server is shutting down.")
            for job in self._waiting:
                self._end(job, FAILED, error="The server is shutting down.")

    def _warm_up(self) -> None:
        """Begins an answer that nobody asked for, so that the first user does not wait for the compiler."""
        try:
            name, model = next(iter(self._models.items()))
            request = AnswerRequest(name, "Warm up.")
            engine, prepared = self._session(request).engine, model.prepare(request)
            size = (np.full(1, side) for side in prepared.size)
            initial = model.grammar.initial(model.grammar_of(request.mode), *size)
            engine.add("warm-up", prepared.prompts, initial, jax.random.key(0), prepared.limit)
            engine.step(1)
            engine.cancel(["warm-up"])
            model.warm_up_pictures(prepared.size, self._options.slots)
        except Exception:
            _LOG.exception("the model could not be warmed up; requests may still be answered")

    def _end(self, job: Job, state: str, answer: Answer | InterleavedAnswer | None = None, **fields: Any) -> None:
        """Publishes the last state of a job, and hands its answer to the archive before."""
        self._telemetry.answers.labels(state).inc()
        last = dataclasses.replace(job.snapshot, state=state, **fields)
        if job.kept and answer is not None and last.parts:
            self._archive(job, last, answer)
        job.publish(state=state, **fields)

    def _expired(self, job: Job, now: float) -> bool:
        return job.unwatched(now) > self._limits.unwatched_seconds

    def _clear_queue(self, stopped: set[str]) -> None:
        """Takes jobs out of the queue that were stopped, that nobody waits for, or that have waited too long."""
        now = time.monotonic()
        with self._changed:
            waiting, self._waiting = self._waiting, deque()
            for job in waiting:
                if job.id in stopped or self._expired(job, now):
                    self._end(job, STOPPED)
                elif now - job.created > self._limits.queue_seconds:
                    self._end(job, FAILED, error="No slot became free in time. Try again later.")
                else:
                    self._waiting.append(job)
            self._renumber()

    def _renumber(self) -> None:
        """Tells the waiting jobs their positions; the lock is held."""
        for position, job in enumerate(self._waiting):
            if job.snapshot.position != position:
                job.publish(position=position)
        self._telemetry.waiting.set(len(self._waiting))

    def _admit(self) -> None:
        """Moves waiting jobs into free slots, in order; one whose engine is full lets the others pass."""
        with self._changed:
            waiting = list(self._waiting)
        for job in waiting:
            running, session, error = None, None, ""
            try:
                session = self._session(job.request)
                if session is None or session.engine.free == 0:
                    continue
                running = self._started(session, job)
            except UserError as fault:
                error = str(fault)
            except Exception:
                _LOG.exception("a request could not be started")
                error = "The server failed on this request."
            with self._changed:
                self._waiting.remove(job)
                self._renumber()
            if running is None:
                self._end(job, FAILED, error=error)
            else:
                session.running[job.id] = running
                self._telemetry.queue_seconds.observe(running.started - job.created)

    def _session(self, request: AnswerRequest) -> _Session | None:
        """The engine for a request; None when there are too many and all are in use."""
        key = (request.model, request.sampling)
        if key not in self._sessions:
            idle = [other for other, session in self._sessions.items() if not session.running]
            if len(self._sessions) >= ENGINES:
                if not idle:
                    return None
                del self._sessions[idle[0]]
            model = self._models[request.model]
            system = model.system
            engine = Engine(
                system.config, system.params, model.grammar, request.sampling, self._options,
                length=model.answer_length,
            )  # fmt: skip
            self._sessions[key] = _Session(model, engine)
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def _started(self, session: _Session, job: Job) -> _Running:
        """Puts a job into a slot.  Raises UserError for a request that cannot be answered."""
        request, model = job.request, session.model
        prepared: PreparedRequest = job.prepared
        grammar = model.grammar_of(request.mode)
        initial = model.grammar.initial(grammar, *(np.full(1, side) for side in prepared.size))
        partial = PartialAnswer(model.grammar, initial)
        read_tokens(model.grammar.tables, [partial], [request.prefix])
        parts = partial.parts()
        if partial.ended:
            raise UserError("the answer is complete: there is nothing to continue.", "Continue from an earlier part.")
        key = jax.random.fold_in(jax.random.key(request.seed), 0)  # as `generate` draws its one answer
        session.engine.add(job.id, prepared.prompts, initial, key, prepared.limit, request.prefix)
        job.publish(state=RUNNING, grammar=grammar, prompt_tokens=len(prepared.prompts[0]))
        return _Running(job, partial, time.monotonic(), len(request.prefix), parts=parts)

    # -- one segment ------------------------------------------------------------------------------------------------

    def _guarded_segment(self, key: Any, session: _Session, stopped: set[str]) -> None:
        try:
            self._segment(session, stopped)
        except Exception:
            _LOG.exception("an engine failed; its answers are lost, the server continues")
            del self._sessions[key]
            for running in session.running.values():
                self._end(running.job, FAILED, error="The server failed on this answer. Try again.")

    def _segment(self, session: _Session, stopped: set[str]) -> None:
        """Model calls for every slot of an engine, and what they brought."""
        engine, now = session.engine, time.monotonic()
        for running in list(session.running.values()):
            if running.job.id in stopped or self._expired(running.job, now):
                self._finish(session, running, STOPPED)
        if not session.running:
            return
        work = engine.step(SEGMENT)
        everyone = list(session.running.values())
        so_far, taken = engine.tokens(), engine.take_finished()
        fresh = [so_far[r.job.id][len(r.partial.tokens) :].tolist() for r in everyone]
        read_tokens(session.model.grammar.tables, [r.partial for r in everyone], fresh)
        self._telemetry.calls.inc(work.calls)
        self._telemetry.tokens.inc(sum(map(len, fresh)))
        for running in everyone:
            running.calls += work.calls
            running.parts = running.partial.parts()
        self._show(session.model, [r for r in everyone if r.job.id not in taken])
        for running in everyone:
            late = time.monotonic() - running.started > self._limits.answer_seconds
            if running.job.id in taken:
                cut = "" if running.partial.ended else "The answer has no room for more."
                self._finish(session, running, DONE, cut)
            elif late:
                self._finish(session, running, DONE, "The answer took too long and was ended.")
            elif _has_enough(running):
                self._finish(session, running, DONE)

    def _show(self, model: ServedModel, everyone: Sequence[_Running]) -> None:
        """Tells the watchers what is new; previews of all answers are decoded together."""
        todo = [
            (running, number) for running in everyone for number, part in enumerate(running.parts)
            if running.job.watchers and _shows_more(running, number, part)
        ]  # fmt: skip
        pictures = model.pictures([running.parts[number] for running, number in todo])
        for running in everyone:
            own = {n: picture for (r, n), picture in zip(todo, pictures, strict=True) if r is running}
            running.views = _views(running.views, running.parts, own)
            if own and not running.shown_a_row:
                running.shown_a_row = True
                self._telemetry.first_row_seconds.observe(time.monotonic() - running.job.created)
            running.job.publish(parts=running.views, cost=running.cost())

    def _finish(self, session: _Session, running: _Running, state: str, error: str = "") -> None:
        """Frees the slot, and publishes the last state with all that the answer holds."""
        session.engine.cancel([running.job.id])
        del session.running[running.job.id]
        partial, model, job = running.partial, session.model, running.job
        numbers = [number for number, part in enumerate(running.parts) if has_picture(part)]
        pictures = dict(zip(numbers, model.pictures([running.parts[n] for n in numbers]), strict=True))
        views = _views(running.views, running.parts, pictures)
        grammar = model.grammar_of(job.request.mode)
        answer = model.finish(
            job.prepared, grammar, partial.tokens, partial.nodes, running.parts, pictures
        )
        cost = running.cost()
        self._recent.append(cost.seconds)
        self._telemetry.answer_seconds.observe(cost.seconds)
        self._telemetry.images.inc(cost.images)
        mode = answer.trajectory.mode.value if isinstance(answer, Answer) else ""
        self._end(
            job, state, answer, error=error, parts=views, cost=cost, mode=mode, finished=partial.ended,
            tokens=tuple(partial.tokens),
        )  # fmt: skip


def _has_enough(running: _Running) -> bool:
    """Whether the answer has as many images as were asked for, and the evaluation of the last of them."""
    wanted, parts = running.job.request.max_images, running.parts
    if not wanted:
        return False
    images = sum(part.kind == IMAGE and part.complete for part in parts)
    judged = parts[-1].kind == EVALUATION and parts[-1].complete
    return images > wanted or (images == wanted and (judged or parts[-1].kind not in (IMAGE, EVALUATION)))


def _shows_more(running: _Running, number: int, part: Part) -> bool:
    """Whether an image has a complete row more than its last preview shows."""
    if not has_picture(part):
        return False
    before = running.views[number] if number < len(running.views) else None
    shown = before.drawn // before.columns if before is not None and before.png else 0
    return int((part.codes >= 0).all(1).sum()) > shown


def _views(
    before: tuple[PartView, ...], parts: Sequence[Part], pictures: Mapping[int, np.ndarray]
) -> tuple[PartView, ...]:
    """What is shown of the parts; a view that says nothing new stays the same object."""
    views = []
    for number, part in enumerate(parts):
        old = before[number] if number < len(before) else None
        new = PartView(number, part.kind, part.round, part.complete, part.texts, part.verdicts)
        if has_picture(part):
            rows, columns = part.codes.shape
            new = dataclasses.replace(new, rows=rows, columns=columns)
            if number in pictures:
                picture, drawn = pictures[number], int((part.codes >= 0).sum())
                height, width = picture.shape[:2]
                new = dataclasses.replace(new, drawn=drawn, width=width, height=height, png=encode_png(picture))
            elif old is not None:
                new = dataclasses.replace(new, drawn=old.drawn, width=old.width, height=old.height, png=old.png)
        views.append(old if old == new else new)
    return tuple(views)
