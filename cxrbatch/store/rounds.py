"""Rounds of reading: which images, who reads which, in which order, and how far everybody is.

All chance comes from the round's seed: the same images, readers and seed make the same round.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy import Connection, select

from cxrbatch.errors import Fatal
from cxrbatch.store.connection import connect
from cxrbatch.store.review_schema import (
    ReviewAction,
    reads,
    review_status,
    round_assignments,
    round_items,
    round_readers,
    rounds,
)
from cxrbatch.store.schema import files
from cxrbatch.store.sql import AnyRow, chunks
from cxrbatch.store.store import Store
from cxrbatch.store.work_list import Filters, candidates

__all__ = [
    "NewRound",
    "Progress",
    "assignment",
    "close_round",
    "create_round",
    "disputed_images",
    "first_unread",
    "list_rounds",
    "progress_of",
    "round_of",
]

_REPEAT_GAP = 5  # other images at least between an image and its hidden repeat, where there are so many
_MOST_IMAGES = 20_000
_SKIPPED = str(ReviewAction.SKIP)


@dataclass(frozen=True, slots=True)
class NewRound:
    """What an administrator asks for."""

    name: str
    readers: tuple[str, ...]
    filters: Filters
    filter_json: str  # the same, as it is kept
    size: int  # images at most
    reads_per_image: int = 2  # 1 to 3
    blinded: bool = True
    stratified: bool = False  # as many of each of the model's labels as there are
    repeat_share: float = 0.0  # of the images, read once more by the same readers
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a reader is."""

    reader: str
    done: int
    skipped: int
    total: int


def create_round(store: Store, new: NewRound, creator: str) -> int:
    """Choose the images, deal them out, and return the round's id.

    Raises Fatal: the name is taken, too few readers, nothing to read.
    """
    readers = sorted(set(new.readers))
    if not new.name.strip():
        raise Fatal("A round needs a name.")
    if not 1 <= new.reads_per_image <= 3:
        raise Fatal("An image is read 1 to 3 times.")
    if len(readers) < new.reads_per_image:
        raise Fatal(f"{new.reads_per_image} reads an image need as many readers; {len(readers)} are chosen.")
    if not 1 <= new.size <= _MOST_IMAGES:
        raise Fatal(f"A round has 1 to {_MOST_IMAGES:,} images.")
    with connect(store.engine, write=True) as connection:
        taken = select(rounds.c.id).where(rounds.c.name == new.name)
        if connection.execute(taken).first() is not None:
            raise Fatal(f"There is a round named {new.name!r} already.")
        chance = random.Random(new.seed)
        chosen = _chosen(candidates(connection, new.filters), new, chance)
        if not chosen:
            raise Fatal("No image meets these filters.")
        row = {"name": new.name, "created_by": creator, "created_at": store.now(connection), "blinded": new.blinded}
        row |= {"reads_per_image": new.reads_per_image, "seed": new.seed, "filter_json": new.filter_json}
        round_id: int = connection.execute(sa.insert(rounds).returning(rounds.c.id), row).scalar_one()
        connection.execute(sa.insert(round_readers), [{"round_id": round_id, "reader": name} for name in readers])
        repeated = set(chance.sample(chosen, round(new.repeat_share * len(chosen))))
        items = [(image_id, 0) for image_id in chosen] + [(image_id, 1) for image_id in chosen if image_id in repeated]
        _write_items(connection, round_id, items)
        _deal(connection, round_id, items, readers, new, chance)
    return round_id


def _chosen(found: Sequence[tuple[int, str]], new: NewRound, chance: random.Random) -> list[int]:
    """Image ids, at random; `stratified`: in turn from each label."""
    if not new.stratified:
        ids = [image_id for image_id, _ in found]
        return sorted(chance.sample(ids, min(new.size, len(ids))))
    strata: defaultdict[str, list[int]] = defaultdict(list)
    for image_id, label in found:
        strata[label].append(image_id)
    for label in sorted(strata):
        chance.shuffle(strata[label])
    chosen: list[int] = []
    while len(chosen) < new.size and any(strata.values()):
        for label in sorted(strata):
            if strata[label] and len(chosen) < new.size:
                chosen.append(strata[label].pop())
    return sorted(chosen)


def _write_items(connection: Connection, round_id: int, items: Sequence[tuple[int, int]]) -> None:
    model: dict[int, AnyRow] = {}
    for chunk in chunks(sorted({image_id for image_id, _ in items}), 500):
        shown = select(files.c.image_id, files.c.label, files.c.confidence, files.c.cascade_id).where(
            files.c.image_id.in_(chunk), files.c.label.is_not(None)
        )
        for row in connection.execute(shown.order_by(files.c.id.desc())):
            model[row.image_id] = row
    rows = [
        {
            "round_id": round_id,
            "image_id": image_id,
            "repeat": repeat,
            "model_label": model[image_id].label,
            "model_confidence": model[image_id].confidence,
            "model_cascade_id": model[image_id].cascade_id,
        }
        for image_id, repeat in items
    ]
    connection.execute(sa.insert(round_items), rows)


def _deal(
    connection: Connection,
    round_id: int,
    items: Sequence[tuple[int, int]],
    readers: Sequence[str],
    new: NewRound,
    chance: random.Random,
) -> None:
    """Each image to as many readers as it is to have reads, evenly; a repeat to the readers of its image."""
    ids = {
        (row.image_id, row.repeat): row.id
        for row in connection.execute(select(round_items).where(round_items.c.round_id == round_id))
    }
    dealt: dict[str, list[tuple[int, int]]] = {name: [] for name in readers}
    order = [item for item in items if item[1] == 0]
    chance.shuffle(order)
    again = {image_id for image_id, repeat in items if repeat == 1}
    for number, item in enumerate(order):
        start = number * new.reads_per_image
        for turn in range(new.reads_per_image):
            dealt[readers[(start + turn) % len(readers)]].append(item)
    rows = []
    for name, mine in dealt.items():
        own = random.Random(f"{new.seed} {name}")
        own.shuffle(mine)
        ordered = _with_repeats(mine, again, own)
        rows += [
            {"round_id": round_id, "reader": name, "position": position, "item_id": ids[item]}
            for position, item in enumerate(ordered, 1)
        ]
    if rows:
        connection.execute(sa.insert(round_assignments), rows)


def _with_repeats(mine: list[tuple[int, int]], again: set[int], chance: random.Random) -> list[tuple[int, int]]:
    ordered = list(mine)
    for image_id, _ in mine:
        if image_id in again:
            place = ordered.index((image_id, 0))
            earliest = min(place + 1 + _REPEAT_GAP, len(ordered))
            ordered.insert(chance.randint(earliest, len(ordered)), (image_id, 1))
    return ordered


def list_rounds(connection: Connection) -> list[AnyRow]:
    """All rounds, newest first, with the number of their images."""
    items = select(sa.func.count()).where(round_items.c.round_id == rounds.c.id, round_items.c.repeat == 0)
    return list(
        connection.execute(select(rounds, items.scalar_subquery().label("images")).order_by(rounds.c.id.desc()))
    )


def round_of(connection: Connection, round_id: int) -> AnyRow | None:
    return connection.execute(select(rounds).where(rounds.c.id == round_id)).first()


def progress_of(connection: Connection, round_id: int) -> list[Progress]:
    """By reader."""
    total = select(round_assignments.c.reader, sa.func.count().label("number")).where(
        round_assignments.c.round_id == round_id
    )
    totals = {row.reader: row.number for row in connection.execute(total.group_by(round_assignments.c.reader))}
    named = select(round_readers.c.reader).where(round_readers.c.round_id == round_id).order_by(round_readers.c.reader)
    counted = (
        select(reads.c.reader, (reads.c.action == _SKIPPED).label("skipped"), sa.func.count().label("number"))
        .where(reads.c.round_id == round_id)
        .group_by(reads.c.reader, "skipped")
    )
    numbers = {(row.reader, bool(row.skipped)): row.number for row in connection.execute(counted)}
    return [
        Progress(name, numbers.get((name, False), 0), numbers.get((name, True), 0), totals.get(name, 0))
        for name in connection.execute(named).scalars()
    ]


def assignment(connection: Connection, round_id: int, reader: str, position: int) -> AnyRow | None:
    """The item at a reader's position (columns of round_items), and their current read of it (action, label)."""
    mine = sa.and_(
        reads.c.image_id == round_items.c.image_id,
        reads.c.repeat == round_items.c.repeat,
        reads.c.round_id == round_id,
        reads.c.reader == reader,
    )
    query = (
        select(round_items, reads.c.action, reads.c.label)
        .select_from(round_assignments)
        .join(round_items, round_items.c.id == round_assignments.c.item_id)
        .outerjoin(reads, mine)
        .where(
            round_assignments.c.round_id == round_id,
            round_assignments.c.reader == reader,
            round_assignments.c.position == position,
        )
    )
    return connection.execute(query).first()


def first_unread(connection: Connection, round_id: int, reader: str, after: int = 0) -> int | None:
    """The reader's first position without a read; then those that they skipped; None: all are read."""
    mine = select(reads.c.action).where(
        reads.c.image_id == round_items.c.image_id,
        reads.c.repeat == round_items.c.repeat,
        reads.c.round_id == round_id,
        reads.c.reader == reader,
    )
    base = (
        select(sa.func.min(round_assignments.c.position))
        .select_from(round_assignments)
        .join(round_items, round_items.c.id == round_assignments.c.item_id)
        .where(round_assignments.c.round_id == round_id, round_assignments.c.reader == reader)
    )
    unread = base.where(~mine.exists())
    skipped = base.where(mine.where(reads.c.action == _SKIPPED).exists())
    later = round_assignments.c.position > after
    for query in (unread.where(later), unread, skipped.where(later), skipped):
        found = connection.execute(query).scalar_one()
        if found is not None:
            return int(found)
    return None


def close_round(store: Store, round_id: int) -> None:
    """No more reads; what was hidden is shown from now on."""
    with connect(store.engine, write=True) as connection:
        open_one = sa.update(rounds).where(rounds.c.id == round_id, rounds.c.closed_at.is_(None))
        connection.execute(open_one.values(closed_at=store.now(connection)))


def disputed_images(connection: Connection, round_id: int) -> list[int]:
    """Images of a round that readers disagree about or have flagged, until one adjudicates."""
    query = (
        select(round_items.c.image_id)
        .join(review_status, review_status.c.image_id == round_items.c.image_id)
        .where(
            round_items.c.round_id == round_id,
            round_items.c.repeat == 0,
            review_status.c.status.in_(["disputed", "flagged"]),
        )
        .order_by(round_items.c.image_id)
    )
    return list(connection.execute(query).scalars())
