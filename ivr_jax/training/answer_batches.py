"""Answers of a rollout as the trainer reads them: one a row, padded, or several packed into a row.

A packed row of two answers to one prompt and one to another, the prompts shared (a dot is padding):

    tokens       p p P a a a P b b q Q c c c c . .
    segments     1 1 2 2 2 2 3 3 3 4 5 5 5 5 5 0 0
    prefixes     0 0 1 1 1 1 1 1 1 0 4 4 4 4 4 0 0
    positions    0 1 2 3 4 5 2 3 4 0 1 2 3 4 5 0 0

A token sees the earlier tokens of its own segment and those of its prefix.  A prompt's last token stands before every
answer: the first tokens of answers, which differ, are predicted there.  So each answer's tokens see the same keys as
in a row of its own, at the same positions.  Without sharing a segment is a prompt and its answer.

Letters: B rows of a batch, T tokens of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ivr_jax.errors import UserError
from ivr_jax.sampling.rollout import Rollout
from ivr_jax.training.rl_options import RLOptions

TOKEN_ARRAYS = {"tokens": np.int32, "rows": np.int32, "old": np.float32, "mask": np.float32, "advantages": np.float32}
AXES = {"free_tokens": ("batch", None, "length"), "shifts": ("batch", None), "kept_mask": ("batch", "length", None)}
TOKEN_AXES = ("batch", "length")  # of every other array


def array_shapes(
    size: int, length: int, guidance_passes: int = 0, kept_bytes: int = 0, packed: Sequence[str] = ()
) -> dict[str, jax.ShapeDtypeStruct]:
    """Shape and dtype of the arrays of a batch, as `answer_batch` and `packed_batch` describe them.

    Args:
      size, length: B and T.
      guidance_passes: unconditional prompts of each answer.
      kept_bytes: of the last axis of "kept_mask"; 0 without top-k and top-p.
      packed: `packed_arrays`, where answers are packed.
    """
    kinds = TOKEN_ARRAYS | dict.fromkeys(packed, np.int32)
    arrays = {name: jax.ShapeDtypeStruct((size, length), kind) for name, kind in kinds.items()}
    if guidance_passes:
        arrays["free_tokens"] = jax.ShapeDtypeStruct((size, guidance_passes, length), np.int32)
        arrays["shifts"] = jax.ShapeDtypeStruct((size, guidance_passes), np.int32)
    if kept_bytes:
        arrays["kept_mask"] = jax.ShapeDtypeStruct((size, length, kept_bytes), np.uint8)
    return arrays


def packed_arrays(shares_prompts: bool) -> tuple[str, ...]:
    """Names of the int32 arrays [B, T] that packed rows have beside `TOKEN_ARRAYS`."""
    return ("segments", "positions", "prefixes") if shares_prompts else ("segments", "positions")


def passes(
    rollout: Rollout,
    advantages: np.ndarray,
    answers: np.ndarray,
    options: RLOptions,
    shares_prompts: bool,
    context_length: int = 0,
) -> Iterator[dict[str, np.ndarray]]:
    """The batches in which `answers` are learnt from, all of the size that `options` say.

    Packed rows, unless guidance has further prompts; else rows of answers of similar length.  Arguments as in
    `answer_batch` and `pack_answers`.
    """
    size = getattr(options, options.rows_option)
    if options.packs:
        length = bucket_of(int(rollout.total_lengths[answers].max(initial=0)), options.buckets)
        rows = pack_answers(rollout, answers, length, shares_prompts)
        for start in range(0, len(rows), size):
            some = rows[start : start + size]
            yield packed_batch(rollout, advantages, some, size, length, shares_prompts, context_length)
        return
    answers = answers[np.argsort(rollout.total_lengths[answers], kind="stable")]
    for start in range(0, len(answers), size):
        yield answer_batch(
            rollout, advantages, answers[start : start + size], size, options.buckets, context_length
        )


def answer_batch(
    rollout: Rollout,
    advantages: np.ndarray,
    answers: np.ndarray,
    size: int,
    buckets: Sequence[int],
    context_length: int = 0,
) -> dict[str, np.ndarray]:
    """Some answers of a rollout as one padded batch of `size` rows, in the smallest bucket.

    Args:
      advantages: float32 [N, A] of every token of the rollout's N answers, or [N] of every answer.
      answers: int [n], which of them; n <= size.
      context_length: tokens at the beginning of every answer that are context only.

    Returns:
      tokens, rows int32, old, mask, advantages float32 [B, T]: prompt and answer joined without a gap; with guidance
      free_tokens int32 [B, passes, T], the same answer after each unconditional prompt, and shifts int32 [B, passes],
      how much later it begins there; with top-k or top-p kept_mask uint8 [B, T, ceil(V / 8)].
    """
    unconditional = rollout.unconditional
    prompts = np.max([rollout.prompt_lengths, *(lengths for _, lengths in unconditional)], axis=0)
    length = bucket_of(int((prompts[answers // rollout.group_size] + rollout.samples.lengths[answers]).max()), buckets)
    batch = _empty(rollout, size, length)
    for i, number in enumerate(answers):
        prompt, answer = rollout.prompt(number), rollout.answer_tokens(number)
        batch["tokens"][i, : len(prompt)] = prompt
        _write_answer(batch, i, len(prompt), rollout, advantages, number, context_length)
        for k, (free, lengths) in enumerate(unconditional):
            group = number // rollout.group_size
            f = int(lengths[group])
            batch["free_tokens"][i, k, : f + len(answer)] = np.append(free[group, :f], answer)
            batch["shifts"][i, k] = f - len(prompt)
    return batch


class RowAnswers(NamedTuple):
    """What one packed row holds: answers by the number of their group, in order, and how many tokens are free."""

    groups: dict[int, list[int]]
    free: int


def pack_answers(rollout: Rollout, answers: np.ndarray, length: int, shares_prompts: bool) -> list[RowAnswers]:
    """`answers` int [n] of a rollout in as few rows of `length` tokens as best-fit, longest first, finds.

    Args:
      shares_prompts: a prompt is counted once a row.
    """
    rows: list[RowAnswers] = []
    for number in sorted(answers.tolist(), key=lambda n: (-int(rollout.total_lengths[n]), n)):
        group = number // rollout.group_size
        prefix, own = int(rollout.prompt_lengths[group]) - 1, int(rollout.samples.lengths[number]) + 1
        needed = [own + prefix * (not shares_prompts or group not in row.groups) for row in rows]
        fits = [i for i, row in enumerate(rows) if row.free >= needed[i]]
        if fits:
            # A row that holds the prompt already costs less; among equals the fullest.
            best = min(fits, key=lambda i: (needed[i], rows[i].free))
            row, cost = rows.pop(best), needed[best]
        else:
            row, cost = RowAnswers({}, length), own + prefix
        held = {**row.groups, group: [*row.groups.get(group, []), number]}
        rows.append(RowAnswers(held, row.free - cost))
    return rows


def packed_batch(
    rollout: Rollout,
    advantages: np.ndarray,
    rows: Sequence[RowAnswers],
    size: int,
    length: int,
    shares_prompts: bool,
    context_length: int = 0,
) -> dict[str, np.ndarray]:
    """Packed rows as one batch of `size` rows of `length` tokens; arguments as in `answer_batch` and `pack_answers`.

    Returns:
      The arrays of `answer_batch` but those of guidance, and segments, positions and, with shared prompts, prefixes,
      int32 [B, T].  Each answer has a segment of its own, from 1; 0 is padding.
    """
    batch = _empty(rollout, size, length, packed_arrays(shares_prompts))

    def write(row: int, start: int, tokens: np.ndarray, first: int, segment: int) -> int:
        end = start + len(tokens)
        batch["tokens"][row, start:end] = tokens
        batch["segments"][row, start:end] = segment
        batch["positions"][row, start:end] = np.arange(first, first + len(tokens))
        return end

    for i, row in enumerate(rows):
        at, segment = 0, 0
        for numbers in row.groups.values():
            prompt = rollout.prompt(numbers[0])
            shared = len(prompt) - 1 if shares_prompts else 0
            prefix = 0
            if shared:
                prefix = segment = segment + 1
                at = write(i, at, prompt[:shared], 0, prefix)
            for number in numbers:
                segment += 1
                begin, answer = at, rollout.answer_tokens(number)
                at = write(i, at, np.concatenate([prompt[shared:], answer]), shared, segment)
                _write_answer(batch, i, at - len(answer), rollout, advantages, number, context_length)
                if shares_prompts:
                    batch["prefixes"][i, begin:at] = prefix
    return batch


def _empty(rollout: Rollout, size: int, length: int, packed: Sequence[str] = ()) -> dict[str, np.ndarray]:
    kept = rollout.samples.kept
    shapes = array_shapes(size, length, len(rollout.unconditional), 0 if kept is None else kept.shape[-1], packed)
    return {name: np.zeros(x.shape, x.dtype) for name, x in shapes.items()}


def _write_answer(
    batch: dict[str, np.ndarray],
    row: int,
    start: int,
    rollout: Rollout,
    advantages: np.ndarray,
    number: int,
    context_length: int,
) -> None:
    """Writes what belongs to an answer's tokens into `batch`, from token `start` of `row` on."""
    samples, answer = rollout.samples, rollout.answer_tokens(number)
    count = len(answer)
    place = row, slice(start, start + count)
    batch["tokens"][place] = answer
    batch["rows"][place] = samples.rows[number, :count]
    batch["old"][place] = samples.log_probs[number, :count]
    batch["mask"][row, start + context_length : start + count] = 1.0
    batch["advantages"][place] = advantages[number, :count] if advantages.ndim == 2 else advantages[number]
    if samples.kept is not None:
        batch["kept_mask"][place] = samples.kept[number, :count]


def bucket_of(length: int, buckets: Sequence[int]) -> int:
    """The smallest bucket that holds `length` tokens.  Raises UserError when none does."""
    fits = [bucket for bucket in buckets if bucket >= length]
    if not fits:
        raise UserError(
            f"a prompt and its answer may take {length} tokens; the largest bucket is {max(buckets)}.",
            "Add a larger bucket to config.buckets (it may change when a run resumes), or lower config.answer_length.",
        )
    return min(fits)
