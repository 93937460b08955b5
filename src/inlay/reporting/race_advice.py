"""What a race comes to, in a few sentences: which contender to take, why, and what the rows cannot tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from inlay.evaluation.compare import Comparison
from inlay.evaluation.intervals import FEW

from .race_entrants import Entrant, Race, rate_text
from .scores import Verdict
from .words import interval_text, number, score_text

__all__ = ["advice", "apart", "standing"]

FEWER = 2
"""How many times fewer parameters make another contender worth naming beside the winner."""
MOST_OF = 0.9
"""The share of the winner's gain over the base that makes a much smaller one worth naming though it is worse."""
LOWER = 3
"""What rates that diverged are divided by: the next ones of a grid that has two in a decade."""
NAMED = 3


def advice(race: Race) -> Verdict:
    """The recommendation and its reason; the tone is good where an adapter is better than the base beyond chance."""
    if race.live:
        return Verdict("even", _so_far(race))
    if race.winner is None:
        return Verdict("bad", _no_winner(race))
    found = race.winner.base
    if found is None:
        words = f"{race.winner.name} is first on the choosing rows{_choosing(race, race.winner)}. No final rows compare"
        return Verdict("even", f"{words} it with the base: --heldout holds out more.")
    if found.better:
        said = f"{race.winner.name} is best: {_score(race, race.winner)}, better than the base beyond chance"
        return Verdict("good", " ".join([f"{said} ({apart(found)}, {_rows(found)}).", *_others(race, race.winner)]))
    if found.rows < FEW:
        words = f"{number(found.rows)} final rows are too few to tell whether {race.winner.name}, which is first, is"
        return Verdict("even", f"{words} better than the base ({apart(found)}): --heldout holds out more.")
    return _not_better(race, race.winner, found)


def apart(found: Comparison) -> str:
    """A difference in words: "loss −0.235, 95 % interval −0.44 to −0.01"."""
    size, within = abs(found.difference), interval_text(found.interval)
    sign = "+" if found.difference > 0 else "−" if found.difference < 0 else "±"
    words = f"{size:.4f}" if 5e-5 <= size < 1e-3 else score_text(size)
    return f"{found.metric} {sign}{words}" + (f", 95 % interval {within}" if within else "")


def standing(found: Comparison | None) -> str:
    """What a comparison says: "better", "worse", "not told apart"; a dash where nobody compared."""
    if found is None:
        return "–"
    if found.better is not None:
        return "better" if found.better else "worse"
    return "too few rows" if found.rows < FEW else "not told apart"


# ---- with a winner


def _not_better(race: Race, winner: Entrant, found: Comparison) -> Verdict:
    """The first one is no better than the base; others may be, by what the final rows say."""
    others = [own for own in race.entrants if own is not winner and own.base is not None and own.base.better]
    worse = found.better is False
    if others:
        named = _listed([f"{own.name} ({apart(own.base)})" for own in others if own.base is not None])
        many = sum(own.base is not None for own in race.entrants)
        words = (
            f"{winner.name}, which the choosing rows put first, is {'worse' if worse else 'no better'} than the base "
            f"beyond chance ({apart(found)}, {_rows(found)}). On the final rows {named} "
            f"{'is' if len(others) == 1 else 'are'} better than the base; among {many} such comparisons one may be so "
            "by chance. Score it on rows that no one has read before you use it."
        )
        return Verdict("bad" if worse else "even", words)
    if worse:
        words = f"Nothing beats the base: even {winner.name}, which is first, is worse than it beyond chance"
        return Verdict("bad", f"{words} ({apart(found)}, {_rows(found)}).")
    words = f"Nothing beats the base beyond chance: {winner.name} is first with {_score(race, winner)}"
    base = "" if race.base is None else f"; the base has {score_text(race.base)}"
    return Verdict("even", f"{words}{base} ({apart(found)}, {_rows(found)}).")


def _others(race: Race, winner: Entrant) -> list[str]:
    """Who is told from the winner, who is not for less, who scores better, and what other seeds came to."""
    others = [own for own in race.entrants if own is not winner and not _twins(own, winner)]
    told = {own.name: own.winner for own in others if own.winner is not None}
    better = [own for own in others if own.winner is not None and own.winner.better]
    words = []
    if better and (found := better[0].winner) is not None:
        words.append(f"On the final rows {better[0].name}{_course(better[0])} is better still beyond chance "
                     f"({apart(found)}), though the choosing rows put it lower.")  # fmt: skip
    elif told and all(found.rows >= FEW for found in told.values()):
        worse = sum(found.better is False for found in told.values())
        many = len(told)
        if worse:
            said = f"all {many} others" if worse == many > 1 else f"{worse} of {many} others"
            early = any(_course(own) for own in others if own.winner is not None and own.winner.better is False)
            words.append(
                f"It is better beyond chance than {'the other one' if many == 1 else said}"
                f"{', as they were when they left' if early else ''}."
            )
        else:
            other = "The other one is" if many == 1 else f"None of the {many} others is"
            words.append(f"{other} {'not ' if many == 1 else ''}told from it beyond chance.")
    words += _cheaper(winner, others)
    scores = [score_text(own.score) for own in race.entrants if own is not winner and _twins(own, winner)]
    if scores:
        words.append(f"With other seeds the same settings have {_listed(scores)}.")
    return words


def _cheaper(winner: Entrant, others: Sequence[Entrant]) -> list[str]:
    """The smallest one that beats the base and is not told from the winner, or else has most of its gain."""
    small = [
        own for own in others
        if own.winner is not None and own.winner.rows >= FEW and own.parameters and winner.parameters
        and own.parameters * FEWER <= winner.parameters and own.base is not None and own.base.better
    ]  # fmt: skip
    alike = [own for own in small if own.winner is not None and own.winner.better is None]
    found = alike or [own for own in small if _gain(own, winner) >= MOST_OF]
    if not found:
        return []
    least = min(found, key=lambda own: own.parameters or 0)
    assert least.winner is not None and least.parameters and winner.parameters
    begun = f"{least.name}{_course(least)} has 1/{winner.parameters / least.parameters:.2g} of its parameters"
    if alike:
        return [f"{begun}, beats the base too, and is not told from it ({apart(least.winner)})."]
    gain = f"{_gain(least, winner):.0%}".replace("%", " %")
    return [f"{begun} and {gain} of its gain over the base, though it is worse beyond chance ({apart(least.winner)})."]


def _gain(own: Entrant, winner: Entrant) -> float:
    """How much of the winner's gain over the base one has."""
    if own.base is None or winner.base is None or own.base.metric != winner.base.metric or not winner.base.difference:
        return 0.0
    return own.base.difference / winner.base.difference


def _twins(own: Entrant, other: Entrant) -> bool:
    """Whether two differ in their seed alone."""
    alike = (own.method, own.lr, own.settings) == (other.method, other.lr, other.settings)
    return alike and own.seed != other.seed


def _course(own: Entrant) -> str:
    if own.steps is None or own.total is None or own.steps >= own.total:
        return ""
    return f", which left after {number(own.steps)} of {number(own.total)} steps,"


def _score(race: Race, own: Entrant) -> str:
    within = interval_text(own.interval)
    return f"{race.metric} {score_text(own.score)}" + (f" ({within})" if within else "")


def _rows(found: Comparison) -> str:
    return f"paired over {number(found.rows)} final rows"


def _choosing(race: Race, own: Entrant) -> str:
    return "" if own.choosing is None else f" with {race.metric} {score_text(own.choosing)}"


# ---- without one


def _so_far(race: Race) -> str:
    words = "The race is running" if race.status == "running" else "The race was broken off; --resume goes on with it"
    leader = race.winner
    if leader is None or leader.choosing is None:
        return f"{words}: no contender has come to a rung yet."
    rung = f" after rung {leader.rungs}" + (f" of {len(race.rungs)}" if race.rungs else "") if leader.rungs else ""
    return (
        f"{words}: {leader.name} leads{rung}{_choosing(race, leader)} on the choosing rows. No final row is read yet."
    )


def _no_winner(race: Race) -> str:
    if not race.entrants:
        return "The record names no contender."
    if all(own.diverged for own in race.entrants):
        many = "Both" if len(race.entrants) == 2 else f"All {len(race.entrants)}"
        lower = ", ".join(f"{title} {rate_text(rate / LOWER)}" for title, rate in _lowest(race.entrants).items())
        tried = f" Try lower rates: {lower};" if lower else " Try a third of their rates,"
        return f"{many} contenders diverged.{tried} or --warmup 0.1."
    gone = sum(own.diverged for own in race.entrants)
    also = f"; {gone} of {len(race.entrants)} diverged" if gone else ""
    return f"No contender has a score on the choosing rows, so that none can be recommended{also}."


def _lowest(entrants: Sequence[Entrant]) -> Mapping[str, float]:
    """The lowest learning rate of each method, by its title."""
    found: dict[str, float] = {}
    for own in entrants:
        if own.lr is not None:
            found[own.title] = min(own.lr, found.get(own.title, own.lr))
    return found


def _listed(words: Sequence[str]) -> str:
    """ "a, b and c"; "a, b, c and 4 more"."""
    shown, more = [*words[:NAMED]], len(words) - NAMED
    if more > 0:
        shown.append(f"{more} more")
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
