"""Pages, tables and the prefix cache: random operations against what the tokens must be."""

import math
from dataclasses import replace

import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from decode.pages import OutOfPages, Pages, Table
from decode.prefix_cache import PrefixCache

COUNT, SIZE = 16, 4


class Sequences(RuleBasedStateMachine):
    """A pool whose slots hold prefixes: every sequence must always read its own."""

    table, cache = Table, PrefixCache

    @initialize()
    def start(self):
        self.pool = Pages(COUNT, SIZE)
        self.prefixes = self.cache(self.pool)
        self.memory = {}
        self.live = []  # (table, its tokens, its salt)
        self.leases = []  # [number, tokens that are known of it, salt, when wanted]
        self.now = 0.0

    def write(self, table, tokens, fresh):
        needed = table.missing(len(fresh))
        before = list(table.pages), table.length
        if needed > self.pool.free:
            with pytest.raises(OutOfPages):
                table.grow(len(fresh))
            assert (table.pages, table.length) == before
            return False
        free = self.pool.free
        for source, target in table.grow(len(fresh)):
            for place in range(SIZE):
                self.memory[target * SIZE + place] = self.memory.get(source * SIZE + place)
        assert free - self.pool.free == needed
        for slot, token in zip(table.slots(len(tokens), len(fresh)), fresh, strict=True):
            tokens.append(token)
            self.memory[slot] = tuple(tokens)  # keys and values depend on all tokens before
        return True

    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=14), salt=st.sampled_from("ab"))
    def begin(self, tokens, salt):
        pages = self.prefixes.match(tokens, salt)
        known = len(pages) * SIZE
        assert known < len(tokens)
        table = self.table(self.pool, pages, known)
        if self.write(table, held := tokens[:known], tokens[known:]):
            self.live.append((table, held, salt))
        else:
            table.close()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), fresh=st.lists(st.integers(0, 1), min_size=1, max_size=6))
    def go_on(self, data, fresh):
        table, tokens, _ = data.draw(st.sampled_from(self.live))
        self.write(table, tokens, fresh)

    @precondition(lambda self: self.live)
    @rule(data=st.data(), go_on=st.booleans())
    def fork(self, data, go_on):
        table, tokens, salt = data.draw(st.sampled_from(self.live))
        self.live.append((table.fork(), list(tokens), salt))
        if go_on:
            self.write(*self.live[-1][:2], [0])
            self.write(table, tokens, [1])

    @precondition(lambda self: self.live)
    @rule(data=st.data(), keep=st.booleans())
    def end(self, data, keep):
        i = data.draw(st.integers(0, len(self.live) - 1))
        table, tokens, salt = self.live.pop(i)
        if keep:
            self.prefixes.insert(tokens, table.pages, salt)
        table.close()

    @precondition(lambda self: self.live)
    @rule(data=st.data(), time=st.integers(-2, 5), ends=st.booleans())
    def lease(self, data, time, ends):
        i = data.draw(st.integers(0, len(self.live) - 1))
        table, tokens, salt = self.live[i]
        self.prefixes.insert(tokens, table.pages, salt)
        lease = self.prefixes.lease(tokens, self.now + time, salt)
        assert (lease is None) == (len(tokens) < SIZE)
        if ends:
            table.close()
            del self.live[i]
        if lease is not None:
            whole = tokens[: len(tokens) // SIZE * SIZE]
            self.leases.append([lease, whole, salt, self.now + time])

    @precondition(lambda self: self.leases)
    @rule(data=st.data())
    def give_up(self, data):
        i = data.draw(st.integers(0, len(self.leases) - 1))
        self.prefixes.give_up(self.leases.pop(i)[0])

    @rule(count=st.integers(1, 3) | st.integers(1, COUNT))
    def evict(self, count):
        self.now += 0.5
        free = self.pool.free
        freed = self.prefixes.evict(count, self.now)
        assert self.pool.free - free == freed <= count
        self.shortened()

    def shortened(self):
        """What is left of leased prefixes; what is wanted sooner than one that lost pages is whole,
        and all without a lease had gone before."""
        lost, left = [], []
        for lease in self.leases:
            _, tokens, salt, wanted = lease
            known = self.known(tokens, salt)
            if known < len(tokens):
                lost.append(abs(wanted - self.now))
                lease[1] = tokens[:known]
        for node in self.prefixes._nodes():
            if not node.children and self.pool.holders[node.page] == 1:
                left.append(min((abs(w - self.now) for w in node.leases.values()), default=99.0))
        assert not lost or max(left, default=0.0) <= min(lost)
        self.leases = [lease for lease in self.leases if lease[1]]

    def known(self, tokens, salt):
        """Of `tokens`; looked up without being used."""
        node, count = self.prefixes._roots.get(salt), 0
        while node is not None:
            node = node.children.get(tuple(tokens[count : count + SIZE]))
            count += SIZE * (node is not None)
        return count

    @invariant()
    def every_page_is_accounted_for(self):
        self.pool.check()
        held = [page for table, _, _ in self.live for page in table.pages]
        assert sum(self.pool.holders) == len(held) + self.prefixes.pages

    @invariant()
    def every_sequence_reads_its_tokens(self):
        for table, tokens, _ in self.live:
            assert table.length == len(tokens)
            for i, slot in enumerate(table.slots(0, len(tokens))):
                assert self.memory[slot] == tuple(tokens[: i + 1])

    @invariant()
    def leased_prefixes_are_there(self):
        for number, tokens, salt, wanted in self.leases:
            assert self.known(tokens, salt) == len(tokens)
            assert self.prefixes._leased[number].leases[number] == wanted
        assert len(self.prefixes._leased) == len(self.leases)


def run(machine):
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=100,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.generate],
        ),
    )


def test_any_order_of_operations_keeps_every_token():
    run(Sequences)


class WritesIntoShared(Table):
    def _writes_into_shared(self, tokens):
        return False


class ForksWithoutHolding(Table):
    def fork(self):
        return replace(self, pages=list(self.pages))


class ForgetsLeases(PrefixCache):
    def _worth(self, node, now):
        return 0.0, node.used


class EvictsTheSoonest(PrefixCache):
    def _worth(self, node, now):
        worth, used = super()._worth(node, now)
        return (worth if worth == -math.inf else -worth), used


class LosesLeases(PrefixCache):
    def _move_leases(self, gone, to):
        pass


class EvictsHeld(PrefixCache):
    def _can_go(self, node):
        return not node.children


class IgnoresSalt(PrefixCache):
    def _path(self, tokens, salt):
        return super()._path(tokens, "a")


class ForgetsTheStart(PrefixCache):
    """Takes a page for what its own tokens are, whatever comes before."""

    def _path(self, tokens, salt):
        by_chunk = {node.tokens: node for node in self._nodes()}
        path = [by_chunk.get(chunk) for chunk in self._chunks(tokens)]
        return path[: path.index(None)] if None in path else path


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        ("cache", EvictsHeld),
        ("cache", LosesLeases),
        ("cache", ForgetsTheStart),
        ("table", ForksWithoutHolding),
        ("table", WritesIntoShared),
    ],
)
def test_a_mistake_is_found(part, wrong):
    machine = type("Wrong", (Sequences,), {part: wrong})
    with pytest.raises((AssertionError, ValueError, KeyError)):
        run(machine)


def test_salts_do_not_meet():
    for cache, known in ((PrefixCache, 0), (IgnoresSalt, 1)):
        pool = Pages(4, 2)
        prefixes = cache(pool)
        prefixes.insert([1, 2], pool.take(1), "a")
        assert len(prefixes.match([1, 2, 3], "b")) == known


def test_a_chain_goes_from_its_end_and_leaves_no_root():
    pool = Pages(8, 2)
    prefixes = PrefixCache(pool)
    pages = pool.take(6)
    prefixes.insert(range(12), pages, "salt")
    prefixes.insert((1,), [], "shorter than a page")
    pool.release(pages)
    assert prefixes.evict(4, 0.0) == 4 and pool.free == 6
    found = prefixes.match(range(12), "salt")
    assert found == pages[:2]
    pool.release(found)
    assert prefixes.evict(9, 0.0) == 2 and not prefixes._roots and prefixes.pages == 0


def test_the_prefix_used_longest_ago_goes_first():
    pool = Pages(3, 1)
    prefixes = PrefixCache(pool)
    for token in (1, 2, 3):
        pages = pool.take(1)
        prefixes.insert([token], pages)
        pool.release(pages)
    pool.release(prefixes.match([1, 9]))
    assert prefixes.evict(1, 0.0) == 1
    assert [len(prefixes.match([token, 9])) for token in (1, 2, 3)] == [1, 0, 1]


def leased_order(cache):
    """In which order prefixes go, a page at a time: wanted in 5 s, in 1 s, 10 s ago, never."""
    pool = Pages(8, 1)
    prefixes = cache(pool)
    for name, wanted in (("a", 105.0), ("b", 101.0), ("c", 90.0), ("d", None)):
        pages = pool.take(2)
        prefixes.insert([ord(name), 0], pages)
        pool.release(pages)
        if wanted is not None:
            prefixes.lease([ord(name), 0], wanted)
    gone = ""
    while prefixes.pages:
        assert prefixes.evict(1, 100.0) == 1
        there = {node.tokens for node in prefixes._nodes()}
        gone += "".join(x for x in "abcd" if x not in gone and (ord(x),) not in there)
    assert not prefixes._leased
    return gone


def test_what_is_wanted_last_goes_first():
    assert leased_order(PrefixCache) == "dcab"
    assert leased_order(ForgetsLeases) == "abcd" and leased_order(EvictsTheSoonest) == "dbac"


def test_wrong_calls_are_told():
    with pytest.raises(ValueError, match="count=0"):
        Pages(0, 4)
    pool = Pages(1, 4)
    with pytest.raises(OutOfPages, match="2 pages wanted, 1 free"):
        pool.take(2)
    with pytest.raises(ValueError, match="page 0 is free already"):
        pool.release([0])
    with pytest.raises(ValueError, match="cannot be shared"):
        pool.share([0])
