"""What is made of what ranks tell: clocks, who tries whom, and addresses."""

from __future__ import annotations

import json
import socket
import threading
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from axialtrain.launch.findings import Found, Report, looked, shown
from axialtrain.launch.meeting import ring
from axialtrain.launch.rank_checks import Rank, check_clocks, check_reach
from axialtrain.launch.reach import Answering, Reached, own_address, reach


def ranks_on(*hosts: str) -> dict[int, Rank]:
    return {n: Rank(n, host, {}, f"10.0.0.{n}", 1) for n, host in enumerate(hosts)}


def test_a_rank_that_answers_says_what_its_clock_says() -> None:
    answering = Answering(3)
    try:
        (reached,) = reach([3], {3: ("127.0.0.1", answering.port)}, 5.0)
    finally:
        answering.close()
    assert reached.error is None
    assert 0 < reached.trip < 5
    assert abs(reached.ahead) <= reached.trip


def test_somebody_else_who_answers_is_not_the_rank() -> None:
    """As where a host takes another's address for its own."""
    answering = Answering(4)
    try:
        (reached,) = reach([3], {3: ("127.0.0.1", answering.port)}, 5.0)
    finally:
        answering.close()
    assert reached.error == "somebody else answers there"


def test_a_rank_that_takes_the_call_and_is_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        started = time.monotonic()
        (reached,) = reach([1], {1: ("127.0.0.1", silent.getsockname()[1])}, 0.5)
    assert reached.error == "timed out"
    assert time.monotonic() - started < 5


def test_a_clock_that_is_wrong() -> None:
    """A server that is a rank in all but the time."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            caller, _ = server.accept()
            with caller:
                while caller.recv(1):
                    said = json.dumps({"rank": 1, "time": time.time() + 3600})
                    caller.sendall(f"{said}\n".encode())

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        (reached,) = reach([1], {1: ("127.0.0.1", server.getsockname()[1])}, 5.0)
        thread.join(5)
    found = Found("ranks", "here")
    check_clocks(found, ranks_on("a", "b"), {0: [reached]})
    (trouble,) = found.troubles
    assert trouble.where == "b"
    assert trouble.what == "its clock is 3600.0 s ahead of that of a"
    assert trouble.fix.startswith("let both hosts set their clocks from the same time server")


def test_a_slow_network_is_no_wrong_clock() -> None:
    found = Found("ranks", "here")
    check_clocks(found, ranks_on("a", "b"), {0: [Reached(1, None, trip=6.0, ahead=2.9)]})
    assert not found.troubles
    check_clocks(found, ranks_on("a", "a"), {0: [Reached(1, None, trip=0.0, ahead=99.0)]})
    assert not found.troubles


def test_clocks_of_several_hosts_that_agree() -> None:
    found = Found("ranks", "here")
    tries = {
        own: [Reached(peer, None, 0.1) for peer in range(3) if peer != own] for own in range(3)
    }
    check_clocks(found, ranks_on("a", "b", "c"), tries)
    assert not found.troubles
    assert found.facts == ["clocks of hosts are at most 0.000 s apart"]


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_rank_answers_at_both_kinds_of_address(address: str) -> None:
    if ":" in address and not socket.has_dualstack_ipv6():
        pytest.skip("there is no IPv6 here")
    answering = Answering(4)
    try:
        (reached,) = reach([4], {4: (address, answering.port)}, 5.0)
    finally:
        answering.close()
    assert reached.error is None


def test_a_name_that_stands_for_loopback_gets_its_own_advice() -> None:
    ranks = ranks_on("a", "b")
    ranks[1] = Rank(1, "b", {}, "127.0.1.1", 1)
    found = Found("ranks", "here")
    assert not check_reach(found, ranks, {0: [Reached(1, "Connection refused")], 1: []})
    (trouble,) = found.troubles
    assert trouble.where == "rank 1 on b"
    assert trouble.what == (
        "rank 0 on a cannot reach it over TCP at 127.0.1.1, where its host says it is "
        "(Connection refused)"
    )
    assert trouble.fix.startswith("give the host's name its real address in /etc/hosts")


def test_the_address_of_an_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib7")
    with pytest.raises(OSError, match=r"GLOO_SOCKET_IFNAME=ib7: No such device"):
        own_address()


@given(st.lists(st.sampled_from("abc"), min_size=2, max_size=12), st.integers(1, 12))
def test_every_rank_and_every_host_is_tried(hosts: list[str], most: int) -> None:
    ranks = list(range(len(hosts)))
    tried = {own: ring(ranks, own, hosts, most) for own in ranks}
    for own, peers in tried.items():
        assert own not in peers
        assert len(set(peers)) == len(peers)
        if len(ranks) <= most:
            assert sorted([*peers, own]) == ranks
        else:
            assert 1 <= len(peers) <= 2
            if len(set(hosts)) > 1:
                assert any(hosts[peer] != hosts[own] for peer in peers)
    assert {peer for peers in tried.values() for peer in peers} == set(ranks)


def test_a_check_that_fails_or_hangs_keeps_what_it_found() -> None:
    def fails(found: Found) -> None:
        found.fact("before")
        raise OSError("planted")

    def hangs(found: Found) -> None:
        found.fact("before")
        time.sleep(5)

    failed = looked("one", "here", fails, seconds=5.0)
    assert failed.facts == ["before"]
    assert [trouble.what for trouble in failed.troubles] == ["OSError: planted"]
    started = time.monotonic()
    hung = looked("two", "here", hangs, seconds=0.2)
    assert time.monotonic() - started < 4
    assert hung.facts == ["before"]
    assert [trouble.what for trouble in hung.troubles] == ["no answer within 0.2 s"]


def test_alike_facts_and_troubles_are_said_once() -> None:
    report = Report(3, ["a", "a", "b"])
    for where, size in (("a", 1), ("b", 1), ("c", 2)):
        found = Found("disk", where)
        found.fact(f"size {size}")
        found.fact("made of rust")
        found.trouble("it is full", "empty it")
        report.found.append(found)
    assert report.facts == {"disk": ["a, b: size 1", "made of rust", "c: size 2"]}
    (trouble,) = report.troubles
    assert str(trouble) == "disk, a, b, c: it is full: empty it"
    assert report.status == 1
    assert "3 ranks on 2 hosts (a, b)" in str(report)


def test_secrets_in_errors_are_not_shown() -> None:
    error = OSError("GET https://me:hunter2@store/a?X-Sig=hunter2 and s3://key:hunter2@b/c failed")
    assert shown(error) == "OSError: GET https://store/a and s3://b/c failed"
    error = OSError("HTTPS://me:hun)ter'2@store/a?X-Sig=hun'ter2, then")
    assert shown(error) == "OSError: HTTPS://store/a then"
