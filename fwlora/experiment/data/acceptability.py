"""A small acceptability task in the manner of BLiMP: minimal pairs from a grammar, the same in every process.

Two sentences of a pair differ in one word (two in ``npi_licensing``'s scope frames); the first is acceptable English,
the second breaks one rule. Most rules are tested both ways round (*said* right and *told* wrong, then the reverse), so
that single words hardly predict the label.

Manner and phenomena: Warstadt et al. 2020, "BLiMP: The Benchmark of Linguistic Minimal Pairs for English", TACL 8.
Sentences are this project's own.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from fwlora.experiment.errors import UserError

DEFAULT_TRAIN_PAIRS = 1100
DEFAULT_EVAL_PAIRS = 440

Option = str | tuple[str, str]
Slots = dict[str, Sequence[Option]]


@dataclass(frozen=True)
class Sentence:
    """One labelled sentence.

    Attributes:
        text: begins with a capital, ends in a full stop.
        label: 1 acceptable, 0 not.
        phenomenon: the rule that its pair tests, one of :data:`PHENOMENA`.
        pair: number of its pair within the split; the other member has the same.
    """

    text: str
    label: int
    phenomenon: str
    pair: int


class Frame:
    """A sentence pattern with slots; the product of the slots' options is its finite, numbered list of pairs.

    ``{name}`` is a slot and ``[good|bad]`` a literal contrast. An option is a word for both members or a tuple
    ``(good, bad)``.
    """

    def __init__(self, template: str, **slots: Sequence[Option]) -> None:
        self._members = tuple(re.sub(r"\[(.*?)\|(.*?)\]", rf"\{group}", template) for group in (1, 2))
        self._slots = slots
        self.size = math.prod(len(options) for options in slots.values())

    def pair(self, number: int) -> tuple[str, str]:
        """Return the acceptable and the unacceptable sentence with this number, in ``range(size)``."""
        chosen = {}
        for name, options in self._slots.items():
            number, digit = divmod(number, len(options))
            chosen[name] = options[digit]
        good, bad = (
            template.format_map(
                {name: word if isinstance(word, str) else word[member] for name, word in chosen.items()}
            )
            for member, template in enumerate(self._members)
        )
        return good[0].upper() + good[1:], bad[0].upper() + bad[1:]


def _forms(text: str) -> tuple[tuple[str, ...], ...]:
    """``"man men, boy boys"`` -> ``(("man", "men"), ("boy", "boys"))``."""
    return tuple(tuple(entry.split()) for entry in text.split(","))


def _form(entries: Sequence[tuple[str, ...]], number: int) -> tuple[str, ...]:
    return tuple(entry[number] for entry in entries)


def _contrast(entries: Sequence[tuple[str, ...]], good: int, *bad: int) -> tuple[tuple[str, str], ...]:
    """Pair every entry's form ``good`` with each of its forms ``bad``."""
    return tuple((entry[good], entry[other]) for other in bad for entry in entries)


def _across(good: Sequence[str], bad: Sequence[str]) -> tuple[tuple[str, str], ...]:
    """Pair each word of one class with each of the other."""
    return tuple(product(good, bad))


# --- Vocabulary. Nouns are (singular, plural); disjoint lists keep a sentence from naming one noun twice.
NUMBERS = (0, 1)
WORKERS = _forms(
    "doctor doctors, teacher teachers, farmer farmers, student students, lawyer lawyers, painter painters, "
    "singer singers, soldier soldiers, driver drivers, pilot pilots"
)
MALES = _forms("boy boys, man men, king kings, father fathers, prince princes, brother brothers")
FEMALES = _forms("girl girls, woman women, queen queens, mother mothers, princess princesses, sister sisters")
RELATIVES = MALES + FEMALES
# Few heads, each frequent: agreement is the hardest rule to learn in a short training.
HEADS, MALE_ANTECEDENTS, FEMALE_ANTECEDENTS = WORKERS[:6], MALES[:3], FEMALES[:3]
OBJECTS = _forms(
    "lamp lamps, bottle bottles, camera cameras, ring rings, hammer hammers, clock clocks, basket baskets, "
    "book books, mirror mirrors, map maps"
)
PLACES = ["garden", "kitchen", "library", "museum", "station", "castle", "market", "park"]
ADJECTIVES = ["tired", "hungry", "happy", "famous", "angry", "quiet", "rich", "lonely"]
PLACE_STATES = ["open", "empty", "closed", "crowded"]
OBJECT_ADJECTIVES = ["old", "small", "heavy", "broken", "beautiful", "expensive"]
NEAR = ["near", "behind", "beside"]
COPULAS = (("is", "are"), ("was", "were"))
MET = ["met", "saw", "helped", "followed", "liked", "visited"]

# Verbs that need an object and never take a clause; past form and participle are the same word.
NEED_PERSON = ["admired", "ignored", "blamed", "thanked", "rescued", "arrested", "insulted", "recognized"]
NEED_THING = ["bought", "found", "repaired", "discovered", "destroyed", "received", "described", "needed"]
NO_OBJECT = ["smiled", "vanished", "laughed", "slept", "coughed", "fainted", "arrived", "trembled"]
REFLEXIVE_VERBS = ["blamed", "hurt", "praised", "admired", "described", "introduced", "defended", "hated"]
CLAUSE_VERBS = ["said", "claimed", "thought", "insisted", "announced", "hoped"]
HEARER_VERBS = ["told", "informed", "reminded", "convinced", "persuaded", "assured"]
GERUND_VERBS = ["enjoyed", "avoided", "finished", "denied", "considered", "postponed"]
INFINITIVE_VERBS = ["wanted", "hoped", "decided", "agreed", "promised", "expected"]
EMBEDDING_VERBS = ["knew", "remembered", "heard", "explained"]
# Verbs whose past form and participle differ.
IRREGULAR = _forms(
    "take took taken taking, break broke broken breaking, steal stole stolen stealing, hide hid hidden hiding, "
    "draw drew drawn drawing, choose chose chosen choosing, throw threw thrown throwing"
)
BASE, PAST, PARTICIPLE, GERUND = range(4)
ADVERBS = ["secretly", "finally", "probably", "quietly"]
SINGULAR_DETERMINERS, PLURAL_DETERMINERS = ["this", "that"], ["these", "those"]
SINGULAR_QUANTIFIERS, PLURAL_QUANTIFIERS = ["every", "each", "another"], ["many", "several", "two"]
ADJUNCTS = ["in the " + place for place in PLACES] + ["last night", "after dinner", "before the party", "yesterday"]


def _agreement_prepositional() -> Iterator[Frame]:
    """The verb agrees with the head noun, not with the noun of its prepositional phrase."""
    for head in NUMBERS:
        slots: Slots = {"head": _form(HEADS, head), "verb": _contrast(COPULAS, head, 1 - head)}
        slots |= {"adjective": ADJECTIVES}
        yield Frame("the {head} in the {place} {verb} {adjective}.", **slots, place=PLACES)
        attractor: Slots = {"attractor": _form(RELATIVES, 1 - head)}
        yield Frame("the {head} {near} the {attractor} {verb} {adjective}.", **slots, **attractor, near=NEAR)


def _agreement_relative() -> Iterator[Frame]:
    """The verb agrees with the head noun, not with a noun of its relative clause."""
    for head in NUMBERS:
        slots: Slots = {"head": _form(HEADS, head), "verb": _contrast(COPULAS, head, 1 - head)}
        slots |= {"adjective": ADJECTIVES}
        yield Frame("the {head} who {smiled} {verb} {adjective}.", **slots, smiled=NO_OBJECT)
        attractor: Slots = {"attractor": _form(RELATIVES, 1 - head)}
        yield Frame("the {head} who {met} the {attractor} {verb} {adjective}.", **slots, **attractor, met=MET)


def _reflexive_agreement() -> Iterator[Frame]:
    """A reflexive has its antecedent's gender and number, whatever other noun stands between."""
    male, female = (MALE_ANTECEDENTS, "himself"), (FEMALE_ANTECEDENTS, "herself")
    for (nouns, own), (other_nouns, other) in ((male, female), (female, male)):
        slots: Slots = {"subject": _form(nouns, 0), "verb": REFLEXIVE_VERBS}
        end = f"{{verb}} [{own}|{other}]"
        yield Frame("the {subject} " + end + " {adjunct}.", **slots, adjunct=ADJUNCTS)
        yield Frame("the {subject} {near} the {other} " + end + ".", **slots, near=NEAR, other=_form(other_nouns, 0))
        for number, contrast in enumerate((f"[{own}|themselves]", f"[themselves|{own}]")):
            slots = {"subject": _form(nouns, number), "verb": REFLEXIVE_VERBS}
            yield Frame("the {subject} {verb} " + contrast + " {adjunct}.", **slots, adjunct=ADJUNCTS)


def _determiner_noun() -> Iterator[Frame]:
    """A demonstrative or quantifier and its noun agree in number, across an adjective."""
    demonstratives = tuple(zip(SINGULAR_DETERMINERS, PLURAL_DETERMINERS, strict=True))
    for number in NUMBERS:
        slots: Slots = {"subject": _form(WORKERS + RELATIVES, 0), "verb": NEED_THING}
        noun: Slots = {"this": _form(demonstratives, number), "object": _contrast(OBJECTS, number, 1 - number)}
        yield Frame("the {subject} {verb} {this} {object}.", **slots, **noun)
        noun = {"this": _contrast(demonstratives, number, 1 - number), "object": _form(OBJECTS, number)}
        yield Frame("the {subject} {verb} {this} {adjective} {object}.", **slots, **noun, adjective=OBJECT_ADJECTIVES)
    quantified: Slots = {"many": _across(PLURAL_QUANTIFIERS, SINGULAR_QUANTIFIERS), "object": _form(OBJECTS, 1)}
    yield Frame("the {subject} {verb} {many} {object}.", **slots, **quantified)
    yield Frame("the {subject} {verb} {many} {adjective} {object}.", **slots, **quantified, adjective=OBJECT_ADJECTIVES)


def _argument_structure() -> Iterator[Frame]:
    """Transitive verbs need an object, intransitive ones bar it, and only the former have a passive."""
    transitive, intransitive = _across(NEED_PERSON, NO_OBJECT), _across(NO_OBJECT, NEED_PERSON)
    slots: Slots = {"subject": _form(WORKERS, 0), "other": _form(RELATIVES, 0)}
    yield Frame("the {subject} {verb} the {other}.", **slots, verb=transitive)
    yield Frame("the {subject} was {verb} by the {other}.", **slots, verb=transitive)
    yield Frame("the {subject} {near} the {other} {verb}.", **slots, near=NEAR, verb=intransitive)


def _clause_selection() -> Iterator[Frame]:
    """Verbs like *say* take a clause alone, verbs like *tell* a hearer before it."""
    slots: Slots = {"subject": _form(WORKERS, 0), "other": _form(RELATIVES, 0)}
    alone, hearer = _across(CLAUSE_VERBS, HEARER_VERBS), _across(HEARER_VERBS, CLAUSE_VERBS)
    state: Slots = {"place": PLACES, "state": PLACE_STATES}
    yield Frame("the {subject} {verb} that the {other} was {adjective}.", **slots, verb=alone, adjective=ADJECTIVES)
    yield Frame("the {subject} {verb} the {other} that the {place} was {state}.", **slots, verb=hearer, **state)
    yield Frame(
        "the {subject} {verb} the {other} about the {object}.",
        **slots, verb=_across(HEARER_VERBS[:3], CLAUSE_VERBS), object=_form(OBJECTS, 0),
    )  # fmt: skip


def _complement_form() -> Iterator[Frame]:
    """Some verbs take a gerund, others an infinitive."""
    slots: Slots = {"subject": _form(WORKERS + RELATIVES, 0), "object": _form(OBJECTS, 0)}
    gerund: Slots = {"verb": _across(GERUND_VERBS, INFINITIVE_VERBS), "doing": _form(IRREGULAR, GERUND)}
    infinitive: Slots = {"verb": _across(INFINITIVE_VERBS, GERUND_VERBS), "do": _form(IRREGULAR, BASE)}
    yield Frame("the {subject} {verb} {doing} the {object}.", **slots, **gerund)
    yield Frame("the {subject} {verb} {doing} the {object} {adjunct}.", **slots, **gerund, adjunct=ADJUNCTS)
    yield Frame("the {subject} {verb} to {do} the {object}.", **slots, **infinitive)


def _npi_licensing() -> Iterator[Frame]:
    """*Ever* is a negative polarity item (NPI): it needs a negation that has scope over it."""
    slots: Slots = {"subject": _form(WORKERS, 0), "other": _form(RELATIVES, 0)}
    visits: Slots = {"seen": ["visited", "seen", "liked", "left"], "place": PLACES}
    yield Frame("[no|the] {subject} has ever {seen} the {place}.", subject=slots["subject"], **visits)
    yield Frame("the {subject} has [often|ever] {seen} the {place}.", subject=slots["subject"], **visits)
    yield Frame(
        "[no|the] {subject} who {met} [the|no] {other} has ever {seen} the {place}.", **slots, met=MET, **visits
    )


def _filler_gap() -> Iterator[Frame]:
    """*What* and *who* need a gap in their clause, *that* bars one."""
    slots: Slots = {"subject": _form(WORKERS, 0), "knew": EMBEDDING_VERBS, "other": _form(RELATIVES, 0)}
    yield Frame("the {subject} {knew} [what|that] the {other} had {verb}.", **slots, verb=NEED_THING)
    yield Frame("the {subject} {knew} [who|that] the {other} had {verb}.", **slots, verb=NEED_PERSON)
    yield Frame(
        "the {subject} {knew} [that|what] the {other} had {verb} the {object}.",
        **slots, verb=NEED_THING, object=_form(OBJECTS, 0),
    )  # fmt: skip


def _auxiliary_form() -> Iterator[Frame]:
    """Each auxiliary needs one form of the verb, across an adverb."""
    slots: Slots = {"subject": _form(WORKERS + RELATIVES, 0), "adverb": ADVERBS, "object": _form(OBJECTS, 0)}
    end = "{adverb} {verb} the {object}."
    yield Frame(
        "the {subject} {has} " + end, **slots, has=["has", "had"], verb=_contrast(IRREGULAR, PARTICIPLE, PAST, BASE)
    )
    yield Frame(
        "the {subject} {will} " + end, **slots, will=["will", "must"], verb=_contrast(IRREGULAR, BASE, PAST, PARTICIPLE)
    )
    yield Frame("the {subject} {was} " + end, **slots, was=["is", "was"], verb=_contrast(IRREGULAR, GERUND, PAST, BASE))


def _existential_there() -> Iterator[Frame]:
    """After *there* the verb agrees with what follows, which must not be definite or universal."""
    for number, some, every in ((0, ["a"], ["every", "each"]), (1, ["two", "many"], ["most", "all"])):
        slots: Slots = {"person": _form(WORKERS + RELATIVES, number), "place": PLACES, "in": ["in", "near", "behind"]}
        be = _form(COPULAS, number)
        yield Frame(
            "there {be} {some} {person} {in} the {place}.",
            be=_contrast(COPULAS, number, 1 - number),
            some=some,
            **slots,
        )
        yield Frame("there {be} {some} {person} {in} the {place}.", be=be, some=_across(some, every), **slots)


_GRAMMAR = {
    build.__name__.removeprefix("_"): tuple(build())
    for build in (
        _agreement_prepositional,
        _agreement_relative,
        _reflexive_agreement,
        _determiner_noun,
        _argument_structure,
        _clause_selection,
        _complement_form,
        _npi_licensing,
        _filler_gap,
        _auxiliary_form,
        _existential_there,
    )
}
PHENOMENA: tuple[str, ...] = tuple(_GRAMMAR)


def _index_below(limit: int, generator: random.Random) -> int:
    # random() is the one method whose sequence Python promises to keep between versions.
    return int(generator.random() * limit)


def _shuffled_numbers(size: int, generator: random.Random) -> Iterator[int]:
    """Yield ``range(size)`` in random order without storing it (Fisher-Yates on a sparse array)."""
    moved: dict[int, int] = {}
    for last in range(size - 1, -1, -1):
        position = _index_below(last + 1, generator)
        yield moved.get(position, position)
        moved[position] = moved.pop(last, last)


def _draw_pairs(
    frames: Sequence[Frame], count: int, taken: set[str], generator: random.Random
) -> list[tuple[str, str]]:
    """Draw up to ``count`` pairs, frames equally likely until exhausted; add their texts to ``taken``."""
    streams = [(frame, _shuffled_numbers(frame.size, generator)) for frame in frames]
    pairs: list[tuple[str, str]] = []
    while len(pairs) < count and streams:
        position = _index_below(len(streams), generator)
        frame, numbers = streams[position]
        number = next(numbers, None)
        if number is None:
            del streams[position]
            continue
        pair = frame.pair(number)
        if taken.isdisjoint(pair):
            taken.update(pair)
            pairs.append(pair)
    return pairs


def _require_at_least(**arguments: tuple[int, int]) -> None:
    """Check arguments, each (value, least value).

    Raises:
        UserError: names each argument below its least value.
    """
    problems = [
        f"`{name}` is {value}; give a whole number of at least {least}"
        for name, (value, least) in arguments.items()
        if value < least
    ]
    if problems:
        raise UserError.collect("acceptability task", problems)


def generate_split(pairs: int, seed: int, *, exclude: Collection[str] = ()) -> list[Sentence]:
    """Generate distinct minimal pairs, spread over the phenomena as evenly as their number allows.

    Args:
        pairs: how many; the split has twice as many sentences, half of them acceptable.
        seed: fixes the split, whatever the process, platform or Python version.
        exclude: texts that must not occur.

    Returns:
        The sentences in random order of pairs, the two members of a pair next to each other in random order.

    Raises:
        UserError: fewer than one pair, a negative seed, or more pairs than the grammar has.
    """
    _require_at_least(pairs=(pairs, 1), seed=(seed, 0))
    generator = random.Random(seed)
    taken = set(exclude)
    drawn: list[tuple[str, tuple[str, str]]] = []
    problems: list[str] = []
    for position, (phenomenon, frames) in enumerate(_GRAMMAR.items()):
        wanted = (pairs - position + len(_GRAMMAR) - 1) // len(_GRAMMAR)
        found = _draw_pairs(frames, wanted, taken, generator)
        if len(found) < wanted:
            problems.append(f"{phenomenon}: {wanted} asked for, {len(found)} left")
        drawn.extend((phenomenon, pair) for pair in found)
    if problems:
        raise UserError.collect(
            f"acceptability task: `pairs` is {pairs}, more than the grammar has; ask for fewer", problems
        )
    sentences: list[Sentence] = []
    for pair_number, index in enumerate(_shuffled_numbers(len(drawn), generator)):
        phenomenon, (good, bad) = drawn[index]
        members = [Sentence(good, 1, phenomenon, pair_number), Sentence(bad, 0, phenomenon, pair_number)]
        sentences.extend(members if generator.random() < 0.5 else reversed(members))
    return sentences


def generate_task(
    train_pairs: int = DEFAULT_TRAIN_PAIRS, eval_pairs: int = DEFAULT_EVAL_PAIRS, seed: int = 0
) -> dict[str, list[Sentence]]:
    """Generate the task's two splits, ``train`` and ``validation``; no text occurs twice.

    Raises:
        UserError: as :func:`generate_split`.
    """
    _require_at_least(train_pairs=(train_pairs, 1), eval_pairs=(eval_pairs, 1), seed=(seed, 0))
    # Twice the seed, so that no split of one task is drawn as a split of another.
    train = generate_split(train_pairs, 2 * seed)
    validation = generate_split(eval_pairs, 2 * seed + 1, exclude=[sentence.text for sentence in train])
    return {"train": train, "validation": validation}
