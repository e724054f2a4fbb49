"""How the ranks of a run find each other: by the launcher's store, then by gloo and NCCL."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import Store


def meet(backend: str, timeout: timedelta) -> tuple[Store, int, int]:
    """Make the process group of all ranks; returns its store, this rank, and their number.

    timeout: for the others to come, and of the collectives afterwards.
    Raises ConnectionError where they cannot connect, and says so where this host's name is why.
    """
    at = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        store, rank, world = next(dist.rendezvous("env://", timeout=timeout))
        # torchrun keeps its store over a restart, with the addresses of ranks that are dead.
        restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"start/{restarts}/{world}", store)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=world)
    except RuntimeError as error:  # torch's DistError among them; gloo's have no class
        host = socket.gethostname()
        alone = os.environ.get("MASTER_ADDR") in ("127.0.0.1", "::1", "localhost")
        said = " ".join(str(error).split())[:200]
        raise ConnectionError(
            f"launcher.timeout={timeout.total_seconds():g}: the ranks that meet at {at} could not "
            f"all connect, as {host} sees it: {said}{'' if alone else own_name_is_local(host)}"
        ) from error
    return store, rank, world


def own_name_is_local(host: str) -> str:
    """What to do where gloo tells other hosts a loopback address of this one, as it does where
    the host's own name stands for one (Debian's 127.0.1.1) or for nothing; "" where all is well.

    gloo takes an address of the host's name, or the interface GLOO_SOCKET_IFNAME.
    """
    if "GLOO_SOCKET_IFNAME" in os.environ:
        return ""
    address = address_of(host)
    if address is not None and not ipaddress.ip_address(address.split("%")[0]).is_loopback:
        return ""
    return (
        f". Here the name {host} stands for {address or 'no address'}, where no other host finds "
        "it: set GLOO_SOCKET_IFNAME to the interface by which the hosts reach each other "
        "(`ip address` lists them), or mend /etc/hosts"
    )


def address_of(host: str) -> str | None:
    """The address of this host's name that gloo would tell others: the first that can be bound."""
    with suppress(OSError):
        for family, kind, protocol, _, place in socket.getaddrinfo(
            host, 0, type=socket.SOCK_STREAM
        ):
            with suppress(OSError), socket.socket(family, kind, protocol) as tried:
                tried.bind(place)
                return str(place[0])
    return None
