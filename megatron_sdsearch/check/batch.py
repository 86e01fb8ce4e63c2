"""The arithmetic of a step: questions, trajectories, minibatches, and who has work."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_sdsearch.check.findings import Attempt, Finding
from megatron_sdsearch.check.subject import Subject
from megatron_sdsearch.data.questions import QuestionSampler
from megatron_sdsearch.rollout.requests import rollout_ranks


def check(subject: Subject) -> Iterator[Finding]:
    """Of reinforcement learning, or of a warm start."""
    if not subject.is_rl:
        yield from _warm_start(subject)
        return
    yield from _questions(subject)
    yield from _minibatches(subject)
    yield from _rollout_shares(subject)


def _warm_start(subject: Subject) -> Iterator[Finding]:
    per_step, num_ranks = subject.config.train.demonstrations_per_step, subject.num_ranks_dp
    if per_step < num_ranks:
        yield Finding.warning(
            "train.demonstrations_per_step",
            f"{per_step} for {num_ranks} data-parallel ranks: {num_ranks - per_step} have nothing to learn from",
            f"set it to a multiple of {num_ranks}",
        )


def _questions(subject: Subject) -> Iterator[Finding]:
    config, questions = subject.config, subject.train_questions.value
    if not questions:
        return
    per_step = config.data.questions_per_step
    attempt = Attempt.at(lambda: QuestionSampler(questions, config.seed, per_step))
    if attempt.error is not None:
        yield Finding.of(attempt.error, "data.questions_per_step")
        return
    passes = config.train.num_steps * per_step / len(questions)
    yield Finding.note(
        "data.questions_per_step",
        f"{per_step} of {len(questions):,} questions a step: {passes:.3g} passes over them in "
        f"{config.train.num_steps} steps, {config.num_updates:,} updates",
    )
    refills = config.rollout.max_refills
    if refills and per_step * (1 + refills) > len(questions):
        yield Finding.warning(
            "rollout.max_refills",
            f"{refills} for each of {per_step} questions may ask for {per_step * (1 + refills)} in one step, and there "
            f"are {len(questions)}: some would be asked twice in it",
            f"lower it to {len(questions) // per_step - 1}, or give more questions",
        )


def _minibatches(subject: Subject) -> Iterator[Finding]:
    config, num_ranks = subject.config, subject.num_ranks_dp
    field = "train.trajectories_per_minibatch"
    per_step = config.data.questions_per_step * config.rollout.group_size
    size = config.train.trajectories_per_minibatch or per_step
    num_updates = config.updates_per_step
    smallest = per_step // num_updates
    told = f"{config.data.questions_per_step} questions x {config.rollout.group_size} = {per_step} trajectories"
    if size > per_step:
        yield Finding.warning(
            field,
            f"{size} is more than a step's {told}: it makes one update, never one of {size}",
            "give null for one update a step, or ask more questions",
        )
    elif per_step % size:
        most = -(-per_step // num_updates)
        parts = f"{smallest} or {most}" if smallest < most else f"{most}"
        yield Finding.note(
            field, f"{size} does not divide a step's {told}: it makes {num_updates} updates of {parts} of them"
        )
    if smallest < num_ranks:
        yield Finding.warning(
            field,
            f"{smallest} trajectories for {num_ranks} data-parallel ranks: some have nothing to learn from",
            f"give at least {num_ranks}, and better many times that",
        )


def _rollout_shares(subject: Subject) -> Iterator[Finding]:
    """Every rank that rolls out takes its own share of the step's questions."""
    per_step = subject.config.data.questions_per_step
    num_ranks = len(rollout_ranks(subject.config, subject.world.size))
    if per_step < num_ranks:
        yield Finding.warning(
            "data.questions_per_step",
            f"{per_step} for {num_ranks} processes that roll out: {num_ranks - per_step} of them wait",
            f"set it to at least {num_ranks}",
        )
    elif per_step % num_ranks:
        most = -(-per_step // num_ranks)
        yield Finding.note(
            "data.questions_per_step",
            f"{per_step} over {num_ranks} processes: some roll out {most} groups, others {most - 1} and wait",
        )
