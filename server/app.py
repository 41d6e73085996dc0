"""The cloud's ServerApp: waits for participants, runs the strategy, evaluates, checkpoints."""

import copy
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from uuid import uuid4

import torch
from flwr.app import Message
from flwr.serverapp import Grid

from fedphd.common.config.roles import CloudConfig
from fedphd.common.errors import ParticipantsError, code_for_peers, told_of
from fedphd.common.events import EventLog, Verdict
from fedphd.common.history.events import PeerChanged, Said
from fedphd.common.history.progress import Progress
from fedphd.common.quality.evaluation import Evaluator
from fedphd.common.quality.extractor import Extractor
from fedphd.common.quality.moments import STATISTICS_FILE, StatisticsFile
from fedphd.common.quality.reference import (
    Reference,
    fixed_extractor,
    load_reference,
    reference_of_file,
    reference_of_statistics,
)
from fedphd.common.unet.checkpoint import (
    CHECKPOINT,
    Extras,
    load_checkpoint,
    load_extras,
    save_checkpoint,
    update_state,
)
from fedphd.common.unet.model import (
    PrunedUNet,
    build_scheduler,
    build_unet,
    gpu_memory,
    resolve_device,
)
from fedphd.common.wire.grid import StreamingGrid, streaming_grid
from fedphd.common.wire.messages import FINISH, Finish
from fedphd.common.wire.payload import shown
from fedphd.common.wire.records import to_records, weights_record
from fedphd.common.wire.roster import Bound, Roster
from fedphd.common.working import telling
from fedphd.server.background import Background
from fedphd.server.gathering import Wait, gather, start_wait
from fedphd.server.pruning import count_costs
from fedphd.server.report import Report
from fedphd.server.statistics import collect_statistics
from fedphd.server.stats import IntervalStats, NobodyTrained
from fedphd.server.strategy import FedPhD, Stored
from fedphd.server.tracking import Followed, Trackers

logger = logging.getLogger(__name__)

FINISH_S = 8.0
# So often in a row is an interval run in which no client trains.
TRIES = 3
REPRODUCIBLE = (
    "reproducible = true: replies enter in fixed order and edges keep step, so that equal runs are "
    "equal to the bit (on CPUs of one kind; GPUs may add in another order each time)"
)
LIVE = (
    "reproducible = false: replies enter as they come, so that equal runs differ in rounding "
    "(1e-5) and, with several edges, in what clients saw when they chose"
)


@dataclass
class Cloud:
    """One training run at the cloud; ``roster`` holds the edges on ``grid``."""

    config: CloudConfig
    grid: StreamingGrid
    roster: Roster
    events: EventLog
    run_dir: Path
    progress: Progress | None = None

    def __post_init__(self) -> None:
        self.device = resolve_device(self.config.device)
        unet = build_unet(self.config.model, seed=self.config.seed)
        self.scheduler = build_scheduler(self.config.diffusion)
        progress, federation = self.progress, self.config.federation()
        self._elapsed_s = progress.elapsed_s if progress else 0.0
        self._started_s = time.monotonic()
        self.config.tracking.check_installed()
        run_name = progress.run if progress else uuid4().hex
        followed = Followed(
            name=run_name,
            run_dir=self.run_dir,
            out_dir=self.config.out_dir,
            settings=federation.model_dump(mode="json", exclude={"waits"}),
            resumed=progress.interval if progress else None,
        )
        self.report = Report(
            self.run_dir,
            federation,
            self.events,
            count_costs(unet),
            Trackers.of(
                self.config.tracking, followed, warn=lambda text: self.events.write(Said(text=text))
            ),
            resumed=progress.reported if progress else None,
        )
        evaluation, model = self.config.evaluation, self.config.model
        named = evaluation.reference.source if evaluation.reference else evaluation.reference_file
        if named:
            self.report.message(f"prepares what it compares samples with: {named}")
        with telling(self.report.working):
            reference = load_reference(
                evaluation,
                image_size=model.image_size,
                channels=model.channels,
                num_classes=self.config.num_classes,
                cache_dir=self.config.out_dir / ".cache",
                device=self.device,
            )
        self.evaluator = self._evaluator(reference)
        # Made now, so that a wrong file ends the run before anybody is waited for.
        self.extractor = fixed_extractor(evaluation) if evaluation.reference_clients else None
        for measuring in (self.evaluator, self.extractor):
            if measuring is not None:
                measuring.check_shape((model.channels, model.image_size, model.image_size))
        self._beside = Background()
        self.grid.expect(sum(parameter.numel() for parameter in unet.parameters()))
        self.strategy = FedPhD(
            self.config.federation(),
            unet,
            self.roster,
            on_interval=self._on_interval,
            on_pruned=self.report.pruned,
            # Before an interval: greet latecomers; continue as long as one edge has a client.
            gather=lambda: self.gather(1, 1, Wait(self.config.waits.start_s)),
            run_name=run_name,
            stored=stored_state(self.run_dir / CHECKPOINT, progress) if progress else None,
        )

    def run(self) -> Verdict:
        """Run all intervals; raises ParticipantsError for too few edges or clients, at any time."""
        started_s = time.monotonic()
        if self.strategy.done:
            self.report.message(f"resumed after interval {self.strategy.done}")
        else:
            self.report.message(REPRODUCIBLE if self.config.reproducible else LIVE)
        num_edges = self.config.schedule.num_edges if self.config.topology == "hierarchical" else 1
        wait = start_wait(self.config.waits, self.report.so_far, resumed=self.progress is not None)
        self.gather(num_edges, self.config.schedule.min_clients, wait)
        self.report.spent("waiting_for_participants", time.monotonic() - started_s)
        if self.extractor is not None:
            self._ask_clients(self.extractor)
        self._train()
        self._wait_for_evaluation()
        self.report.never_trained()
        summary = self.report.summary(self._elapsed())
        distance = summary.frechet_distance
        quality = "" if distance is None else f", Frechet distance {distance:.1f}"
        intervals = self.config.schedule.intervals
        return Verdict(message=f"finished after {intervals} intervals{quality}")

    def _train(self) -> None:
        """Run the intervals that are left; raises ParticipantsError where nobody trains."""
        while True:
            try:
                self.strategy.start(
                    self.grid,
                    weights_record(self.strategy.weights()),
                    num_rounds=self.config.schedule.intervals - self.strategy.done,
                    timeout=self.config.waits.interval_s,
                    evaluate_fn=lambda done, _: self._after(self.strategy.done + done),
                )
                return
            except NobodyTrained as error:
                self._run_again(error)

    def _run_again(self, error: NobodyTrained) -> None:
        """Prepare to run an interval once more in which no client trained."""
        interval, failures = error.stats.interval, error.stats.failures
        more = f"; and {len(failures) - 3} more" if len(failures) > 3 else ""
        why = f"{error} ({'; '.join(failures[:3]) or 'no edge had one'}{more})"
        self.report.spent("waiting_for_participants", error.stats.seconds)
        self._wait_for_evaluation()
        if error.tries == TRIES:
            raise ParticipantsError(
                f"{why}, {TRIES} times in a row; mend what the log says about them, then start "
                "the run again" + (" with --resume" if interval > 1 else "")
            )
        # Those who failed are left alone for so long, and their edges would ask nobody.
        pause_s = 0.0 if self.config.reproducible else self.config.waits.retry_s
        self.report.message(f"{why}; it is run again" + (f" in {pause_s:g} s" if pause_s else ""))
        time.sleep(pause_s)
        self.strategy.repeat(interval)
        if interval > 1:
            # Else a resumption might come to the number that this has now.
            Progress.read(self.run_dir / CHECKPOINT).next_attempt(self.run_dir / CHECKPOINT)

    def gather(self, num_edges: int, num_clients: int, wait: Wait) -> None:
        """Wait until enough edges are there that see enough clients; as ``gathering.gather``."""
        gather(self.roster, num_edges, num_clients, wait, say=self.report.message)

    def finish(self, verdict: Verdict) -> None:
        """Tell the edges, and through them the clients, that the run is over."""
        finish = Finish(exit_code=verdict.exit_code, message=verdict.message)
        edges = self.roster.everyone.values()
        messages = [Message(to_records(finish), edge.node_id, FINISH) for edge in edges]
        for reply in self.grid.send_and_receive(messages, timeout=FINISH_S):
            if reply.has_error():
                name = self.roster.name_of(reply.metadata.src_node_id)
                why = shown(str(reply.error.reason))
                logger.warning("%s was not told that the run is over: %s", name, why)

    def _elapsed(self) -> float:
        """Seconds of wall time since the run began, over all its processes."""
        return self._elapsed_s + time.monotonic() - self._started_s

    def _ask_clients(self, extractor: Extractor) -> None:
        """Let the clients make the reference, and keep it in the run's folder.

        A run that goes on has it there.
        """
        place, config = self.run_dir / STATISTICS_FILE, self.config.evaluation
        if self.report.so_far.client_statistics:
            reference = reference_of_file(
                config,
                extractor,
                place,
                name="the clients' statistics",
                other="put the file of evaluation.features_file back as it was",
                damaged=f"put the run's {STATISTICS_FILE} back as it was, or start a new run",
            )
            self.evaluator = self._evaluator(reference)
            return
        result = collect_statistics(self.config, extractor, self.grid, self.roster)
        self.report.client_statistics(result, edge_cloud=self.grid.traffic)
        kept = StatisticsFile(result.statistics, extractor.spec.name, extractor.fingerprint())
        kept.save(place)
        reference = reference_of_statistics(config, extractor, result.statistics)
        self.evaluator = self._evaluator(reference)

    def _evaluator(self, reference: Reference | None) -> Evaluator:
        config = self.config
        return Evaluator(config.measuring, reference, self.device, config.told_classes)

    def _on_interval(self, stats: IntervalStats) -> None:
        # Only here: the evaluation of the interval before had the whole of this one.
        stats.phases["waiting_for_evaluation"] = self._wait_for_evaluation()
        self.report.interval(
            stats, sparse=self.strategy.sparse(stats.interval), edge_cloud=self.grid.traffic
        )

    def _after(self, interval: int) -> None:
        """After an interval: checkpoint, and samples and distance where they are due.

        A run that goes on has its last interval's checkpoint, and perhaps its evaluation.
        """
        progress = self._progress(interval)
        if interval > self.strategy.done:
            # First: whoever sees the interval's line may interrupt the run, and go on from there.
            self._checkpoint(progress)
        self.roster.refresh()
        every, last = self.config.evaluation.every_intervals, self.config.schedule.intervals
        done = {record.interval for record in self.report.so_far.evaluations}
        is_due = interval % every == 0 or interval == last
        # Somebody who tries a run out need not wait for the first evaluation.
        is_first = interval == 1 and self.strategy.done == 0
        if interval in done or not (is_due or is_first):
            return
        averaged = copy.deepcopy(self.strategy.unet)
        averaged.load_state_dict(self.strategy.ema.state)
        if not is_due:
            self._beside.start(lambda: self._preview(interval, averaged.eval()), awaited=True)
            return
        raw = copy.deepcopy(self.strategy.unet) if self.config.evaluation.raw_too else None
        self._beside.start(lambda: self._evaluate(progress, averaged.eval(), raw))

    def _preview(self, interval: int, averaged: PrunedUNet) -> None:
        """Draw a grid of a snapshot's samples, without numbers."""
        self.report.drawn(interval, self.evaluator.preview(averaged, self.scheduler))

    def _evaluate(self, progress: Progress, averaged: PrunedUNet, raw: PrunedUNet | None) -> None:
        """Evaluate a snapshot, beside the next interval, and note it in the checkpoint."""
        with telling(self.report.working):
            result = self.evaluator.evaluate(averaged, self.scheduler, raw)
        self.report.evaluated(progress.interval, result, gpu_memory(self.device))
        if progress.interval:
            # Events, bytes and times stay those of the checkpoint: an interval is under way.
            record = result.record(progress.interval)
            progress.reported.evaluations.append(record)
            update_state(self.run_dir / CHECKPOINT, progress.model_dump(mode="json"))

    def _wait_for_evaluation(self) -> float:
        """Wait until nothing is evaluated; returns the seconds."""
        waited_s = self._beside.wait(
            lambda: self.report.message("waits until the last evaluation is done")
        )
        self.report.spent("waiting_for_evaluation", waited_s)
        return waited_s

    def _checkpoint(self, progress: Progress) -> None:
        save_checkpoint(
            self.run_dir / CHECKPOINT,
            unet=self.strategy.unet,
            ema_state=self.strategy.ema.state,
            scheduler=self.scheduler,
            state=progress.model_dump(mode="json"),
            extras=Extras(
                self.strategy.cut.to_json() if self.strategy.cut else None,
                self.strategy.variate,
                self.strategy.broadcast.held,
            ),
            keep=self.config.checkpoint.keep,
        )

    def _progress(self, interval: int) -> Progress:
        """How far the run is after ``interval``, for the checkpoint."""
        return Progress(
            interval=interval,
            intervals=self.config.schedule.intervals,
            ema_steps=self.strategy.ema.steps,
            config=self.config.federation().model_dump(mode="json"),
            run=self.strategy.run_name,
            resumed=self.strategy.resumed,
            num_clients=self.strategy.num_clients or None,
            events=self.events.count,
            elapsed_s=self._elapsed(),
            # As it is now: what comes later belongs to the next interval.
            reported=self.report.so_far.model_copy(deep=True),
        )


def stored_state(checkpoint: Path, progress: Progress) -> Stored:
    """What the strategy goes on from; raises ConfigError if the checkpoint is damaged."""
    unet, averaged, _, _ = load_checkpoint(checkpoint)
    extras = load_extras(checkpoint)
    return Stored(
        interval=progress.interval,
        resumed=progress.resumed,
        unet=unet.train(),
        ema_state=averaged.state_dict(),
        ema_steps=progress.ema_steps,
        cut=extras.cut,
        variate=extras.variate,
        held=extras.held,
        num_clients=progress.num_clients,
        trained=frozenset(progress.reported.trained),
    )


def main(
    grid: Grid,
    config: CloudConfig,
    events: EventLog,
    run_dir: Path,
    *,
    bound: Bound | None = None,
    simulated: bool = False,
    resume: bool = False,
    clock: Callable[[], float] = time.monotonic,
) -> Verdict:
    """Run the training run to its end, whatever it is, and tell the others.

    Args:
        grid: whose nodes are edges, wherever these run.
        bound: as in ``Roster``.
        resume: go on from the checkpoint in ``run_dir``.
        simulated: the clients are simulated, so that the first answer takes them longer.
        clock: monotonic seconds by which edges' replies are late.

    Raises:
        FedPhDError: the run cannot start or continue.
    """
    torch.set_num_threads(config.num_threads)
    # A simulated client answers only when Ray has started and imported everything, which takes
    # a busy machine longer than any later question; after a timeout it would wait for a minute.
    greeting_s = config.waits.start_s if simulated else config.waits.query_s
    edges = streaming_grid(
        grid,
        upload_stall_s=config.waits.upload_stall_s,
        in_order=config.reproducible,
        # The edge of a flat federation is in this process: what counts is what it sends.
        counts=config.topology != "flat",
        clock=clock,
    )
    roster = Roster(
        edges,
        asking="cloud",
        kind="edge",
        # An edge greets its new clients before it answers, for up to half of this.
        hello_s=2 * greeting_s,
        # Who was refused at first is asked once more before the start is given up.
        retry_s=min(config.waits.retry_s, config.waits.start_s / 2),
        max_samples=config.schedule.max_client_samples,
        bound=bound,
        on_change=lambda name, change, detail: events.write(
            PeerChanged(peer=name, change=change, detail=detail)
        ),
    )
    progress = Progress.read(run_dir / CHECKPOINT) if resume else None
    if progress is not None:
        progress.next_attempt(run_dir / CHECKPOINT)
    cloud = Cloud(config, edges, roster, events, run_dir, progress)
    try:
        verdict = cloud.run()
    except Exception as error:
        # Whatever it is, nobody else need wait for a cloud that will not come back by itself.
        why = f"the cloud ended the run: {told_of(error)}"
        try:
            cloud.finish(Verdict(code_for_peers(error), why))
        except Exception:
            logger.warning("edges and clients were not told that the run is over", exc_info=True)
        raise
    else:
        cloud.finish(verdict)
        return verdict
    finally:
        # On a signal nobody is told: edges and clients wait for the cloud to come back.
        cloud.report.close()
