from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from service.engine.channel import Channel
from service.engine.messages import AbortRequest, ModelUnloaded, Shutdown, decode_event, encode


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, Channel]]:
    ours, theirs = socket.socketpair()
    channel = Channel(theirs)
    yield ours, channel
    ours.close()
    channel.close()


Ends = tuple[socket.socket, Channel]


def test_a_frame_in_pieces_is_one_command_and_frames_in_one_piece_are_several(ends: Ends) -> None:
    ours, channel = ends
    frame = encode(AbortRequest(request_id="a" * 300))
    for byte in frame[:-1]:
        ours.send(bytes([byte]))
        assert channel.receive(wait=True) == []
    ours.send(frame[-1:] + frame + encode(Shutdown()) + frame[:2])
    assert channel.receive(wait=True) == [AbortRequest(request_id="a" * 300)] * 2 + [Shutdown()]
    ours.send(frame[2:])
    assert channel.receive(wait=True) == [AbortRequest(request_id="a" * 300)]


def test_without_waiting_nothing_is_nothing(ends: Ends) -> None:
    assert ends[1].receive(wait=False) == []


def test_a_ring_from_another_thread_ends_the_wait(ends: Ends) -> None:
    channel = ends[1]
    threading.Timer(0.05, channel.ring).start()
    assert channel.receive(wait=True) == []
    for _ in range(100_000):  # more than the pipe holds
        channel.ring()
    assert channel.receive(wait=True) == []


def test_the_end_of_the_other_side_is_told_in_both_directions(ends: Ends) -> None:
    ours, channel = ends
    ours.close()
    assert channel.receive(wait=True) is None
    assert not channel.send([ModelUnloaded(model_id="m")])


def test_a_frame_beyond_the_limit_is_refused_before_it_is_read(ends: Ends) -> None:
    ours, channel = ends
    ours.send((1 << 30).to_bytes(4, "big"))
    with pytest.raises(ValueError, match="a frame of 1073741824 bytes"):
        channel.receive(wait=True)


def test_events_go_out_as_frames(ends: Ends) -> None:
    ours, channel = ends
    events = [ModelUnloaded(model_id=name) for name in "ab"]
    assert channel.send(events)
    data = ours.recv(1000)
    size = int.from_bytes(data[:4], "big")
    assert decode_event(data[4 : 4 + size]) == events[0]
    assert decode_event(data[8 + size :]) == events[1]
