"""Copies beside what is computed: on the CPU at once; with streams in an order that no one reads too early in.

The recorder stands in for `torch.cuda`'s streams and notes what would happen in which order; numbers are not its
matter.
"""

import weakref
from contextlib import contextmanager

import pytest
import torch

from gradvar.errors import GradvarError
from gradvar.gradients.gram import FactorStore
from gradvar.gradients.lane import IN_FLIGHT, Lane
from gradvar.gradients.spill import HostFactorStore, HostMemory
from tests.gradients import references

CPU = torch.device("cpu")


class Event:
    def __init__(self, log, name):
        self.log, self.name = log, name

    def synchronize(self):
        self.log.append(("host waits for", self.name))


class Stream:
    def __init__(self, log, name):
        self.log, self.name, self.count = log, name, 0

    def wait_stream(self, other):
        self.log.append((self.name, "waits for stream", other.name))

    def wait_event(self, event):
        self.log.append((self.name, "waits for", event.name))

    def record_event(self):
        self.count += 1
        self.log.append((self.name, "marks", f"{self.name} {self.count}"))
        return Event(self.log, f"{self.name} {self.count}")

    def synchronize(self):
        self.log.append(("host waits for stream", self.name))


class Recorder:
    """What Lane takes of torch.cuda."""

    def __init__(self):
        self.log = []
        self.side, self.main = Stream(self.log, "side"), Stream(self.log, "main")

    def current_stream(self, device):
        return self.main

    @contextmanager
    def stream(self, stream):
        self.log.append(("enter", stream.name))
        yield
        self.log.append(("leave", stream.name))


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda self, s: found.log.append(("kept for", s.name)))
    return found


def test_a_copy_out_waits_for_its_source_and_keeps_it(recorder):
    lane = Lane(CPU, recorder.side, recorder)
    source, target = torch.arange(4.0), torch.empty(4)
    assert lane.send(source, target) is target
    assert torch.equal(source, target)
    assert recorder.log == [
        ("side", "waits for stream", "main"),
        ("enter", "side"),
        ("leave", "side"),
        ("kept for", "side"),
        ("side", "marks", "side 1"),
    ]


def test_the_host_waits_where_too_many_copies_are_on_their_way(recorder):
    lane = Lane(CPU, recorder.side, recorder)
    for _ in range(IN_FLIGHT + 2):
        lane.send(torch.ones(2), torch.empty(2))
    waits = [entry for entry in recorder.log if entry[0] == "host waits for"]
    assert waits == [("host waits for", "side 1"), ("host waits for", "side 2")]


def test_a_source_written_to_while_its_copy_is_on_its_way_is_refused_by_name(recorder):
    """The copy is in no order with the write: it is refused once the copy is seen done, at the latest before a Gram."""
    for then in (send_more, lambda lane: lane.fetch("x", [torch.ones(2)])):
        lane, buffer = Lane(CPU, recorder.side, recorder), torch.ones(3, 2)
        lane.send(buffer[:2], torch.empty(2, 2), "layers.3.mlp.up_proj")  # a view: its base is written to
        buffer.zero_()
        with pytest.raises(GradvarError, match=r"^layers\.3\.mlp\.up_proj: .*input again for other responses"):
            then(lane)


def send_more(lane):
    for _ in range(IN_FLIGHT):
        lane.send(torch.ones(2), torch.empty(2))


def test_a_source_may_be_written_to_once_its_copy_was_seen_done(recorder):
    lane, buffer = Lane(CPU, recorder.side, recorder), torch.ones(3)
    copy = lane.send(buffer, torch.empty(3))
    send_more(lane)
    buffer.zero_()
    lane.fetch("x", [copy])
    assert torch.equal(lane.take("x", [copy])[0], torch.ones(3))


def test_a_source_is_held_until_its_copy_was_seen_done(recorder):
    """Autograd adds in place to a gradient whose memory nobody else holds."""
    lane = Lane(CPU, recorder.side, recorder)
    source = torch.ones(3)
    alive = weakref.ref(source)
    lane.send(source, torch.empty(3))
    del source
    assert alive() is not None
    lane.fetch("x", [torch.ones(2)])
    assert alive() is None


def test_a_spilled_input_that_the_model_writes_again_is_refused(recorder):
    """As on CUDA: what the host holds of the first response may be the second's."""
    host = HostMemory(pinned=False)
    host._lanes[CPU] = Lane(CPU, recorder.side, recorder)
    store = HostFactorStore(2, 4, 3, torch.float64, CPU, host)
    store.key = "layers.3.mlp.up_proj"
    buffer = torch.ones(5, 3, dtype=torch.float64)
    store.add(0, buffer[:], torch.ones(5, 4, dtype=torch.float64))
    host.forget()
    buffer.fill_(2)
    with pytest.raises(GradvarError, match=r"layers\.3\.mlp\.up_proj: .*choose other targets"):
        store.gram(False, 1 << 20)


def test_what_comes_back_is_waited_for_and_a_buffer_filled_again_only_once_it_was_used(recorder):
    lane = Lane(CPU, recorder.side, recorder)
    values = [[torch.full((3, 2), float(i)), torch.full((5,), i, dtype=torch.int16)] for i in range(4)]
    lane.fetch(0, values[0])
    for i in range(4):
        parts = lane.take(i, values[i])
        assert all(torch.equal(part, value) for part, value in zip(parts, values[i], strict=True))
        if i + 1 < 4:
            lane.fetch(i + 1, values[i + 1])  # while the parts are used
        assert all(torch.equal(part, value) for part, value in zip(parts, values[i], strict=True))
        lane.give_back(i)
    order = [entry for entry in recorder.log if entry[0] in ("side", "main") and entry[1] != "waits for stream"]
    assert order == [
        ("side", "marks", "side 1"),  # 0 is there
        ("main", "waits for", "side 1"),
        ("side", "marks", "side 2"),  # 1 is there, before 0 is used up
        ("main", "marks", "main 1"),  # 0 is used up
        ("main", "waits for", "side 2"),
        ("side", "waits for", "main 1"),  # its buffer again, for 2
        ("side", "marks", "side 3"),
        ("main", "marks", "main 2"),
        ("main", "waits for", "side 3"),
        ("side", "waits for", "main 2"),
        ("side", "marks", "side 4"),
        ("main", "marks", "main 3"),
        ("main", "waits for", "side 4"),
        ("main", "marks", "main 4"),
    ]


def test_a_larger_buffer_is_made_behind_who_had_its_memory(recorder):
    lane = Lane(CPU, recorder.side, recorder)
    for i, size in enumerate((2, 900)):
        lane.take(i, [torch.ones(size)])
        lane.give_back(i)
    for i, size in enumerate((900, 3), start=2):
        lane.fetch(i, [torch.ones(size)])
    assert recorder.log.count(("side", "waits for stream", "main")) == 3
    assert recorder.log.count(("kept for", "side")) == 3


def test_a_store_over_a_lane_gives_the_same_gram(recorder):
    """Every tile of every response is sent for one step ahead; modules called twice, a response without a gradient."""
    generator = torch.Generator().manual_seed(0)
    host, size = HostMemory(pinned=False), (4, 17, 24, torch.float64, CPU)
    host._lanes[CPU] = Lane(CPU, recorder.side, recorder)
    here, there = FactorStore(*size), HostFactorStore(*size, host)
    for response in (0, 2, 3, 2):
        a, delta = (torch.randn(7 + response, width, generator=generator, dtype=torch.float64) for width in (24, 17))
        here.add(response, a, delta)
        there.add(response, a, delta)
        host.forget()
    recorder.log.clear()
    for tile in (1, 4 * 24 * 8 * 3, 1 << 20):
        assert references.error(there.gram(True, tile).numpy(), here.gram(True, 1 << 20).numpy()) < 1e-13
    fetched = recorder.side.count
    taken = sum(entry[:2] == ("main", "waits for") for entry in recorder.log)
    sent = 2 * 4
    assert fetched - sent == taken == 4 * (17 + 6 + 1), "nothing is sent twice"


def test_the_cpu_copies_at_once():
    lane = Lane.of(CPU)
    value = torch.arange(3.0)
    target = lane.send(value, torch.empty(3))
    assert torch.equal(target, value)
    lane.fetch("x", [value])
    assert lane.take("x", [value])[0] is value
    lane.give_back("x")
    lane.join()
    lane.wait()


@pytest.mark.parametrize("budget", [1 << 12, 1 << 16, None])
def test_slabs_stay_within_the_budget(budget):
    """A gradient of a quarter of the budget once pinned twice the budget."""
    host = HostMemory(1 << 10, pinned=False, budget=budget)
    for _ in range(3):
        host.empty((1 << 10,), torch.uint8)
    assert host.taken <= (budget or 1 << 12)
    assert host.taken >= 3 << 10
